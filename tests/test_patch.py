"""The patch on real U-Nets: what it does, what it leaves alone, and that nothing of it is left behind."""

from __future__ import annotations

import copy
import gc
import io
import logging
import random
import weakref
from contextlib import contextmanager
from functools import partial

import numpy as np
import oracle
import pytest
import tomesd
import torch
import torch.nn.functional as F
from blocks import (
    HALVES,
    Recorder,
    actions,
    as_model,
    attention_calls,
    blocks_of,
    flat_unet,
    golden_unet,
    initialised,
    inputs,
    run,
    sdxl_like_unet,
    transformers_of,
    tree,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import agentsd
from agentsd import AgentConfig, Stage, apply_patch, early, get_patch, paper_stages, patch_unet, patched, remove_patch

GRID = {"ratio": 0.0, "agent_ratio": 0.95, "agent_source": "grid"}
SIMILARITY = {"ratio": 0.4, "agent_ratio": 0.95}
AGENTS_ALONE = {"ratio": 0.0, "agent_ratio": 0.95}
MERGING = dict(agentsd.TOKEN_MERGING)
EVERYWHERE = {"ratio": 0.4, "max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}
REST_ALONE = {"merge_attn": False, "merge_crossattn": True, "merge_mlp": True}
POOL = {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0}
KINDS = {
    "grid": GRID,
    "similarity": SIMILARITY,
    "merging": MERGING,
    "everywhere": EVERYWHERE,
    "rest alone": REST_ALONE,
    "pool": POOL,
}
SELF_ATTENTION = {name: kw for name, kw in KINDS.items() if kw.get("merge_attn", True)}
AGENTS = {"grid": GRID, "similarity": SIMILARITY}


def kinds(table):
    return pytest.mark.parametrize("kw", table.values(), ids=table.keys())


by_kind, self_attention_kinds, agent_kinds = kinds(KINDS), kinds(SELF_ATTENTION), kinds(AGENTS)
EXAMPLE = inputs(2, 12, 12)
CHANGED = 1e-2  # what patching changes at least, in an output of about 1


GOLDEN, FLAT = golden_unet(), flat_unet()


@pytest.fixture
def unet():
    return copy.deepcopy(GOLDEN)


@pytest.fixture
def flat():
    return copy.deepcopy(FLAT)


def difference(a, b) -> float:
    return (a - b).abs().max().item()


@contextmanager
def undisturbed(unet):
    """Asserts that the module tree and the outputs after the block are those before it."""
    before, out = tree(unet), run(unet, EXAMPLE)
    yield out
    assert tree(unet) == before
    assert torch.equal(run(unet, EXAMPLE), out)
    assert get_patch(unet) is None


class TestRemoval:
    @by_kind
    def test_leaves_the_module_tree_as_it_was(self, unet, kw):
        with undisturbed(unet) as plain:
            apply_patch(unet, **kw)
            assert tree(unet) != {}
            assert difference(run(unet, EXAMPLE), plain) > CHANGED
            remove_patch(unet)

    def test_the_tree_shows_a_patch(self, unet):
        before = tree(unet)
        apply_patch(unet)
        assert tree(unet) != before

    @by_kind
    def test_twice_is_once(self, unet, kw):
        with undisturbed(unet):
            apply_patch(unet, **kw)
            patch = get_patch(unet)
            assert patch.active
            remove_patch(unet)
            remove_patch(unet)
            patch.remove()
            assert not patch.active

    @by_kind
    def test_before_any_call(self, unet, kw):
        with undisturbed(unet):
            remove_patch(apply_patch(unet, **kw))

    def test_of_a_model_never_patched(self, unet):
        model = as_model(unet)
        with undisturbed(unet):
            assert remove_patch(model) is model
            assert remove_patch(unet) is unet

    def test_by_any_name_of_the_model(self, unet):
        model = as_model(unet)
        for other in (unet, model.model, model):
            apply_patch(model)
            assert get_patch(other) is get_patch(model)
            assert get_patch(other) is not None
            remove_patch(other)
            assert get_patch(model) is None

    @kinds({"similarity": SIMILARITY, "everywhere": EVERYWHERE})
    @pytest.mark.parametrize(
        ("error", "place"), [(RuntimeError, "attn1"), (KeyboardInterrupt, "attn2"), (RuntimeError, "ff")]
    )
    def test_after_an_exception_in_the_middle_of_a_forward(self, unet, kw, error, place):
        def fail(*_):
            raise error("stopped")

        with undisturbed(unet):
            expected = patched_output(unet, EXAMPLE, **kw)
            apply_patch(unet, **kw)
            handle = getattr(blocks_of(unet)[-1], place).register_forward_pre_hook(fail)
            with pytest.raises(error, match="stopped"):
                run(unet, EXAMPLE)
            handle.remove()
            # the patch is still whole,
            assert torch.equal(run(unet, EXAMPLE), expected)
            handle = blocks_of(unet)[1].ff.register_forward_hook(fail)
            with pytest.raises(error, match="stopped"):
                run(unet, EXAMPLE)
            handle.remove()
            # and can be taken off
            remove_patch(unet)

    def test_by_the_context_manager_after_an_exception(self, unet):
        model = as_model(unet)

        def interrupted():
            with patched(model, 0.3, agent_ratio=0.9) as same:
                assert same is model
                assert get_patch(unet).config.ratio == 0.3
                assert difference(run(unet, EXAMPLE), plain) > CHANGED
                raise KeyError

        with undisturbed(unet) as plain, pytest.raises(KeyError):
            interrupted()

    def test_the_context_manager_removes_only_its_own_patch(self, unet):
        with undisturbed(unet):
            with patched(unet):
                apply_patch(unet, ratio=0.1)
            assert get_patch(unet).config.ratio == 0.1
            remove_patch(unet)

    def test_a_failing_installation_is_taken_back(self, unet, monkeypatch):
        last = blocks_of(unet)[-1].ff
        with undisturbed(unet):

            def fail(*args, **kwargs):
                raise RuntimeError("no hook")

            last.register_forward_hook = fail
            with pytest.raises(RuntimeError, match="no hook"):
                apply_patch(unet, merge_mlp=True)
            del last.register_forward_hook

    def test_a_patch_may_be_removed_while_its_u_net_runs(self, unet):
        with undisturbed(unet):
            apply_patch(unet, **SIMILARITY)
            handle = blocks_of(unet)[3].norm2.register_forward_hook(lambda *_: remove_patch(unet) and None)
            assert run(unet, EXAMPLE).isfinite().all()
            handle.remove()

    def test_training_mode_and_weights_are_not_touched(self, unet):
        weights = {name: p.clone() for name, p in unet.state_dict().items()}
        with patched(unet, **EVERYWHERE):
            assert unet.state_dict().keys() == weights.keys()
            run(unet, EXAMPLE)
        assert not any(module.training for module in unet.modules())
        assert all(torch.equal(p, weights[name]) for name, p in unet.state_dict().items())


def patched_output(unet, example, **kw):
    with patched(unet, **kw):
        out = run(unet, example)
        assert not get_patch(unet).notes
    return out


class TestApplyingTwice:
    def test_replaces(self, unet):
        with undisturbed(unet):
            expected = patched_output(unet, EXAMPLE, **GRID)
            first = get_patch(apply_patch(unet, **EVERYWHERE))
            second = get_patch(apply_patch(unet, **GRID))
            assert second is not first
            assert not first.active
            assert torch.equal(run(unet, EXAMPLE), expected)
            first.remove()  # late, and without effect on what replaced it
            assert get_patch(unet) is second
            assert torch.equal(run(unet, EXAMPLE), expected)
            remove_patch(unet)

    def test_many_times_leaves_one_set_of_hooks(self, unet):
        apply_patch(unet, **EVERYWHERE)
        once = {name: {k: len(v) for k, v in seen.items() if "hooks" in k} for name, (_, seen) in tree(unet).items()}
        for _ in range(3):
            apply_patch(unet, **EVERYWHERE)
        again = {name: {k: len(v) for k, v in seen.items() if "hooks" in k} for name, (_, seen) in tree(unet).items()}
        assert again == once

    def test_a_removed_patch_can_be_installed_again(self, unet):
        with undisturbed(unet):
            patch = patch_unet(unet, AgentConfig(**GRID))
            out = run(unet, EXAMPLE)
            patch.remove()
            other = patch_unet(unet, AgentConfig(**EVERYWHERE))
            patch.install()
            assert not other.active
            assert get_patch(unet) is patch
            assert torch.equal(run(unet, EXAMPLE), out)
            patch.remove()


class TestWhatIsPatched:
    def test_agents_at_level_0_by_default(self, unet):
        apply_patch(as_model(unet))
        run(unet, EXAMPLE)
        patch = get_patch(unet)
        assert actions(patch) == ["agents", *["untouched"] * 4, "agents", "agents"]
        assert [layer.size for layer in patch.report()] == [(12, 12), *[(6, 6)] * 4, (12, 12), (12, 12)]
        assert [layer.calls for layer in patch.report()] == [
            {"agents": 1},
            *[{"untouched": 1}] * 4,
            {"agents": 1},
            {"agents": 1},
        ]

    @pytest.mark.parametrize(("h", "w"), [(12, 12), (10, 14)])
    @by_kind
    def test_explains_beforehand_what_it_then_does(self, unet, kw, h, w):
        apply_patch(unet, **kw)
        patch = get_patch(unet)
        foreseen = patch.explain(h, w, done=0.5)
        run(unet, inputs(1, h, w))
        assert foreseen == [(layer.name, layer.plan) for layer in patch.report()]
        assert all(plan.action != "untouched" or plan.reason for _, plan in foreseen)

    def test_no_level_0_attention_as_in_sdxl(self):
        unet, example = sdxl_like_unet(), inputs(1, 16, 24)
        plain = run(unet, example)
        expected = {
            "downsample 1": ({"max_downsample": 1}, set()),
            "downsample 2": ({"max_downsample": 2}, {(8, 12)}),
            "downsample 4": ({"max_downsample": 4}, {(8, 12), (4, 6)}),
            "threshold": ({"max_downsample": 8, "min_tokens": 96}, {(8, 12)}),
            "higher threshold": ({"max_downsample": 8, "min_tokens": 97}, set()),
        }
        for kw, sizes in expected.values():
            with patched(unet, ratio=0.0, agent_ratio=0.9, sx=2, sy=2, agent_source="grid", **kw):
                out = run(unet, example)
                patch = get_patch(unet)
                done = {layer.size for layer in patch.report() if layer.plan.action == "agents"}
                assert done == sizes
                assert {layer.size for layer in patch.report()} == {(8, 12), (4, 6)}
            assert (difference(out, plain) > CHANGED) == bool(sizes)

    @pytest.mark.parametrize("kw", [GRID, AGENTS_ALONE])
    def test_ratio_0_uses_agents_and_merges_nothing(self, unet, kw):
        with patched(unet, **kw), attention_calls(blocks_of(unet)[0].attn1) as seen:
            run(unet, EXAMPLE)
            plan = get_patch(unet).report()[0].plan
        ((_, out),) = seen
        assert (plan.action, plan.queries, plan.agents, plan.r) == ("agents", 144, 9, 0)
        assert len({tuple(row.tolist()) for row in out[0]}) == 144  # no token has another's output

    def test_merged_tokens_share_their_output(self, unet):
        with patched(unet, **SIMILARITY), attention_calls(blocks_of(unet)[0].attn1) as seen:
            run(unet, EXAMPLE)
        ((_, out),) = seen
        assert len({tuple(row.tolist()) for row in out[0]}) == 144 - 57

    def test_merge_attn_off_leaves_self_attention_untouched_and_merges_the_rest(self, unet):
        block, plain = blocks_of(unet)[0], run(unet, EXAMPLE)
        with patched(unet, **REST_ALONE):
            assert "forward" not in vars(block.attn1)
            with calls_of(block) as (one, two, ff):
                out = run(unet, EXAMPLE)
        with attention_calls(block.attn1) as expected:
            run(unet, EXAMPLE)
        assert torch.equal(one[0][1], expected[0][1])
        assert two[0][0].shape[1] == ff[0][0].shape[1] == 144 - 57
        assert difference(out, plain) > CHANGED

    @pytest.mark.parametrize("switch", ["merge_crossattn", "merge_mlp"])
    def test_each_switch_merges_its_own_part(self, unet, switch):
        block = blocks_of(unet)[0]
        with patched(unet, **AGENTS_ALONE | {"ratio": 0.3, switch: True}):
            with calls_of(block) as (one, two, ff):
                run(unet, EXAMPLE)
            assert get_patch(unet).report()[0].plan.action == "agents"
        assert one[0][0].shape[1] == 144  # attn1 sees all tokens and merges by itself
        assert two[0][0].shape[1] == (101 if switch == "merge_crossattn" else 144)
        assert ff[0][0].shape[1] == (101 if switch == "merge_mlp" else 144)

    def test_merged_cross_attention_never_uses_agents(self, unet):
        """It equals the host's own cross-attention of the merged tokens, shortcut and all agents absent."""
        attn2 = blocks_of(unet)[0].attn2
        with patched(unet, **EVERYWHERE, k_shortcut=1.0):
            assert "forward" not in vars(attn2)
            with attention_calls(attn2) as seen:
                run(unet, EXAMPLE)
        ((x, out),) = seen
        # the hook that sees `out` runs after ours, so it is unmerged already
        with torch.no_grad():
            merged = attn2(x, context=EXAMPLE[2])
        assert x.shape[1] == 144 - 57
        assert out.shape[1] == 144
        rows = {tuple(row.tolist()) for row in merged[0]}
        assert {tuple(row.tolist()) for row in out[0]} == rows

    def test_grid_agents_need_no_sorting(self, flat):
        words = ("sort", "gather", "scatter", "topk", "index", "embedding")
        for h, w in [(12, 12), (11, 13)]:
            with patched(flat, **GRID), Recorder() as seen:
                run(flat, inputs(2, h, w))
            assert not [op for op in seen.ops if any(word in op for word in words)]
        with patched(flat, **SIMILARITY), Recorder() as seen:
            run(flat, EXAMPLE)
        assert [op for op in seen.ops if any(word in op for word in words)]  # so the recorder would have seen them

    @pytest.mark.parametrize(
        ("agent_ratio", "max_agents", "cell", "agents"),
        [
            (0.75, None, 2, 36),
            (0.95, None, 4, 9),
            (0.99, None, 8, 4),
            (0.75, 35, 4, 9),
            (0.9, 1, 16, 1),
        ],
    )
    def test_grid_cells_of_a_real_layer(self, flat, agent_ratio, max_agents, cell, agents):
        with patched(flat, ratio=0.0, agent_source="grid", agent_ratio=agent_ratio, max_agents=max_agents):
            with attention_steps() as calls:
                run(flat, EXAMPLE)
            plan = get_patch(flat).report()[0].plan
        assert (plan.cell, plan.agents) == ((cell, cell), agents)
        assert calls[0].queries == agents  # the aggregation of the first block

    @kinds({"grid": GRID, "similarity": SIMILARITY, "agents alone": AGENTS_ALONE, "pool": POOL})
    def test_two_sdpa_calls_and_no_large_matrix(self, flat, kw):
        """96 × 96 tokens of 32 channels: one N × n matrix would be larger than anything the U-Net itself makes."""
        example, N, n = inputs(1, 96, 96), 96 * 96, 24 * 24
        with patched(flat, **kw):
            for block in blocks_of(flat)[1:]:  # a first block tells it all, and is slow enough
                block.attn1.forward = lambda x, context=None, mask=None: x
            with Recorder() as seen, attention_steps() as calls:
                run(flat, example)
            plan = get_patch(flat).report()[0].plan
        assert seen.largest < N * n / 2
        if plan.action == "agents":
            assert plan.agents == n
            assert [(call.queries, call.keys) for call in calls] == [(n, plan.queries), (plan.queries, n)]
        else:
            assert [(call.queries, call.keys) for call in calls] == [(N, N // 4)]

    def test_attention_is_the_host_s_where_no_agents_are_used(self, unet):
        """xformers, SDPA, hypernetworks, LoRA and upcast live there."""
        seen = []
        cls = type(blocks_of(unet)[0].attn1)
        original = cls.forward

        def forward(self, x, context=None, mask=None):
            seen.append((x.shape[1], context is not None))
            return original(self, x, context, mask)

        cls.forward = forward
        try:
            with patched(unet, **SIMILARITY):
                run(unet, EXAMPLE)
            assert [n for n, cross in seen if cross] == [144, 36, 36, 36, 36, 144, 144]
            assert [n for n, cross in seen if not cross] == [36] * 4
            seen.clear()
            with patched(unet, **MERGING):
                run(unet, EXAMPLE)
            assert [n for n, cross in seen if not cross] == [87, 36, 36, 36, 36, 87, 87]
        finally:
            cls.forward = original


class _Step:
    def __init__(self, q, k, dtype):
        self.queries, self.keys, self.dtype = q, k, dtype


@contextmanager
def calls_of(block):
    """(input, output) of each call of attn1, attn2 and ff."""
    with attention_calls(block.attn1) as one, attention_calls(block.attn2) as two, attention_calls(block.ff) as ff:
        yield one, two, ff


@contextmanager
def attention_steps():
    """Collects what F.scaled_dot_product_attention is asked to do."""
    calls, original = [], F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        assert q.dtype == k.dtype == v.dtype
        calls.append(_Step(q.shape[-2], k.shape[-2], q.dtype))
        return original(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


class TestAnySize:
    @settings(max_examples=40)
    @given(
        B=st.integers(1, 3),
        h=st.integers(1, 20),
        w=st.integers(1, 20),
        kw=st.fixed_dictionaries(
            {
                "ratio": st.floats(0, 0.99),
                "agent_ratio": st.floats(0, 0.99),
                "sx": st.integers(1, 16),
                "sy": st.integers(1, 16),
                "k_scale2": st.floats(0, 2),
                "k_shortcut": st.floats(0, 1),
                "attn_precision": st.sampled_from([None, "fp32"]),
                "use_rand": st.booleans(),
                "merge_attn": st.booleans(),
                "merge_crossattn": st.booleans(),
                "merge_mlp": st.booleans(),
                "agent_source": st.sampled_from(["similarity", "grid"]),
                "method": st.sampled_from(["agent", "agent", "pool"]),
                "min_tokens": st.sampled_from([0, 0, 100]),
                "max_agents": st.none() | st.integers(1, 100),
                "seed": st.integers(0, 2**63 - 1),
                "stages": st.sampled_from([(), (), paper_stages(), early(0.3)]),
            }
        ),
    )
    def test_the_output_is_finite_and_removal_exact(self, B, h, w, kw):
        assume(h * w > 1)  # GroupNorm of the unpatched U-Net needs two values
        unet, example = FLAT, inputs(B, h, w)
        before, plain = tree(unet), run(unet, example)
        with patched(unet, **kw):
            out = run(unet, example)
            patch = get_patch(unet)
            assert not patch.notes
            assert patch.explain(h, w, done=0.5) == [(layer.name, layer.plan) for layer in patch.report()]
            plans = [plan for _, plan in patch.explain(h, w, done=0.5) if plan is not None]
            nothing = all(plan.action == "untouched" and not plan.r for plan in plans)
            assert torch.equal(out, run(unet, example))
        assert out.shape == plain.shape
        assert out.isfinite().all()
        assert not nothing or torch.equal(out, plain)
        assert tree(unet) == before
        assert torch.equal(run(unet, example), plain)


class TestReproducibility:
    @by_kind
    def test_two_runs_are_equal_to_the_bit_whatever_ran_before(self, unet, kw):
        out = patched_output(unet, EXAMPLE, **kw)
        torch.manual_seed(99)
        patched_output(unet, inputs(1, 12, 20, t=[3]), **EVERYWHERE)
        torch.rand(7)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            two = [patched_output(unet, EXAMPLE, **kw) for _ in range(2)]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(two[0], two[1])
        assert torch.equal(patched_output(unet, EXAMPLE, **kw), out)

    @by_kind
    def test_a_row_of_a_batch_is_the_image_made_alone(self, unet, kw):
        x, t, context = inputs(3, 12, 12, seed=5)
        together = patched_output(unet, (x, t, context), **kw)
        for k in range(3):
            row = slice(k, k + 1)
            alone = patched_output(unet, (x[row], t[row], context[row]), **kw)
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
        assert difference(together, run(unet, (x, t, context))) > CHANGED

    @kinds({"similarity": SIMILARITY, "everywhere": EVERYWHERE})
    def test_the_global_generators_are_not_touched(self, unet, kw):
        def states():
            return torch.get_rng_state(), random.getstate(), np.random.get_state()

        before = states()
        patched_output(unet, EXAMPLE, **kw)
        after = states()
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))

    def test_the_partition_depends_on_seed_and_timestep(self, unet):
        def out(seed=0, t=500, **kw):
            x, _, context = EXAMPLE
            plain = run(unet, (x, torch.tensor([t, t]), context))
            return patched_output(unet, (x, torch.tensor([t, t]), context), seed=seed, **kw) - plain

        assert difference(out(), out(seed=1)) > CHANGED
        assert difference(out(use_rand=False), out(use_rand=False, seed=1)) == 0
        assert difference(out(), out(use_rand=False)) > CHANGED
        partitions = []
        for t in (500, 501):
            with patched(unet) as model:
                run(model, (EXAMPLE[0], torch.tensor([t, t]), EXAMPLE[2]))
                partitions += [part.dst for part in get_patch(model).moment.partitions.values()]
        assert not torch.equal(*partitions)

    @pytest.mark.parametrize("make", [torch.tensor, lambda t: torch.tensor(t, dtype=torch.float16), lambda t: t[0]])
    def test_the_timestep_s_type_does_not_matter(self, unet, make):
        expected = patched_output(unet, EXAMPLE)
        unet.forward = lambda x, timesteps, context: type(unet).forward(unet, x, EXAMPLE[1], context)
        with patched(unet), torch.no_grad():
            assert torch.equal(unet(EXAMPLE[0], timesteps=make([500, 500]), context=EXAMPLE[2]), expected)


class TestStages:
    @staticmethod
    def done_at(unet, t):
        """(actions, difference to unpatched, notes) at the timesteps t."""
        example = (EXAMPLE[0], torch.as_tensor(t), EXAMPLE[2])
        out = run(unet, example)
        patch = get_patch(unet)
        stage, notes, calls = actions(patch), dict(patch.notes), [layer.calls for layer in patch.report()]
        patch.remove()
        plain = run(unet, example)
        apply_patch(unet, **{f: getattr(patch.config, f) for f in agentsd.config.SETTINGS})
        return stage[0], difference(out, plain), notes, calls

    @pytest.mark.parametrize(
        ("t", "action"),
        [
            ([601, 0], "agents"),
            ([600, 600], "merge"),
            ([0, 0], "merge"),
            ([1000, 3], "agents"),
        ],
    )
    def test_the_paper_s_schedule(self, unet, t, action):
        apply_patch(unet, stages=paper_stages())
        stage, changed, notes, _ = self.done_at(unet, t)
        assert stage == action
        assert changed > CHANGED
        assert not notes

    @pytest.mark.parametrize(("t", "action"), [([401, 9], "agents"), ([400, 400], "untouched")])
    def test_agents_early_and_untouched_late(self, unet, t, action):
        apply_patch(unet, stages=early(0.6), **GRID)
        stage, changed, notes, calls = self.done_at(unet, t)
        assert stage == action
        assert (changed > CHANGED) == (action == "agents")
        assert changed == 0 or action == "agents"
        assert not notes
        assert calls[0] == {action: 1}

    def test_a_stage_ends_exactly_where_it_says(self, flat):
        """The timestep at which `until` is reached belongs to what comes after, for every two-digit `until`."""
        for hundredths in range(1, 100):
            patch, end = agentsd.Patch(flat, AgentConfig(stages=early(hundredths / 100))), 1000 - 10 * hundredths
            for t, on in [(end, False), (end + 0.25, True)]:
                patch._begin(flat, EXAMPLE[:1], {"timesteps": torch.tensor([t], dtype=torch.float64)})
                assert (patch.moment.config is not None) == on, t

    @pytest.mark.parametrize("t", [[-1, -1], [1001, 1001], [float("nan")] * 2, [5, 1500]])
    def test_outside_the_diffusion_they_stand_down_and_say_so_once(self, unet, t, caplog):
        apply_patch(unet, stages=early(1.0))
        with caplog.at_level(logging.INFO, "agentsd"):
            example = (EXAMPLE[0], torch.tensor(t), EXAMPLE[2])
            run(unet, example)
            out = run(unet, example)
        patch = get_patch(unet)
        (note,) = patch.notes
        assert "0 to 1000" in note
        assert patch.notes[note] == 2
        assert len(caplog.records) == 1
        remove_patch(unet)
        assert torch.equal(out.nan_to_num(), run(unet, example).nan_to_num())

    def test_without_stages_any_timestep_is_fine(self, unet):
        apply_patch(unet)
        _, changed, notes, _ = self.done_at(unet, [-5, 2000])
        assert changed > CHANGED
        assert not notes

    def test_each_stage_merges_what_it_says(self, unet):
        stages = [Stage(0.5, {"merge_mlp": True}), Stage(1.0, {"merge_crossattn": True, "merge_attn": False})]
        block = blocks_of(unet)[0]
        with patched(unet, stages=stages):
            seen = []
            for t in (900, 100):
                with attention_calls(block.attn2) as two, attention_calls(block.ff) as ff:
                    run(unet, (EXAMPLE[0], torch.tensor([t, t]), EXAMPLE[2]))
                seen.append((two[0][0].shape[1], ff[0][0].shape[1], actions(get_patch(unet))[0]))
        assert seen == [(144, 87, "agents"), (87, 144, "untouched")]


def with_self_attention(unet, call):
    """Have each block call its self-attention by `call(attn1, x)`, as ControlNet does on the instance."""

    def forward(block, x, context=None):
        x = call(block.attn1, block.norm1(x)) + x
        x = block.attn2(block.norm2(x), context=context) + x
        return block.ff(block.norm3(x)) + x

    for block in blocks_of(unet):
        block._forward = partial(forward, block)


FOREIGN_CALLS = {
    "context": (lambda attn, x: attn(x, context=x.flip(1)), "context of its own"),
    "positional context": (lambda attn, x: attn(x, x.flip(1)), "context of its own"),
    "longer context": (lambda attn, x: attn(x, torch.cat([x, x * 2], 1)), "context of its own"),
    "mask": (lambda attn, x: attn(x, mask=torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 > 0), "mask"),
    "fewer tokens": (lambda attn, x: F.pad(attn(x[:, 1:]), (0, 0, 1, 0)), "where the layer has"),
    "more tokens": (lambda attn, x: attn(torch.cat([x, x], 1))[:, : x.shape[1]], "where the layer has"),
    "rows of a batch": (lambda attn, x: torch.cat([attn(x[:1]), attn(x[1:])]), "not what the block was given"),
    "all frames at once": (lambda attn, x: attn(x.reshape(1, -1, x.shape[2])).view_as(x), "where the layer has"),
}


class TestForeignCalls:
    """What another extension does to self-attention is delegated unchanged, and said once."""

    @pytest.mark.parametrize("name", FOREIGN_CALLS)
    def test_delegated_unchanged_and_said_once(self, unet, name, caplog):
        call, said = FOREIGN_CALLS[name]
        with_self_attention(unet, call)
        plain = run(unet, EXAMPLE)
        with patched(unet, **SIMILARITY), caplog.at_level(logging.INFO, "agentsd"):
            assert torch.equal(run(unet, EXAMPLE), plain)
            run(unet, EXAMPLE)
            notes = get_patch(unet).notes
        assert all(said in note for note in notes)
        assert set(notes.values()) <= {6, 12}
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(set(messages)) == len(notes) >= 1

    def test_grid_agents_serve_rows_of_a_batch_too(self, unet):
        expected = patched_output(unet, EXAMPLE, **GRID)
        with_self_attention(unet, FOREIGN_CALLS["rows of a batch"][0])
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **GRID), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "call", [lambda attn, x: attn(x, x), lambda attn, x: attn(context=x, x=x)], ids=["position", "name"]
    )
    @self_attention_kinds
    def test_the_same_tensor_as_context_is_self_attention(self, unet, call, kw):
        """Forge's attention patches and ControlNet pass it so."""
        expected = patched_output(unet, EXAMPLE, **kw)
        with_self_attention(unet, call)
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **kw), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("extra", [{"value": torch.ones(1)}, {"additional_tokens": torch.ones(1)}, {"frames": 2}])
    @agent_kinds
    def test_unknown_arguments_are_delegated(self, unet, extra, kw):
        cls = type(blocks_of(unet)[0].attn1)
        (name,) = extra

        class Extended(cls):
            """The real attention with the further parameters of sgm's and Forge's."""

            def forward(self, x, context=None, mask=None, value=None, additional_tokens=None, frames=0):
                given = [extra is not None and bool(extra) for extra in (value, additional_tokens, frames)]
                return super().forward(x, context, mask) * (1 + sum(given))

        for block in blocks_of(unet):
            block.attn1.__class__ = Extended
        with_self_attention(unet, lambda attn, x: attn(x, **extra))
        plain = run(unet, EXAMPLE)
        with patched(unet, **kw):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == [f"self-attention was given {name}"]
        with_self_attention(unet, lambda attn, x: attn(x, value=None, additional_tokens=None, frames=0))
        assert difference(patched_output(unet, EXAMPLE, **kw), run(unet, EXAMPLE)) > CHANGED

    @agent_kinds
    def test_disabled_self_attention_is_cross_attention(self, kw):
        unet = initialised(
            attention_resolutions=[1], channel_mult=[1], disable_self_attentions=[True], disable_middle_self_attn=True
        )
        plain = run(unet, EXAMPLE)
        with patched(unet, **kw):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == ["self-attention was given a context of its own"]

    def test_an_error_of_ours_costs_the_speed_and_not_the_image(self, unet, monkeypatch, caplog):
        def fail(*args, **kwargs):
            raise RuntimeError("no such kernel")

        plain = run(unet, EXAMPLE)
        monkeypatch.setattr("agentsd.patch.agent_attention", fail)
        with patched(unet), caplog.at_level(logging.INFO, "agentsd"):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == ["an error of ours: RuntimeError: no such kernel"]
        monkeypatch.undo()
        monkeypatch.setattr("agentsd.patch.match", fail)
        with patched(unet, **EVERYWHERE):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert get_patch(unet).notes

    def test_self_attention_answered_by_somebody_else_is_said(self, unet):
        with_self_attention(unet, lambda attn, x: attn.to_out(attn.to_v(x)))
        with patched(unet):
            run(unet, EXAMPLE)
            assert len(get_patch(unet).notes) == 1


