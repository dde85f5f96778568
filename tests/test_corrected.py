"""Corrected agents: attention to a sample of the keys, whose values are fitted to full attention at the sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, Recorder, actions, blocks_of, flat_unet, golden_unet, inputs, run
from hypothesis import given
from hypothesis import strategies as st
from test_fit import CoarseProducts

from agentsd import AgentConfig, early, get_patch, patch_unet, patched, plan_layer
from agentsd.attention.fit import MU, fit_values
from agentsd.attention.tensors import join_heads, sample_each, sample_tokens, split_heads
from agentsd.methods.corrected import MOST, corrected_attention
from benchmarks.attentions import KINDS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CORRECTED = {"method": "corrected", "agent_ratio": 0.75, "ratio": 0.0}
HEADS, CHANNELS = 2, 16


def tokens(height: int, width: int, batch: int = 2, sharpness: float = 1.0, seed: int = 0):
    """Queries, keys and values (B, N, C) that are smooth over the grid, as those of images are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3 * batch, CHANNELS, 4, 4, generator=generator)
    fine = torch.randn(3 * batch, CHANNELS, height, width, generator=generator)
    x = F.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * fine
    q, k, v = x.flatten(2).transpose(1, 2).chunk(3)
    return q * sharpness, k * sharpness, v


def parts(height: int, width: int, cell: tuple[int, int], **kwargs):
    """The arguments of `corrected_attention`, split into heads."""
    q, k, v = tokens(height, width, **kwargs)
    few = [sample_tokens(x, height, width, cell) for x in (q, k, v)]
    return [split_heads(x, HEADS) for x in (q, k, v, *few)]


def full(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v)


def deviation(out, expected):
    return float((out - expected).norm() / expected.norm())


class TestFormula:
    def test_with_a_heavy_penalty_it_is_attention_to_the_few_keys_and_values(self):
        q, k, v, a, k_bar, v_bar = parts(16, 16, (4, 4))
        out = corrected_attention(q, k, v, a, k_bar, v_bar, mu=1e9)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k_bar, v_bar), **CLOSE)

    @pytest.mark.parametrize("mu", [MU, 1.0])
    def test_with_cells_of_one_token_it_is_full_attention(self, mu):
        given = parts(8, 6, (1, 1))
        torch.testing.assert_close(corrected_attention(*given, mu=mu), full(*given), **CLOSE)

    def test_it_converges_to_the_nystrom_approximation(self):
        """σ(Q K̄ᵀ) W⁻¹ σ(A Kᵀ) V, where W is far from singular: each agent looks at a key of its own."""
        generator = torch.Generator().manual_seed(1)
        k_bar = 4 * torch.eye(8)[None, None] + 0.1 * torch.randn(1, 1, 8, 8, generator=generator)
        q, k, v = (torch.randn(1, 1, 40, 8, generator=generator) for _ in range(3))
        v_bar = torch.zeros(1, 1, 8, 8)
        w = (k_bar @ k_bar.mT / 8**0.5).softmax(-1)
        assert torch.linalg.cond(w) < 20
        nystrom = (q @ k_bar.mT / 8**0.5).softmax(-1) @ torch.linalg.solve(w, full(k_bar, k, v))
        out = corrected_attention(q, k, v, k_bar, k_bar, v_bar, mu=1e-6)
        torch.testing.assert_close(out, nystrom, rtol=1e-3, atol=1e-4)

    def test_the_fit_brings_it_closer_to_full_attention(self):
        given = parts(32, 32, (4, 4), sharpness=2.0)
        errors = [deviation(corrected_attention(*given, mu=mu), full(*given)) for mu in (1e9, 1.0, MU)]
        assert errors[2] < errors[1] < errors[0]
        assert errors[2] < errors[0] / 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_close_to_single(self, dtype):
        given = parts(16, 16, (4, 4), sharpness=2.0)
        expected = corrected_attention(*given)
        out = corrected_attention(*(x.to(dtype) for x in given))
        assert out.dtype == dtype
        assert deviation(out.float(), expected) < 0.02

    def test_autocast_leaves_the_fit_in_single_precision(self):
        given = [x.bfloat16() for x in parts(16, 16, (4, 4))]
        expected = corrected_attention(*given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(corrected_attention(*given), expected)

    def test_gradients_reach_every_input(self):
        given = [x.requires_grad_() for x in (y.clone() for y in parts(8, 8, (4, 4)))]
        corrected_attention(*given).square().sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in given)


