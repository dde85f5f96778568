"""Token merging: the partition, the clusters, and what merging and unmerging do to tokens."""

import pytest
import torch
from blocks import Recorder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import _links as links_by_loops

from agentsd.attention.merging import match, partition, partition_seed

sizes = {"h": st.integers(1, 14), "w": st.integers(1, 14), "sx": st.integers(1, 6), "sy": st.integers(1, 6)}


def leaders_by_loops(tokens: torch.Tensor, dst: list[int], r: int) -> list[int]:
    """For each token the token that stands for it."""
    leader = list(range(len(tokens)))
    for src, to in links_by_loops(tokens, dst)[:r]:
        leader[src] = to
    return leader


def matched(h, w, sx, sy, share, batch=2, seed=3):
    part = partition(h, w, sx, sy, seed)
    x = torch.randn(batch, h * w, 8)
    r = int(share * part.src.numel())
    return x, part, r, match(x, part, r, r)


class TestPartition:
    @given(**sizes, seed=st.none() | st.integers(0, 2**63 - 1))
    def test_each_whole_cell_has_one_destination(self, h, w, sx, sy, seed):
        part = partition(h, w, sx, sy, seed)
        cell = [(i // w // sy, i % w // sx) for i in part.dst.tolist()]
        assert cell == [(y, x) for y in range(h // sy) for x in range(w // sx)]
        assert sorted(part.dst.tolist() + part.src.tolist()) == list(range(h * w))

    def test_with_a_seed_every_place_of_a_cell_is_taken_equally_often_without_one_the_first(self):
        assert partition(4, 6, 3, 2).dst.tolist() == [0, 3, 12, 15]
        drawn = torch.stack([partition(8, 12, 3, 2, seed).dst for seed in range(100)])
        counts = (drawn // 12 % 2 * 3 + drawn % 12 % 3).flatten().bincount(minlength=6)
        assert (counts / (100 * 16 / 6) - 1).abs().max() < 0.25

    def test_the_seed_depends_on_every_argument(self):
        arguments = (0, 500.0, 16, 16, 4, 2)
        changed = [(*arguments[:i], 3, *arguments[i + 1 :]) for i in range(6)] + [(0, None, 16, 16, 4, 2)]
        seeds = {partition_seed(*args) for args in (arguments, *changed)}
        assert len(seeds) == 8
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert partition_seed(*arguments) == 2999922255393193713  # the same in every process and version


class TestMatch:
    @settings(max_examples=40)
    @given(**sizes, share=st.floats(0, 1))
    def test_clusters_are_those_of_a_plain_loop_and_averaged(self, h, w, sx, sy, share):
        assume(h >= sy and w >= sx)
        x, part, r, matching = matched(h, w, sx, sy, share)
        assert matching.shape == (2, h * w)
        if r == 0:
            assert matching.merged is None
            assert matching.agents is None
            return
        y = torch.randn(2, h * w, 5)
        for clusters in (matching.merged, matching.agents):
            assert clusters.count == h * w - r
            merged = clusters.merge(y)
            back, index = clusters.unmerge(merged), clusters.index.view(2, -1)
            for b in range(2):
                leader = torch.tensor(leaders_by_loops(x[b], part.dst.tolist(), r))
                same = leader == leader[:, None]
                assert torch.equal(index[b] == index[b, :, None], same)
                mean = same.float() @ y[b] / same.sum(1, keepdim=True)
                torch.testing.assert_close(back[b], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(clusters.merge(back), merged, rtol=1e-4, atol=1e-5)

    def test_slabs_change_nothing_and_never_is_the_matrix_of_all_similarities_made(self, monkeypatch):
        x, part = torch.randn(2, 15 * 14, 8), partition(15, 14, 2, 2)
        whole = match(x, part, 60, 100)
        assert (whole.merged.count, whole.agents.count) == (150, 110)
        monkeypatch.setattr("agentsd.attention.merging._SLAB", 100)
        with Recorder() as seen:
            slabs = match(x, part, 60, 100)
        assert torch.equal(slabs.merged.index, whole.merged.index)
        assert seen.largest <= x.numel()  # sources × destinations would be five times as much

    def test_zero_tokens_of_any_norm_and_no_gradient(self):
        x = torch.zeros(1, 64, 8, requires_grad=True)
        matching = match(x, partition(8, 8, 4, 4), 20, 0)
        assert matching.merged.merge(x).isfinite().all()


class TestMergeAndUnmerge:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_dtype_and_sums_in_float32(self, dtype):
        part = partition(64, 64, 64, 64)  # one cluster of 4096
        matching = match(torch.randn(1, 4096, 4), part, 4095, 0)
        x = torch.full((1, 4096, 4), 1.5, dtype=dtype)
        merged = matching.merged.merge(x)
        assert merged.dtype == dtype
        assert torch.equal(merged, x[:, :1])
        assert matching.merged.unmerge(merged).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_both_ways_to_average_clusters_agree(self, monkeypatch, dtype):
        x = torch.randn(2, 64, 24).to(dtype)
        clusters = match(x, partition(8, 8, 2, 2, 0), 40, 0).merged
        bags = clusters.merge(x)
        monkeypatch.setattr("agentsd.attention.merging._BAG_DEVICES", ())
        torch.testing.assert_close(bags, clusters.merge(x))