class TestOtherWrappers:
    @staticmethod
    def wrap(attn, seen):
        original = attn.forward

        def wrapper(x, *args, **kwargs):
            seen.append(x.shape[1])
            return original(x, *args, **kwargs)

        attn.forward = wrapper
        return wrapper

    @self_attention_kinds
    def test_one_installed_before_ours_is_there_afterwards(self, unet, kw):
        attn, seen = blocks_of(unet)[0].attn1, []
        wrapper = self.wrap(attn, seen)
        with undisturbed(unet) as plain, patched(unet, **kw):
            assert difference(run(unet, EXAMPLE), plain) > CHANGED
        assert vars(attn)["forward"] is wrapper
        seen.clear()
        run(unet, EXAMPLE)
        assert seen == [144]

    def test_one_installed_before_ours_gets_what_is_not_ours(self, unet):
        attn, seen = blocks_of(unet)[1].attn1, []
        self.wrap(attn, seen)
        with patched(unet):
            run(unet, EXAMPLE)
        assert seen == [36]

    @self_attention_kinds
    def test_one_installed_after_ours_stays_and_no_longer_meets_us(self, unet, kw):
        attn, seen, plain = blocks_of(unet)[0].attn1, [], run(unet, EXAMPLE)
        apply_patch(unet, **kw)
        wrapper = self.wrap(attn, seen)
        assert difference(run(unet, EXAMPLE), plain) > CHANGED
        remove_patch(unet)
        assert vars(attn)["forward"] is wrapper
        seen.clear()
        assert torch.equal(run(unet, EXAMPLE), plain)
        assert seen == [144]
        # a new patch on top, and again
        expected = None
        for _ in range(3):
            out = patched_output(unet, EXAMPLE, **kw)
            assert difference(out, plain) > CHANGED
            assert expected is None or torch.equal(out, expected)
            expected = out
            assert vars(attn)["forward"] is wrapper
            assert torch.equal(run(unet, EXAMPLE), plain)

    @self_attention_kinds
    def test_a_wrapper_of_a_projection_sees_all_tokens(self, unet, kw):
        """ControlNet LLLite adds conditioning of the full length there."""
        expected = patched_output(unet, EXAMPLE, **kw)
        attn, seen = blocks_of(unet)[0].attn1, []
        for name in ("to_q", "to_k", "to_v"):
            self.wrap(getattr(attn, name), seen)
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **kw), expected, rtol=0, atol=1e-4)
        assert seen == [144] * 3

    def test_a_module_in_place_of_a_projection_is_used(self, unet):
        """LoRA by peft puts modules there; ours never reads raw weights."""

        class Doubled(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return self.base(x) * 2

        before = patched_output(unet, EXAMPLE, **GRID)
        with torch.no_grad():
            for block in blocks_of(unet):
                block.attn1.to_q.weight.mul_(2)
        expected = patched_output(unet, EXAMPLE, **GRID)
        with torch.no_grad():
            for block in blocks_of(unet):
                block.attn1.to_q.weight.div_(2)
                block.attn1.to_q = Doubled(block.attn1.to_q)
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **GRID), expected, rtol=0, atol=1e-5)
        assert difference(before, expected) > CHANGED

    @kinds({"grid": GRID, "similarity": SIMILARITY, "pool": POOL})
    def test_kv_context(self, unet, kw):
        """Keys and values from a context of the host's making: the same as other projections."""
        patch_unet(unet, AgentConfig(**kw), kv_context=lambda attn, x: (x * 0.5, x * 2))
        out = run(unet, EXAMPLE)
        assert not get_patch(unet).notes
        remove_patch(unet)
        base = patched_output(unet, EXAMPLE, **kw)
        with torch.no_grad():
            for block in blocks_of(unet):
                if block.attn1.to_q.in_features == 32:  # level 0
                    block.attn1.to_k.weight.mul_(0.5)
                    block.attn1.to_v.weight.mul_(2)
        torch.testing.assert_close(out, patched_output(unet, EXAMPLE, **kw), rtol=0, atol=1e-5)
        assert difference(out, base) > CHANGED


