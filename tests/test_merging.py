"""Token merging: the partition, the clusters, and what merging and unmerging do to tokens."""

from __future__ import annotations

import pytest
import torch
from blocks import Recorder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import _links as links_by_loops

from agentsd.attention import merging
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

    def test_without_a_seed_it_is_the_first_token_of_each_cell(self):
        assert partition(4, 6, 3, 2).dst.tolist() == [0, 3, 12, 15]

    def test_with_a_seed_every_place_of_a_cell_is_taken_equally_often(self):
        counts = torch.zeros(2, 3)
        for seed in range(100):
            for i in partition(8, 12, 3, 2, seed).dst.tolist():
                counts[i // 12 % 2, i % 12 % 3] += 1
        expected = 100 * 16 / 6
        assert (counts / expected - 1).abs().max() < 0.25

    def test_depends_on_the_seed_alone(self):
        first = partition(16, 16, 4, 4, 7).dst
        torch.manual_seed(123)
        torch.rand(10)
        assert torch.equal(partition(16, 16, 4, 4, 7).dst, first)
        assert not torch.equal(partition(16, 16, 4, 4, 8).dst, first)

    def test_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        partition(16, 16, 4, 4, 7)
        assert torch.equal(torch.get_rng_state(), state)

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
    def test_clusters_are_those_of_a_plain_loop(self, h, w, sx, sy, share):
        assume(h >= sy and w >= sx)
        x, part, r, matching = matched(h, w, sx, sy, share)
        assert matching.shape == (2, h * w)
        if r == 0:
            assert matching.merged is None
            assert matching.agents is None
            return
        for clusters in (matching.merged, matching.agents):
            assert clusters.count == h * w - r
            index = clusters.index.view(2, -1)
            for b in range(2):
                leader = leaders_by_loops(x[b], part.dst.tolist(), r)
                assert torch.equal(index[b] == index[b, :, None], torch.tensor(leader) == torch.tensor(leader)[:, None])

    def test_agents_and_merged_tokens_have_numbers_of_their_own(self):
        x, part = torch.randn(1, 64, 8), partition(8, 8, 4, 4)
        matching = match(x, part, 10, 55)
        assert (matching.merged.count, matching.agents.count) == (54, 9)

    def test_matching_in_slabs_changes_nothing(self, monkeypatch):
        x, part = torch.randn(2, 15 * 14, 8), partition(15, 14, 2, 2)
        whole = match(x, part, 60, 0).merged
        monkeypatch.setattr("agentsd.attention.merging._SLAB", 100)
        assert torch.equal(match(x, part, 60, 0).merged.index, whole.index)

    def test_never_makes_the_matrix_of_all_similarities(self):
        x, part = torch.randn(1, 96 * 96, 4), partition(96, 96, 2, 2)
        with Recorder() as seen:
            match(x, part, 4000, 0)
        assert seen.largest <= 2**20  # sources × destinations would be 2304 · 6912, 15 times as much

    def test_a_row_s_clusters_are_those_of_the_row_alone(self):
        x, part = torch.randn(3, 64, 8), partition(8, 8, 2, 2)
        together = match(x, part, 30, 0).merged.index.view(3, 64)
        for b in range(3):
            alone = match(x[b : b + 1], part, 30, 0).merged.index
            assert torch.equal(together[b] - b * 34, alone)

    def test_zero_tokens_of_any_norm_and_no_gradient(self):
        x = torch.zeros(1, 64, 8, requires_grad=True)
        matching = match(x, partition(8, 8, 4, 4), 20, 0)
        assert matching.merged.merge(x).isfinite().all()

    def test_keeps_no_reference_to_the_tokens(self):
        x = torch.randn(1, 64, 8)
        matching = match(x, partition(8, 8, 4, 4), 20, 0)
        before = matching.merged.index.clone()
        x.zero_()
        assert torch.equal(matching.merged.index, before)
        assert x.untyped_storage().data_ptr() not in {
            t.untyped_storage().data_ptr() for t in (matching.merged.index, matching.merged.order)
        }


class TestMergeAndUnmerge:
    @settings(max_examples=40)
    @given(**sizes, share=st.floats(0, 1))
    def test_merging_averages_and_unmerging_gives_back(self, h, w, sx, sy, share):
        assume(h >= sy and w >= sx)
        x, part, r, matching = matched(h, w, sx, sy, share)
        assume(r)
        y = torch.randn(2, h * w, 5)
        back = matching.merged.unmerge(matching.merged.merge(y))
        for b in range(2):
            leader = leaders_by_loops(x[b], part.dst.tolist(), r)
            for i in range(h * w):
                members = [j for j in range(h * w) if leader[j] == leader[i]]
                torch.testing.assert_close(back[b, i], y[b, members].mean(0), rtol=1e-4, atol=1e-5)

    @given(**sizes, share=st.floats(0, 1))
    def test_merging_what_was_unmerged_is_the_identity(self, h, w, sx, sy, share):
        assume(h >= sy and w >= sx)
        _, _, r, matching = matched(h, w, sx, sy, share)
        assume(r)
        y = torch.randn(2, matching.merged.count, 3)
        torch.testing.assert_close(matching.merged.merge(matching.merged.unmerge(y)), y, rtol=1e-4, atol=1e-5)

    def test_merging_commutes_with_an_affine_projection(self):
        x, _, _, matching = matched(8, 8, 4, 4, 0.7)
        project = torch.nn.Linear(8, 6)
        with torch.no_grad():
            torch.testing.assert_close(
                project(matching.merged.merge(x)), matching.merged.merge(project(x)), rtol=1e-4, atol=1e-5
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_dtype_and_sums_in_float32(self, dtype):
        part = partition(64, 64, 64, 64)  # one cluster of 4096
        matching = match(torch.randn(1, 4096, 4), part, 4095, 0)
        x = torch.full((1, 4096, 4), 1.5, dtype=dtype)
        merged = matching.merged.merge(x)
        assert merged.dtype == dtype
        assert torch.equal(merged, x[:, :1])
        assert matching.merged.unmerge(merged).dtype == dtype

    def test_gradients_pass_through(self):
        x, _, _, matching = matched(6, 6, 3, 3, 0.8)
        x.requires_grad_()
        matching.merged.unmerge(matching.merged.merge(x)).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_average_clusters_agree(monkeypatch, dtype):
    x = torch.randn(2, 64, 24).to(dtype)
    clusters = merging.match(x, merging.partition(8, 8, 2, 2, 0), 40, 0).merged
    bags = clusters.merge(x)
    monkeypatch.setattr(merging, "_BAG_DEVICES", ())
    torch.testing.assert_close(bags, clusters.merge(x))
