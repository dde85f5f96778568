"""Scores of 10⁴ and norms of 10³: whatever full attention survives, methods with fitted values do, too."""

import pytest
import torch
from blocks import HALVES
from test_corrected import full, smooth

from agentsd.attention.corrected import corrected_attention

SIZE = (33, 40)


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
@pytest.mark.parametrize("opened", [0, 12])
def test_finite_where_full_attention_is(opened, extreme, dtype):
    qkv = [t.to(dtype) for t in extreme(*smooth(*SIZE))]
    assert full(*qkv).isfinite().all()
    assert corrected_attention(*qkv, size=SIZE, cell=(4, 4), opened=opened).isfinite().all()