def by_steps(q, k, v, a, k_bar, v_bar):
    """The same, its values fitted by three conjugate steps."""
    v_a = full(a, k, v)
    w = (a.float() @ k_bar.float().mT * a.shape[-1] ** -0.5).softmax(-1)
    return F.scaled_dot_product_attention(q, k_bar, fit_values(w, v_a.float(), v_bar.float(), 3).to(v.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
class TestCloserThanConjugateSteps:
    """On attention of many kinds, the embedded model's among them."""

    def errors(self, kind, dtype):
        size = (32, 32)
        at = KINDS[kind](8, 40, size, torch.Generator().manual_seed(0))
        tokens = [join_heads(x).to(dtype) for x in (at.q, at.k, at.v)]
        given = [split_heads(x, 8) for x in (*tokens, *sample_each(tokens, size, (4, 4)))]
        expected = full(*(x.float() for x in given))
        for step in (corrected_attention, by_steps):
            yield ((step(*given).float() - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))).median()

    def test_at_this_precision(self, kind, dtype):
        ours, steps = self.errors(kind, dtype)
        assert ours <= steps

    def test_with_products_rounded_to_tf32(self, kind, dtype):
        with CoarseProducts():
            ours, steps = self.errors(kind, dtype)
        assert ours <= steps


class TestFallback:
    def crafted(self, angle: float):
        """Two agents told apart by the keys, but by the pooled keys only as far as `angle` says."""
        a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        k, v = 50 * a, a.clone()
        return [x[None] for x in (a, k, v, a, angle * a, torch.tensor([[0.25, 0.5], [0.25, 0.5]]))]

    @pytest.mark.parametrize("angle", [1.0, 0.1, 0.01, 1e-4])
    def test_a_fit_that_would_run_away_is_held(self, angle):
        """An exact fit needs values that grow as 1 / angle."""
        given = self.crafted(angle)
        assert corrected_attention(*[x[None] for x in given]).abs().max() <= 4 * given[2].abs().max()

    def test_a_row_that_is_not_finite_does_not_touch_the_others(self):
        given = parts(8, 8, (4, 4))
        expected = corrected_attention(*given)
        given[2] = given[2].clone()
        given[2][0, 0, 5] = torch.inf
        out = corrected_attention(*given)
        torch.testing.assert_close(out[1], expected[1])
        torch.testing.assert_close(out[0, 1], expected[0, 1])
        assert out.isfinite().all()  # token 5 is not of the sample

    @given(seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.01, 0.3, 1.0, 3.0, 10.0, 100.0]))
    def test_nothing_grows_out_of_proportion(self, seed, sharpness):
        given = parts(12, 12, (4, 4), sharpness=sharpness, seed=seed)
        out = corrected_attention(*given)
        assert out.isfinite().all()
        assert out.abs().max() <= 16 * given[2].abs().max()


class TestPlan:
    def test_as_many_keys_as_grid_agents(self):
        config = AgentConfig(method="corrected", agent_ratio=1 - 1 / 16, ratio=0.4)
        plan = plan_layer(config, 64, 96, 1)
        assert (plan.action, plan.queries, plan.agents, plan.cell) == ("corrected", 6144, 384, (4, 4))

    @pytest.mark.parametrize("size", [(9, 13), (10, 14), (5, 64), (64, 67), (2, 80)])
    def test_the_plan_counts_what_is_sampled(self, size):
        plan = plan_layer(AgentConfig(method="corrected", agent_ratio=1 - 1 / 16), *size, 1)
        assert plan.agents == sample_tokens(torch.zeros(1, size[0] * size[1], 1), *size, plan.cell).shape[1]

    def test_max_agents_makes_the_cells_larger(self):
        plan = plan_layer(AgentConfig(method="corrected", max_agents=256), 128, 128, 1)
        assert (plan.agents, plan.cell) == (256, (8, 8))

    def test_there_are_at_most_so_many_unless_asked_for(self):
        for size, n, cell in [((128, 128), 512, (4, 8)), ((192, 192), 576, (8, 8)), ((160, 256), 640, (8, 8))]:
            plan = plan_layer(AgentConfig(method="corrected"), *size, 1)
            assert (plan.agents, plan.cell) == (n, cell)
            assert plan.agents <= MOST
        assert plan_layer(AgentConfig(method="corrected", max_agents=5000), 192, 192, 1).agents == 48 * 48

    @pytest.mark.parametrize(("size", "side"), [((64, 64), 8), ((32, 32), 4), ((16, 16), 2), ((12, 12), 2)])
    def test_cells_are_smaller_where_there_would_be_too_few_agents(self, size, side):
        plan = plan_layer(AgentConfig(method="corrected", agent_ratio=0.98), *size, 1)
        assert (plan.action, plan.cell) == ("corrected", (side, side))
        assert plan.agents >= 32

    def test_too_small_a_layer_is_left_untouched(self):
        plan = plan_layer(AgentConfig(method="corrected", agent_ratio=0.98), 7, 8, 1)
        assert plan.action == "untouched"

    def test_a_limit_below_that_leaves_the_layer_untouched(self):
        plan = plan_layer(AgentConfig(method="corrected", max_agents=16), 64, 64, 1)
        assert (plan.action, plan.reason) == ("untouched", "at most 16 agents would be too few to correct")
        assert plan.remedy == ("max_agents",)

    def test_too_many_agents_leave_the_layer_untouched(self):
        plan = plan_layer(AgentConfig(method="corrected", agent_ratio=0.0), 8, 8, 1)
        said = "64 agents are too many for 64 queries (fewer than half are needed)"
        assert (plan.action, plan.reason) == ("untouched", said)
        assert plan.remedy == ("agent_ratio",)


