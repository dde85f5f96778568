"""Scores of 10⁴ and norms of 10³: whatever full attention survives, methods with fitted values do, too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from blocks import HALVES
from test_methods_local import full, smooth

from agentsd.attention.tensors import join_heads, sample_each, split_heads
from agentsd.config import LANDMARKS
from agentsd.methods.corrected import by_heavy_hitters, by_superpixels, corrected_attention
from agentsd.methods.local import local_attention

SIZE, CELL, HEADS = (33, 40), (4, 4), 2


def corrected(q, k, v, landmarks):
    few = [split_heads(t, HEADS) for t in sample_each([join_heads(t) for t in (q, k, v)], SIZE, CELL)]
    if landmarks == "sample":
        return corrected_attention(q, k, v, *few)
    if landmarks == "superpixel":
        return by_superpixels(q, k, v, few[0], size=SIZE, cell=CELL)
    return by_heavy_hitters(q, k, v, *few, size=SIZE, cell=CELL)


def local(q, k, v, landmarks):
    return local_attention(q, k, v, size=SIZE, cell=CELL, landmarks=landmarks)


def scores_of_ten_thousand(q, k, v):
    return 1e4 * q / (q @ k.mT).abs().amax() * q.shape[-1] ** 0.5, k, v


def norms_of_a_thousand(q, k, v):
    k, v = (1e3 * t / t.norm(dim=-1).amax() for t in (k, v))
    return q / q.norm(dim=-1).amax(), k, v


def one_value_at_the_end_of_float16(q, k, v):
    v = v.clone()
    v[..., 13 * 40 + 13, :] = 6e4
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("extreme", [scores_of_ten_thousand, norms_of_a_thousand, one_value_at_the_end_of_float16])
@pytest.mark.parametrize("landmarks", LANDMARKS)
@pytest.mark.parametrize("step", [corrected, local])
def test_finite_where_full_attention_is(step, landmarks, extreme, dtype):
    qkv = [t.to(dtype) for t in extreme(*smooth(*SIZE))]
    assert full(*qkv).isfinite().all()
    assert partial(step, landmarks=landmarks)(*qkv).isfinite().all()