TOME = {"ratio": 0.5, "use_rand": False}


class TestTomesd:
    def model(self, unet):
        """tomesd takes a module as the model."""
        model = nn.Module()
        model.model = nn.Module()
        model.model.diffusion_model = unet
        return model

    def test_ours_first_removed_last(self, unet):
        model, plain = self.model(unet), run(unet, EXAMPLE)
        tome = self.with_tome(model)
        before = tree(unet)
        agents = patched_output(unet, EXAMPLE, **GRID)
        apply_patch(model, **GRID)
        tomesd.apply_patch(model, **TOME)
        # its tokens are no grid any more: ours stands down, and says so
        assert torch.equal(run(unet, EXAMPLE), tome)
        assert len(get_patch(unet).notes) == 1
        tomesd.remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), agents)
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), plain)
        assert {name: cls for name, (cls, _) in tree(unet).items()} == {name: cls for name, (cls, _) in before.items()}

    def with_tome(self, model):
        unet = model.model.diffusion_model
        tomesd.apply_patch(model, **TOME)
        out = run(unet, EXAMPLE)
        tomesd.remove_patch(model)
        assert difference(out, run(unet, EXAMPLE)) > CHANGED
        return out

    @pytest.mark.parametrize("tome_first", [True, False])
    def test_ours_removed_first_leaves_tomesd_s(self, unet, tome_first):
        model = self.model(unet)
        tome = self.with_tome(model)
        for step in [0, 1] if tome_first else [1, 0]:
            if step == 0:
                tomesd.apply_patch(model, **TOME)
            else:
                apply_patch(model, **SIMILARITY)
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), tome)
        tomesd.remove_patch(model)

    def test_tomesd_s_removed_first_leaves_ours(self, unet):
        model, plain = self.model(unet), run(unet, EXAMPLE)
        agents = patched_output(unet, EXAMPLE, **SIMILARITY)
        tomesd.apply_patch(model, **TOME)
        apply_patch(model, **SIMILARITY)
        tomesd.remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), agents)
        assert get_patch(model).active
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), plain)


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _host_precision(self, monkeypatch):
        # LDM's own attention mixes its float32 scores with half-precision values otherwise, and fails
        monkeypatch.setattr("ldm.modules.attention._ATTN_PRECISION", "fp16")

    @staticmethod
    def halve(unet, dtype):
        """Transformers with weights in `dtype`, between convolutions in float32."""

        def to_half(module, args, kwargs):
            return tuple(a.to(dtype) for a in args), {k: v.to(dtype) for k, v in kwargs.items()}

        for module in transformers_of(unet):
            module.to(dtype)
            module.register_forward_pre_hook(to_half, with_kwargs=True)
            module.register_forward_hook(lambda module, args, out: out.float())

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("precision", [None, "fp32"])
    @kinds({"grid": GRID, "similarity": SIMILARITY, "merging": MERGING, "pool": POOL})
    def test_half_weights_without_autocast(self, unet, dtype, precision, kw):
        expected, plain = patched_output(unet, EXAMPLE, **kw), run(unet, EXAMPLE)
        self.halve(unet, dtype)
        with attention_steps() as calls:
            out = patched_output(unet, EXAMPLE, attn_precision=precision, **kw)
        assert {call.dtype for call in calls} <= {torch.float32 if precision else dtype}
        assert bool(calls) == (kw is not MERGING)
        # half-precision rounding may pair some tokens otherwise; most of the picture must agree
        assert (out - expected).square().mean().sqrt() < 0.3 * (plain - expected).square().mean().sqrt()

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("precision", [None, "fp32"])
    @pytest.mark.parametrize("halved", [True, False])
    @agent_kinds
    def test_under_autocast(self, unet, dtype, precision, halved, kw):
        expected, plain = patched_output(unet, EXAMPLE, **kw), run(unet, EXAMPLE)
        if halved:
            self.halve(unet, dtype)
        with torch.autocast("cpu", dtype=dtype), attention_steps() as calls:
            out = patched_output(unet, EXAMPLE, attn_precision=precision, **kw)
        assert {call.dtype for call in calls} <= {torch.float32 if precision else dtype}
        assert calls
        assert (out - expected).square().mean().sqrt() < 0.3 * (plain - expected).square().mean().sqrt()

    @agent_kinds
    @pytest.mark.parametrize("dtype", HALVES[1:])
    def test_fp32_where_float16_would_overflow(self, unet, kw, dtype):
        with torch.no_grad():
            for block in (blocks_of(unet)[0], *blocks_of(unet)[5:]):  # level 0, where attention is ours
                block.attn1.to_q.weight.mul_(300)
                block.attn1.to_k.weight.mul_(300)
        self.halve(unet, dtype)
        attn = blocks_of(unet)[0].attn1
        with attention_calls(attn) as seen:
            out = patched_output(unet, EXAMPLE, attn_precision="fp32", **kw)
        assert (attn.to_q(seen[0][0]) @ attn.to_k(seen[0][0]).mT).isinf().any()
        assert out.isfinite().all()

    def test_fp32_on_a_device_without_autocast(self, unet, monkeypatch):
        """torch.autocast raises for device types that it doesn't know, such as MPS before PyTorch 2.5."""
        expected = patched_output(unet, EXAMPLE, attn_precision="fp32", **GRID)

        def unknown(device_type, *args, **kwargs):
            raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")

        monkeypatch.setattr(torch, "autocast", unknown)
        assert torch.equal(patched_output(unet, EXAMPLE, attn_precision="fp32", **GRID), expected)


