"""Local attention: full attention to what is near, and to fitted landmarks for the rest."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, Kernels, Recorder, actions, blocks_of, flat_unet, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import CoarseProducts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agentsd import AgentConfig, get_patch, patched, plan_layer
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.methods import method_of
from agentsd.methods.local import HALO, MOST, MU, WINDOW, local_attention

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LOCAL = {"method": "local", "agent_ratio": 1 - 1 / 16, "ratio": 0.0}
HEADS, CHANNELS = 2, 16


def smooth(height: int, width: int, batch: int = 2, sharpness: float = 1.0, seed: int = 0):
    """Queries, keys and values (B, H, N, d) that are smooth over the grid, as those of images are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3 * batch, CHANNELS, 4, 4, generator=generator)
    fine = torch.randn(3 * batch, CHANNELS, height, width, generator=generator)
    x = F.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * fine
    q, k, v = (split_heads(t.contiguous(), HEADS) for t in x.flatten(2).transpose(1, 2).chunk(3))
    return q * sharpness, k * sharpness, v


def near_by(height: int, width: int, batch: int = 2, sigma: float = 2.0, **kwargs):
    """The same with scores that fall off as exp(−r² / 2σ²): three further channels, which say where a token is."""
    q, k, v = smooth(height, width, batch, **kwargs)
    d = q.shape[-1] + 3
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    at = torch.stack([y.flatten(), x.flatten()], dim=-1)
    strength = d**0.5 / sigma**2
    wanted = strength * torch.cat([at, torch.ones(height * width, 1)], dim=-1)
    offered = torch.cat([at, -at.square().sum(-1, keepdim=True) / 2], dim=-1)
    more = [t.expand(batch, HEADS, -1, -1) for t in (wanted, offered, torch.zeros(height * width, 3))]
    return tuple(torch.cat(pair, dim=-1) for pair in zip((q, k, v), more, strict=True))


