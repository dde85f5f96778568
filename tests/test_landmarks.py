"""Landmarks over cells that follow the content."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from patching import CORRECTED, FLAT, patched_output
from test_methods_local import LOCAL, deviation, full, smooth

from agentsd import SettingError, apply_patch
from agentsd.attention.grid import sampled
from agentsd.attention.landmarks import heavy_hitters, superpixels
from agentsd.attention.tensors import join_heads, sample_each, split_heads
from agentsd.methods.corrected import by_heavy_hitters, corrected_attention
from agentsd.methods.local import local_attention
from benchmarks.attentions import KINDS


def by_loops(k, v, size, cell):
    """Each token joins the nearest of the landmarks of its cell and of the eight around it."""
    k, v = k.double(), v.double()
    rows, columns = (list(sampled(*axis)) for axis in zip(size, cell, strict=True))
    places = [(y, x) for y in rows for x in columns]
    of_cell = torch.tensor([[y // cell[0], x // cell[1]] for y, x in places])
    index = torch.arange(size[0] * size[1])
    token_cell = torch.stack([index // size[1] // cell[0], index % size[1] // cell[1]], dim=-1)
    reach = (token_cell[:, None] - of_cell[None]).abs().amax(-1) <= 1
    seeds = k[:, :, [y * size[1] + x for y, x in places]]
    distance = torch.cdist(k, seeds).masked_fill(~reach, torch.inf)
    joins = F.one_hot(distance.argmin(-1), len(places)).double().mT
    return torch.stack([joins @ t / joins.sum(-1, keepdim=True) for t in (k, v)])


class TestSuperpixels:
    @settings(max_examples=30)
    @given(
        height=st.integers(1, 19),
        width=st.integers(1, 19),
        sy=st.sampled_from([1, 2, 4, 8]),
        sx=st.sampled_from([1, 2, 4, 8]),
        batch=st.integers(1, 2),
    )
    def test_every_token_joins_the_nearest_of_nine(self, height, width, sy, sx, batch):
        k, v = torch.randn(2, batch, 3, height * width, 6)
        found = superpixels(k, v, (height, width), (sy, sx))
        torch.testing.assert_close(found.double(), by_loops(k, v, (height, width), (sy, sx)), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype):
        k, v = (torch.randn(2, 2, 3, 16 * 18, 6) * 4).to(dtype)
        found = superpixels(k, v, (16, 18), (4, 4))
        assert found.dtype == dtype
        assert deviation(found.float(), by_loops(k, v, (16, 18), (4, 4))) < 0.02

    def test_keys_that_are_all_alike_share_their_tokens(self):
        k, v = torch.ones(1, 1, 64, 4), torch.randn(1, 1, 64, 4)
        found = superpixels(k, v, (8, 8), (4, 4))
        torch.testing.assert_close(found[0], torch.ones(1, 1, 4, 4))
        torch.testing.assert_close(found[1], v.mean(2, keepdim=True).expand(-1, -1, 4, -1))

    def test_rows_one_at_a_time(self, monkeypatch):
        k, v = torch.randn(2, 3, 2, 100, 6)
        whole = superpixels(k, v, (10, 10), (4, 4))
        monkeypatch.setattr("agentsd.attention.landmarks._MOST", 0)
        torch.testing.assert_close(superpixels(k, v, (10, 10), (4, 4)), whole)

    def test_gradients_reach_keys_and_values(self):
        k, v = (t.requires_grad_() for t in torch.randn(2, 1, 2, 64, 4).unbind())
        superpixels(k, v, (8, 8), (4, 4)).square().sum().backward()
        assert k.grad.abs().sum() > 0
        assert v.grad.abs().sum() > 0


class TestHeavyHitters:
    @settings(max_examples=30)
    @given(
        height=st.integers(1, 19),
        width=st.integers(1, 19),
        sy=st.sampled_from([1, 2, 4]),
        sx=st.sampled_from([1, 2, 4]),
        batch=st.integers(1, 2),
    )
    def test_each_block_gives_the_key_that_the_mean_agent_attends_to_most(self, height, width, sy, sx, batch):
        k, a = torch.randn(batch, 3, height * width, 6), torch.randn(batch, 3, 5, 6)
        found = heavy_hitters(k, a, (height, width), (sy, sx))
        scores = torch.einsum("bhnd,bhd->bhn", k, a.mean(2)).unflatten(2, (height, width))
        expected = [
            [y + int(most) // block.shape[3], x + int(most) % block.shape[3]]
            for row in range(batch)
            for head in range(3)
            for y in range(0, height, 2 * sy)
            for x in range(0, width, 2 * sx)
            for block in [scores[row, head, y : y + 2 * sy, x : x + 2 * sx][None, None]]
            for most in [block.argmax()]
        ]
        places = torch.stack([found // width, found % width], dim=-1)
        torch.testing.assert_close(places.flatten(0, 2), torch.tensor(expected))

    def test_gradients_reach_keys_and_values(self):
        q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 256, 4).unbind())
        few = [split_heads(x, 2) for x in sample_each([join_heads(x) for x in (q, k, v)], (16, 16), (4, 4))]
        by_heavy_hitters(q, k, v, *few, size=(16, 16), cell=(4, 4)).square().sum().backward()
        assert all(t.grad.abs().sum() > 0 for t in (q, k, v))


class TestCloseness:
    def test_sharp_attention_is_closer(self):
        """The embedded model's, with its queries times 8: a fifth less error at least, of nine calls."""
        size, cell = (32, 32), (4, 4)
        at = KINDS["model, queries × 8"](9, 40, size, torch.Generator().manual_seed(0))
        few = [split_heads(x, 9) for x in sample_each([join_heads(x) for x in (at.q, at.k, at.v)], size, cell)]
        expected = full(at.q, at.k, at.v)
        means = superpixels(at.k, at.v, size, cell)
        errors = [
            ((corrected_attention(at.q, at.k, at.v, few[0], *pair) - expected).norm(dim=(-2, -1))).mean()
            for pair in (means, few[1:])
        ]
        assert errors[0] < 0.8 * errors[1]

    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize(
        ("kind", "share"),
        [("sinks, corners", 0.1), ("sinks, moving", 0.15), ("high-norm keys", 0.75), ("model, queries × 8", 0.8)],
    )
    def test_heavy_hitters_mend_what_a_sample_misses(self, kind, share, local):
        size, cell = (64, 64), (4, 4)
        at = KINDS[kind](8, 40, size, torch.Generator().manual_seed(0))
        qkv = at.q, at.k, at.v
        expected = full(*qkv)
        if local:
            ours = [local_attention(*qkv, size=size, cell=cell, landmarks=few) for few in ("heavy", "sample")]
        else:
            few = [split_heads(x, 8) for x in sample_each([join_heads(x) for x in qkv], size, cell)]
            ours = [by_heavy_hitters(*qkv, *few, size=size, cell=cell), corrected_attention(*qkv, *few)]
        heavy, sampled_ = (torch.linalg.vector_norm(out - expected, dim=(-2, -1)).median() for out in ours)
        assert heavy < share * sampled_