class TestTraining:
    @by_kind
    def test_every_weight_gets_a_gradient(self, unet, kw):
        with patched(unet, **kw):
            unet(*EXAMPLE).square().mean().backward()
            assert not get_patch(unet).notes
        for name, p in unet.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
        assert all(block.attn1.to_q.weight.grad.abs().max() > 0 for block in blocks_of(unet))

    @agent_kinds
    def test_gradients_equal_the_oracle_s(self, flat, kw):
        def gradients():
            flat.zero_grad()
            flat(*EXAMPLE).square().mean().backward()
            return {name: p.grad.clone() for name, p in flat.named_parameters()}

        with patched(flat, use_rand=False, **kw):
            ours = gradients()
        settings = {"grid": 4 if kw is GRID else None, "ratio": kw["ratio"], "agent_ratio": kw["agent_ratio"]}
        with oracle.answering(flat, oracle.Oracle(**settings), (12, 12)):
            theirs = gradients()
        for name, grad in ours.items():
            torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5)

    @self_attention_kinds
    def test_gradient_checkpointing_changes_no_gradient(self, unet, kw):
        def gradients():
            unet.zero_grad()
            unet(*EXAMPLE).square().mean().backward()
            return {name: p.grad.clone() for name, p in unet.named_parameters()}

        with patched(unet, **kw):
            expected = gradients()
        for block in blocks_of(unet):
            block.checkpoint = True
        with patched(unet, **kw):
            for name, grad in gradients().items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