def full(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def deviation(out, expected):
    out, expected = out.detach().double(), expected.detach().double()
    return float((out - expected).norm() / expected.norm())


def windows_of(length: int, cell: int, window: int, halo: int) -> list[tuple[range, range, list[int]]]:
    """(queries, near keys, agents) of each window along one axis."""
    count = math.ceil(length / window)
    side = math.ceil(length / count)
    near = min(length, side + 2 * halo)
    sample = list(range((min(cell, length) - 1) // 2, length, cell))
    found = []
    for begin in range(0, count * side, side):
        start = min(max(begin - halo, 0), length - near)
        later = [i for i, at in enumerate(sample) if at >= begin] or [len(sample) - 1]
        agents = [sample[min(later[0] + i, len(sample) - 1)] for i in range(math.ceil(side / cell))]
        found.append((range(begin, min(begin + side, length)), range(start, start + near), agents))
    return found


def reference(q, k, v, size, cell, window=WINDOW, halo=HALO, mu=MU):
    """The equations as they are written, with a matrix of all tokens by all tokens and landmarks, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    (height, width), N = size, q.shape[2]
    ys, xs = (list(range((min(c, length) - 1) // 2, length, c)) for length, c in zip(size, cell, strict=True))
    landmarks = [y * width + x for y in ys for x in xs]
    number, n = {at: j for j, at in enumerate(landmarks)}, len(landmarks)
    owner = [
        min(y // cell[0], len(ys) - 1) * len(xs) + min(x // cell[1], len(xs) - 1)
        for y in range(height)
        for x in range(width)
    ]
    bias, agents, agents_bias = torch.full((N, N + n), -torch.inf, dtype=torch.float64), [], []
    for rows, near_rows, agent_rows in windows_of(height, cell[0], window, halo):
        for columns, near_columns, agent_columns in windows_of(width, cell[1], window, halo):
            near = [y * width + x for y in near_rows for x in near_columns]
            outside = torch.zeros(n, dtype=torch.float64)
            for token in set(range(N)) - set(near):
                outside[owner[token]] += 1
            line = torch.full((N + n,), -torch.inf, dtype=torch.float64)
            line[near] = 0
            line[N:] = outside.log()
            bias[[y * width + x for y in rows for x in columns]] = line
            agents += [y * width + x for y in agent_rows for x in agent_columns]
            agents_bias += [line] * (len(agent_rows) * len(agent_columns))
    assert set(agents) == set(number)
    keys, scale = torch.cat([k, k[:, :, landmarks]], dim=2), q.shape[-1] ** -0.5
    v_bar = v[:, :, landmarks]
    w = (scale * q[:, :, agents] @ keys.mT + torch.stack(agents_bias)).softmax(-1)
    error = w @ torch.cat([v, v_bar], dim=2) - (scale * q[:, :, agents] @ k.mT).softmax(-1) @ v
    far = w[..., N:]
    penalty = mu * w.square().sum((-2, -1))[..., None, None] / n * torch.eye(n, dtype=torch.float64)
    delta = torch.linalg.solve(far.mT @ far + penalty, far.mT @ error)
    return (scale * q @ keys.mT + bias).softmax(-1) @ torch.cat([v, v_bar - delta], dim=2)


class TestFormula:
    @pytest.mark.parametrize(
        ("size", "cell", "window", "halo"),
        [
            ((32, 32), (4, 4), 16, 4),
            ((32, 32), (4, 4), 8, 8),
            ((33, 18), (4, 4), 16, 4),
            ((17, 40), (2, 2), 16, 0),
            ((19, 23), (4, 2), 6, 3),
            ((5, 64), (4, 4), 16, 4),
            ((1, 50), (4, 4), 16, 4),
            ((34, 9), (8, 8), 4, 1),
        ],
    )
    @pytest.mark.parametrize("make", [smooth, near_by])
    def test_equals_the_dense_reference(self, size, cell, window, halo, make):
        qkv = make(*size, sharpness=2.0)
        out = local_attention(*qkv, size=size, cell=cell, window=window, halo=halo)
        expected = reference(*qkv, size, cell, window, halo)
        assert deviation(out, expected) < 1e-4

    @settings(max_examples=25)
    @given(
        height=st.integers(1, 26),
        width=st.integers(1, 26),
        side=st.sampled_from([1, 2, 4, 8]),
        window=st.integers(2, 16),
        halo=st.integers(0, 5),
        batch=st.integers(1, 3),
    )
    def test_equals_it_on_any_grid(self, height, width, side, window, halo, batch):
        size, cell = (height, width), (side, side)
        qkv = smooth(*size, batch=batch)
        out = local_attention(*qkv, size=size, cell=cell, window=window, halo=halo)
        assert deviation(out, reference(*qkv, size, cell, window, halo)) < 1e-4

    @pytest.mark.parametrize("size", [(16, 16), (9, 14), (1, 12)])
    def test_one_window_is_full_attention(self, size):
        qkv = smooth(*size, sharpness=4.0)
        torch.testing.assert_close(local_attention(*qkv, size=size, cell=(4, 4)), full(*qkv), **CLOSE)

    @pytest.mark.parametrize("size", [(40, 36), (21, 50)])
    def test_neighbourhoods_that_reach_everywhere_are_full_attention(self, size):
        qkv = smooth(*size, sharpness=4.0)
        torch.testing.assert_close(local_attention(*qkv, size=size, cell=(4, 4), halo=50), full(*qkv), **CLOSE)

    @pytest.mark.parametrize("size", [(24, 24), (35, 19)])
    @pytest.mark.parametrize("sharpness", [1.0, 8.0])
    def test_a_landmark_for_each_token_is_full_attention(self, size, sharpness):
        qkv = smooth(*size, sharpness=sharpness)
        torch.testing.assert_close(local_attention(*qkv, size=size, cell=(1, 1)), full(*qkv), rtol=1e-4, atol=1e-4)

    def test_gradients_equal_those_of_the_reference(self):
        ours = [t.requires_grad_() for t in (t.clone() for t in smooth(20, 18, batch=1))]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        weight = torch.randn(1, HEADS, 360, CHANNELS // HEADS)
        (local_attention(*ours, size=(20, 18), cell=(4, 4)) * weight).sum().backward()
        (reference(*theirs, (20, 18), (4, 4)) * weight).sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            assert deviation(a.grad, b.grad) < 1e-3

    def test_gradients_after_a_first_call_in_inference_mode(self):
        """The tables are kept from there, and must be ones that autograd can save."""
        qkv = smooth(22, 21)
        with torch.inference_mode():
            local_attention(*qkv, size=(22, 21), cell=(4, 4))
        q = qkv[0].clone().requires_grad_()
        local_attention(q, *qkv[1:], size=(22, 21), cell=(4, 4)).sum().backward()
        assert q.grad.isfinite().all()


class TestCloseness:
    def test_local_attention_is_its_strength(self):
        qkv = near_by(48, 48)
        out = local_attention(*qkv, size=(48, 48), cell=(4, 4))
        assert deviation(out, full(*qkv)) < 0.02

    def test_the_fit_brings_smooth_attention_closer(self):
        qkv = smooth(48, 48)
        errors = [deviation(local_attention(*qkv, size=(48, 48), cell=(4, 4), mu=mu), full(*qkv)) for mu in (MU, 1e4)]
        assert errors[0] < errors[1] / 2

    @pytest.mark.parametrize("make", [smooth, near_by])
    def test_no_seam_shows(self, make):
        """The jump from one token to the next is nearly that of full attention where another window begins, too."""
        size, qkv = (64, 64), make(64, 64)
        out = local_attention(*qkv, size=size, cell=(4, 4))
        jumps = out.unflatten(2, size).diff(dim=3).square().sum((0, 1, 2, 4))
        exact = full(*qkv).unflatten(2, size).diff(dim=3).square().sum((0, 1, 2, 4))
        seam = torch.zeros(63, dtype=torch.bool)
        seam[WINDOW - 1 :: WINDOW] = True
        # the picture has jumps of its own, in which those of the windows must be lost
        assert (jumps[seam] / exact[seam]).sqrt().max() < 1.1
        assert (jumps[seam].mean() / jumps[~seam].mean()).sqrt() < 1.1 * (
            exact[seam].mean() / exact[~seam].mean()
        ).sqrt()


class TestNumerics:
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("make", [smooth, near_by])
    def test_half_precision_is_close_to_single(self, dtype, make):
        # rounded first: attention differs by more than its own rounding if its scores do
        qkv = [t.to(dtype) for t in make(40, 36)]
        out = local_attention(*qkv, size=(40, 36), cell=(4, 4))
        assert out.dtype == dtype
        expected = local_attention(*(t.float() for t in qkv), size=(40, 36), cell=(4, 4))
        assert deviation(out.float(), expected) < 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("make", [smooth, near_by])
    def test_extreme_scores_stay_finite(self, dtype, make):
        q, k, v = make(33, 40)
        q = 1e4 * q / (q @ k.mT).abs().amax() * q.shape[-1] ** 0.5
        assert (q @ k.mT).abs().amax() / q.shape[-1] ** 0.5 > 9e3
        out = local_attention(*(t.to(dtype) for t in (q, k, v)), size=(33, 40), cell=(4, 4))
        assert out.isfinite().all()
        assert out.abs().max() <= 4 * v.abs().max()

    @given(seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.01, 1.0, 3.0, 10.0, 100.0]))
    @settings(max_examples=20)
    def test_nothing_grows_out_of_proportion(self, seed, sharpness):
        q, k, v = smooth(36, 20, sharpness=sharpness, seed=seed)
        out = local_attention(q, k, v, size=(36, 20), cell=(4, 4))
        assert out.isfinite().all()
        assert out.abs().max() <= 4 * v.abs().max()

    @pytest.mark.parametrize("make", [smooth, near_by])
    def test_coarse_products_change_little(self, make):
        """TF32, which a WebUI switches on: the fused kernels aside, as a card's keep float32 sums."""
        qkv = make(40, 40, sharpness=2.0)
        exact = local_attention(*qkv, size=(40, 40), cell=(4, 4))
        with CoarseProducts():
            coarse = local_attention(*qkv, size=(40, 40), cell=(4, 4))
        error = deviation(exact, full(*qkv))
        assert deviation(coarse, exact) < max(0.1 * error, 5e-3)

    def test_autocast_leaves_the_fit_in_single_precision(self):
        qkv = [t.bfloat16() for t in smooth(33, 33)]
        expected = local_attention(*qkv, size=(33, 33), cell=(4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(local_attention(*qkv, size=(33, 33), cell=(4, 4)), expected)

    def test_a_row_that_is_not_finite_does_not_touch_the_others(self):
        q, k, v = smooth(40, 40, batch=3)
        expected = local_attention(q, k, v, size=(40, 40), cell=(4, 4))
        v = v.clone()
        v[1, 1, 0] = torch.inf
        out = local_attention(q, k, v, size=(40, 40), cell=(4, 4))
        torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], **CLOSE)
        torch.testing.assert_close(out[1, 0], expected[1, 0], **CLOSE)
        far = out[1, 1].unflatten(0, (40, 40))[28:, 28:]
        assert far.isfinite().all()  # its fit failed, and no landmark is token 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_same_in_any_batch(self, dtype):
        qkv = [t.to(dtype) for t in near_by(40, 36, batch=3)]
        together = local_attention(*qkv, size=(40, 36), cell=(4, 4))
        for row in range(3):
            alone = local_attention(*(t[row : row + 1] for t in qkv), size=(40, 36), cell=(4, 4))
            assert deviation(together[row : row + 1].float(), alone.float()) < (
                1e-5 if dtype == torch.float32 else 0.01
            )

    def test_pytorch_2_1_needs_no_more(self, monkeypatch):
        """It has no `torch.compiler.is_compiling`."""
        monkeypatch.setattr("agentsd.eager.FOLLOWS", False)
        monkeypatch.delattr("torch.compiler.is_compiling")
        assert local_attention(*smooth(40, 40), size=(40, 40), cell=(4, 4)).isfinite().all()


class TestMemory:
    @torch.no_grad()
    @pytest.mark.parametrize(("piece", "count"), [(0, 2 * HEADS), (600_000, 2), (10**9, 1)])
    @pytest.mark.parametrize("landmarks", ["sample", "superpixel", "heavy"])
    def test_pieces_on_the_cpu_change_nothing(self, landmarks, piece, count, monkeypatch):
        size, qkv = (40, 36), near_by(40, 36)
        whole = local_attention(*qkv, size=size, cell=(4, 4), landmarks=landmarks)
        monkeypatch.setattr("agentsd.methods.local._WHOLE", 0)
        monkeypatch.setattr("agentsd.methods.local._PIECE", piece)
        with Kernels() as seen:
            pieces = local_attention(*qkv, size=size, cell=(4, 4), landmarks=landmarks)
        torch.testing.assert_close(pieces, whole, **CLOSE)
        assert seen.names.count("index_select") == 4 * count

    @torch.no_grad()
    def test_no_matrix_of_tokens_by_tokens_or_landmarks(self):
        size, N = (64, 64), 4096
        qkv = smooth(*size, batch=1)
        with Recorder() as seen:
            local_attention(*qkv, size=size, cell=(4, 4))
        assert not [shape for shape in seen.shapes if len(shape) > 1 and shape[-2] >= N and shape[-1] >= 256]
        assert seen.largest <= HEADS * 256 * 832  # W at the agents


class TestPlan:
    def test_of_an_image(self):
        plan = plan_layer(AgentConfig(**LOCAL), 64, 64, 1)
        assert (plan.action, plan.queries, plan.agents, plan.cell) == ("local", 4096, 256, (4, 4))
        assert (plan.near, plan.rows) == (24 * 24, 256)
        assert method_of("local").words(plan) == "4096 tokens → 576 near keys and 256 landmarks"
        assert "256 landmarks" in method_of("local").caption(plan)
        assert len(method_of("local").marks(plan, 64, 64, [])) == 256

    def test_landmarks_are_limited(self):
        plan = plan_layer(AgentConfig(**LOCAL), 128, 128, 1)
        assert (plan.agents, plan.cell) == (512, (4, 8))
        assert plan_layer(AgentConfig(**LOCAL), 96, 96, 1).agents == 576 <= MOST
        assert plan_layer(AgentConfig(**LOCAL, max_agents=100), 96, 96, 1).cell == (8, 16)
        assert plan_layer(AgentConfig(**LOCAL), 192, 192, 1).cell == (8, 8)

    def test_cells_are_smaller_where_there_would_be_too_few_landmarks(self):
        plan = plan_layer(AgentConfig(method="local", agent_ratio=0.99), 40, 40, 1)
        assert (plan.agents, plan.cell) == (100, (4, 4))

    def test_too_small_a_layer_is_untouched(self):
        plan = plan_layer(AgentConfig(**LOCAL), 32, 32, 1)
        assert (plan.action, plan.reason) == (
            "untouched",
            "576 near keys and 64 landmarks are too many for 1024 tokens",
        )
        assert plan.remedy == ("method",)

    def test_too_many_landmarks_leave_it_untouched(self):
        plan = plan_layer(AgentConfig(**{**LOCAL, "agent_ratio": 0.5}), 40, 40, 1)
        assert plan.action == "untouched"
        assert plan.remedy == ("agent_ratio",)

    def test_too_low_a_limit_leaves_it_untouched(self):
        plan = plan_layer(AgentConfig(**LOCAL, max_agents=8), 64, 64, 1)
        assert (plan.action, plan.remedy) == ("untouched", ("max_agents",))

    @pytest.mark.parametrize("size", [(64, 64), (50, 67), (96, 128)])
    def test_flops_are_those_that_are_counted(self, size):
        heads, C, N = 2, 128, math.prod(size)
        plan = plan_layer(AgentConfig(**LOCAL), *size, 1)
        q, k, v = (split_heads(torch.randn(1, N, C), heads) for _ in range(3))
        local_attention(q, k, v, size=size, cell=plan.cell)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            local_attention(q, k, v, size=size, cell=plan.cell)
        counted = counter.get_total_flops() + 8 * N * C * C
        # the last windows are computed as a whole
        assert counted == pytest.approx(method_of("local").flops(plan, C), rel=0.07)

    def test_importing_it_loads_no_torch(self):
        code = "import sys, agentsd.methods.local, agentsd.attention.fit; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestPatch:
    @pytest.mark.parametrize("size", [(48, 40), (41, 47)])
    def test_it_computes_the_equations(self, size):
        unet = flat_unet()
        attn, seen = blocks_of(unet)[0].attn1, {}
        handle = blocks_of(unet)[0].norm1.register_forward_hook(lambda _m, _a, out: seen.update(x=out))
        handle_out = attn.to_out.register_forward_hook(lambda _m, args, _o: seen.update(out=args[0]))
        with patched(unet, **LOCAL):
            run(unet, inputs(2, *size))
            assert not get_patch(unet).notes
        handle.remove()
        handle_out.remove()
        q, k, v = (split_heads(to(seen["x"]), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        assert deviation(seen["out"], join_heads(reference(q, k, v, size, (4, 4)))) < 1e-4

    @pytest.mark.parametrize("size", [(64, 64), (48, 48), (45, 61), (32, 32), (16, 130), (8, 8)])
    def test_what_is_explained_is_what_is_done(self, size):
        unet = FLAT
        with patched(unet, **LOCAL):
            patch = get_patch(unet)
            out = run(unet, inputs(1, *size))
            assert [layer.plan for layer in patch.report()] == [plan for _, plan in patch.explain(*size)]
            assert set(actions(patch)) == {plan_layer(patch.config, *size, 1).action}
            assert not patch.notes
        assert out.isfinite().all()

    def test_it_is_close_and_leaves_no_trace(self):
        unet, given = FLAT, inputs(2, 48, 48)
        expected = run(unet, given)
        with patched(unet, **LOCAL):
            ours = run(unet, given)
        assert 0 < deviation(ours, expected) < 0.1
        assert torch.equal(run(unet, given), expected)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("precision", [None, "fp32"])
    def test_autocast(self, dtype, precision):
        given = inputs(2, 48, 40)
        with patched(FLAT, **LOCAL):
            expected = run(FLAT, given)
        with patched(FLAT, **LOCAL, attn_precision=precision), torch.autocast("cpu", dtype):
            assert deviation(run(FLAT, given).float(), expected) < 0.05
            assert set(actions(get_patch(FLAT))) == {"local"}
            assert not get_patch(FLAT).notes

    def test_a_row_s_result_does_not_depend_on_the_others(self):
        x, t, context = inputs(3, 48, 40)
        with patched(FLAT, **LOCAL):
            together = run(FLAT, (x, t, context))
            alone = run(FLAT, (x[1:2], t[1:2], context[1:2]))
        torch.testing.assert_close(together[1:2], alone, **CLOSE)

    def test_counting_flops_without_values_spoils_nothing(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        unet, given = flat_unet(), inputs(1, 44, 42)
        with patched(unet, **LOCAL):
            with FakeTensorMode(allow_non_fake_inputs=True):
                run(unet, given)
            assert run(unet, given).isfinite().all()
            assert not get_patch(unet).notes


FLAT = flat_unet()