class TestPatch:
    @pytest.mark.parametrize("landmarks", ["superpixel", "heavy"])
    @pytest.mark.parametrize("kw", [CORRECTED, LOCAL], ids=["corrected", "local"])
    @pytest.mark.parametrize("size", [(48, 40), (41, 47)])
    def test_it_is_used_at_any_size_and_finite(self, kw, size, landmarks):
        given = inputs(1, *size)
        plain, sampled_ = run(FLAT, given), patched_output(FLAT, given, **kw)
        out = patched_output(FLAT, given, **kw, landmarks=landmarks)
        assert deviation(out, sampled_) > 1e-4
        assert deviation(out, plain) < 0.2

    @pytest.mark.parametrize("landmarks", ["superpixel", "heavy"])
    @pytest.mark.parametrize("kw", [CORRECTED, LOCAL], ids=["corrected", "local"])
    def test_the_same_in_any_batch(self, kw, landmarks):
        x, t, context = inputs(3, 48, 40)
        together = patched_output(FLAT, (x, t, context), **kw, landmarks=landmarks)
        alone = patched_output(FLAT, (x[1:2], t[1:2], context[1:2]), **kw, landmarks=landmarks)
        torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("landmarks", ["superpixel", "heavy"])
    def test_where_all_is_near_it_is_full_attention(self, landmarks):
        qkv = smooth(16, 16, sharpness=4.0)
        out = local_attention(*qkv, size=(16, 16), cell=(4, 4), landmarks=landmarks)
        torch.testing.assert_close(out, full(*qkv), rtol=1e-4, atol=1e-5)

    def test_another_name_is_refused(self):
        with pytest.raises(SettingError, match="landmarks must be one of 'sample', 'superpixel', 'heavy', got 'mean'"):
            apply_patch(FLAT, landmarks="mean")