class TestLifetime:
    @kinds({"similarity": SIMILARITY, "everywhere": EVERYWHERE})
    def test_a_dropped_model_is_freed_with_its_patch(self, kw):
        unet = flat_unet()
        patch_unet(unet, AgentConfig(**kw), kv_context=lambda attn, x, unet=unet: (x, x))
        run(unet, EXAMPLE)
        alive = [weakref.ref(unet), weakref.ref(blocks_of(unet)[0]), weakref.ref(get_patch(unet))]
        del unet
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3

    def test_a_removed_patch_keeps_no_model_alive(self):
        unet = flat_unet()
        apply_patch(unet)
        run(unet, EXAMPLE)
        patch, alive = get_patch(unet), weakref.ref(unet)
        remove_patch(unet)
        del unet
        gc.collect()
        assert alive() is None
        patch.remove()
        patch.install()
        assert not patch.active

    def test_no_tokens_are_kept_after_a_call(self, unet):
        refs = []
        blocks_of(unet)[0].attn1.register_forward_pre_hook(lambda m, args: refs.append(weakref.ref(args[0])))
        with patched(unet, **EVERYWHERE):
            run(unet, EXAMPLE)
            gc.collect()
            assert refs
            assert all(ref() is None for ref in refs)

    def test_a_deep_copy_has_a_patch_of_its_own(self, unet):
        apply_patch(unet, **SIMILARITY)
        out = run(unet, EXAMPLE)
        twin = copy.deepcopy(unet)
        with torch.no_grad():
            for p in unet.parameters():
                p.zero_()
        assert torch.equal(run(twin, EXAMPLE), out)
        remove_patch(unet)
        assert torch.equal(run(twin, EXAMPLE), out)
        remove_patch(twin)
        assert get_patch(twin) is None
        assert tree(twin).keys() == tree(unet).keys()
        assert "forward" not in vars(blocks_of(twin)[0].attn1)
        assert difference(run(twin, EXAMPLE), out) > CHANGED

    def test_the_weights_of_a_patched_model_can_be_saved(self, unet):
        file = io.BytesIO()
        with patched(unet):
            torch.save(unet.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True).keys() == unet.state_dict().keys()

    def test_two_models_have_patches_of_their_own(self, unet):
        other = golden_unet()
        apply_patch(unet, **GRID)
        apply_patch(other, **SIMILARITY)
        remove_patch(unet)
        assert get_patch(other).active
        assert difference(run(other, EXAMPLE), run(unet, EXAMPLE)) > CHANGED


class TestModels:
    def test_apply_returns_the_model(self, unet):
        for model in (as_model(unet), as_model(unet).model, unet):
            assert apply_patch(model) is model
            assert get_patch(unet) is get_patch(model)

    def test_an_ldm_model_that_is_a_module(self, unet):
        model = nn.Module()
        model.model = nn.Module()
        model.model.diffusion_model = unet
        model.first_stage_model = nn.Conv2d(3, 3, 1)
        with undisturbed(unet):
            apply_patch(model)
            remove_patch(model)