class TestPatch:
    @pytest.mark.parametrize("size", [(16, 16), (10, 13)])
    def test_it_computes_the_equation(self, size):
        unet = flat_unet()
        attn, seen = blocks_of(unet)[0].attn1, {}

        handle = blocks_of(unet)[0].norm1.register_forward_hook(lambda _m, _a, out: seen.update(x=out))
        handle_out = attn.to_out.register_forward_hook(lambda _m, args, _o: seen.update(out=args[0]))
        with patched(unet, **CORRECTED):
            run(unet, inputs(2, *size))
        handle.remove()
        handle_out.remove()
        q, k, v = (to(seen["x"]) for to in (attn.to_q, attn.to_k, attn.to_v))
        few = [sample_tokens(x, *size, (2, 2)) for x in (q, k, v)]
        expected = corrected_attention(*(split_heads(x, attn.heads) for x in (q, k, v, *few)))
        torch.testing.assert_close(seen["out"], join_heads(expected), **CLOSE)

    def test_it_is_used_and_closer_than_pooling_and_plain_agents(self):
        unet, given = golden_unet(), inputs()
        expected = run(unet, given)
        outs = {}
        for name, settings in {
            "corrected": CORRECTED,
            "pool": {**CORRECTED, "method": "pool", "sx": 2, "sy": 2, "k_shortcut": 0.0},
            "agent": {**CORRECTED, "method": "agent", "agent_source": "grid"},
        }.items():
            patch = patch_unet(unet, AgentConfig(**settings))
            outs[name] = deviation(run(unet, given), expected)
            assert not patch.notes
            assert {"corrected": "corrected", "pool": "pool", "agent": "agents"}[name] in actions(patch)
            patch.remove()
        assert outs["corrected"] < outs["pool"] < outs["agent"]
        assert torch.equal(run(unet, given), expected)

    @given(height=st.integers(2, 13), width=st.integers(2, 13), batch=st.integers(1, 3))
    def test_any_grid(self, height, width, batch):
        unet = FLAT
        with patched(unet, **CORRECTED):
            out = run(unet, inputs(batch, height, width))
            patch = get_patch(unet)
            expected = plan_layer(patch.config, height, width, 1).action
            assert set(actions(patch)) == {expected}
            assert not patch.notes
        assert out.isfinite().all()

    def test_a_row_s_result_does_not_depend_on_the_others(self):
        unet, (x, t, context) = golden_unet(), inputs(batch=3)
        with patched(unet, **CORRECTED):
            together = run(unet, (x, t, context))
            alone = run(unet, (x[1:2], t[1:2], context[1:2]))
        torch.testing.assert_close(together[1:2], alone, **CLOSE)

    def test_no_matrix_of_tokens_by_tokens(self):
        unet = flat_unet()
        with patched(unet, **{**CORRECTED, "agent_ratio": 1 - 1 / 64}), Recorder() as seen:
            run(unet, inputs(1, 48, 48))
        assert not [shape for shape in seen.shapes if len(shape) > 1 and shape[-2] == shape[-1] == 48 * 48]

    def test_merging_of_the_feed_forward_layer_goes_on(self):
        unet, given = golden_unet(), inputs()
        with patched(unet, **{**CORRECTED, "ratio": 0.5, "merge_mlp": True, "sx": 2, "sy": 2}):
            seen = []
            handle = blocks_of(unet)[0].ff.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
            run(unet, given)
            handle.remove()
            assert "corrected" in actions(get_patch(unet))
        assert seen == [128]

    def test_stages(self):
        unet, x = golden_unet(), inputs(t=[900, 900])
        late = (x[0], torch.tensor([100, 100]), x[2])
        config = AgentConfig(**CORRECTED, stages=early(0.5))
        expected = run(unet, late)
        patch = patch_unet(unet, config)
        assert "corrected" in (run(unet, x), actions(patch))[1]
        assert torch.equal(run(unet, late), expected)
        patch.remove()


FLAT = flat_unet()
