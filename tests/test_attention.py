"""The paper's equations: `agent_attention`, the pooling of agents, and the module for training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import HALVES, Recorder, attention_calls, blocks_of, flat_unet, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cells, heads, softmax, tokens_of

import agentsd
from agentsd import AgentAttention, AgentBias, agent_attention
from agentsd.attention import add_scaled, join_heads, lost_by_pooling, pool_tokens, split_heads

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def by_matrices(q, k, v, a, k_scale2=1.0, bias1=0.0, bias2=0.0):
    """Equation 4 as it is written."""
    scale = q.shape[-1] ** -0.5
    aggregation = softmax(torch.einsum("bhnd,bhmd->bhnm", a, k) * scale + bias1)
    broadcast = softmax(torch.einsum("bhnd,bhmd->bhnm", q, a) * scale**k_scale2 + bias2)
    return broadcast @ (aggregation @ v)


def tensors(B=2, H=3, N=20, M=30, n=6, d=8, dtype=torch.float32):
    return tuple(torch.randn(B, H, length, d, dtype=dtype) for length in (N, M, M, n))


class TestAgentAttention:
    @settings(max_examples=30)
    @given(
        B=st.integers(1, 3),
        H=st.integers(1, 3),
        N=st.integers(1, 30),
        M=st.integers(1, 30),
        n=st.integers(1, 10),
        d=st.sampled_from([1, 5, 16]),
        k_scale2=st.floats(0, 2),
    )
    def test_equals_the_matrices(self, B, H, N, M, n, d, k_scale2):
        qkva = tensors(B, H, N, M, n, d)
        out = agent_attention(*qkva, k_scale2=k_scale2)
        torch.testing.assert_close(out, by_matrices(*qkva, k_scale2=k_scale2), **CLOSE)

    def test_equals_the_matrices_with_biases(self):
        qkva = tensors()
        biases = {"bias1": torch.randn(1, 3, 6, 30), "bias2": torch.randn(2, 3, 20, 6)}
        out = agent_attention(*qkva, k_scale2=0.3, **biases)
        torch.testing.assert_close(out, by_matrices(*qkva, k_scale2=0.3, **biases), **CLOSE)
        assert not torch.allclose(out, agent_attention(*qkva, k_scale2=0.3), atol=1e-2)

    def test_k_scale2_scales_the_broadcast_alone(self):
        q, k, v, a = tensors()
        factor = (q.shape[-1] ** -0.5) ** (0.3 - 1)
        out = agent_attention(q, k, v, a, k_scale2=0.3)
        torch.testing.assert_close(out, agent_attention(q * factor, k, v, a), **CLOSE)

    def test_gradients_equal_those_of_the_matrices(self):
        ours = [t.requires_grad_() for t in tensors(dtype=torch.float64)]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        weight = torch.randn(2, 3, 20, 8, dtype=torch.float64)
        (agent_attention(*ours, k_scale2=0.3) * weight).sum().backward()
        (by_matrices(*theirs, k_scale2=0.3) * weight).sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            assert a.grad.abs().max() > 0

    @torch.no_grad()
    def test_makes_no_matrix_of_all_tokens(self):
        q, k, v, a = tensors(B=1, H=2, N=1024, M=1024, n=128, d=16)
        with Recorder() as seen:
            agent_attention(q, k, v, a, k_scale2=0.3)
        assert seen.largest <= q.numel()  # N × n alone would be four times as much
        with Recorder() as seen:
            by_matrices(q, k, v, a)
        assert seen.largest == 2 * 1024 * 128  # so the recorder would have seen it


class TestSmallParts:
    def test_heads_split_and_join(self):
        x = torch.randn(2, 5, 12)
        assert torch.equal(split_heads(x, 3), heads(x, 3))
        assert torch.equal(join_heads(split_heads(x, 3)), x)

    def test_add_scaled(self):
        out, v = torch.randn(2, 3), torch.randn(2, 3)
        assert add_scaled(out, v, 0.0) is out
        torch.testing.assert_close(add_scaled(out.clone(), v, 0.5), out + 0.5 * v)

    def test_add_scaled_keeps_what_autograd_needs(self):
        out = torch.randn(3, requires_grad=True)
        y = out.exp()
        add_scaled(y, torch.ones(3), 0.5).sum().backward()
        torch.testing.assert_close(out.grad, out.detach().exp())

    @settings(max_examples=60)
    @given(h=st.integers(1, 20), w=st.integers(1, 20), sy=st.integers(1, 32), sx=st.integers(1, 32))
    def test_pooling_averages_each_cell_over_what_it_has(self, h, w, sy, sx):
        x = torch.randn(2, h * w, 3)
        image = x.view(2, h, w, 3)
        expected = [
            image[:, top : top + sy, left : left + sx].mean((1, 2))
            for top in range(0, h, sy)
            for left in range(0, w, sx)
        ]
        pooled = pool_tokens(x, h, w, (sy, sx))
        torch.testing.assert_close(pooled, torch.stack(expected, 1), **CLOSE)
        lost = lost_by_pooling(x, pooled, h, w, (sy, sx))
        for i in range(h * w):
            cell = (i // w // sy) * -(-w // sx) + i % w // sx
            torch.testing.assert_close(lost[:, i], x[:, i] - expected[cell], **CLOSE)

    def test_pooling_square_cells_is_the_oracle_s_matrix(self):
        x = torch.randn(1, 7 * 10, 4)
        torch.testing.assert_close(pool_tokens(x, 7, 10, (4, 4)), cells(7, 10, 4) @ x, **CLOSE)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("h", [8, 7])
    def test_pooling_in_half_precision(self, dtype, h):
        x = torch.randn(1, h * 8, 4)
        pooled = pool_tokens(x.to(dtype), h, 8, (4, 4))
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled.float(), pool_tokens(x, h, 8, (4, 4)), rtol=0.02, atol=0.02)


class TestModule:
    def test_equals_the_grid_patch(self):
        """Biases at zero, and for the DWC k_shortcut times the identity kernel: one core serves both."""
        unet, (h, w), k_shortcut = flat_unet(), (12, 8), 0.25
        attn = blocks_of(unet)[0].attn1
        with (
            agentsd.patched(
                unet, ratio=0.0, agent_ratio=0.95, agent_source="grid", k_scale2=0.3, k_shortcut=k_shortcut
            ),
            attention_calls(attn) as seen,
        ):
            run(unet, inputs(2, h, w))
            (plan,) = {layer.plan for layer in agentsd.get_patch(unet).report()}
            assert (plan.action, plan.cell) == ("agents", (4, 4))
        ((x, expected),) = seen

        module = AgentAttention(32, 2, (h // 4, w // 4), k_scale2=0.3, size=(h, w)).eval()
        with torch.no_grad():
            for name in ("to_q", "to_k", "to_v"):
                getattr(module, name).weight.copy_(getattr(attn, name).weight)
            module.to_out.load_state_dict(attn.to_out[0].state_dict())
            module.dwc.weight.zero_()
            module.dwc.weight[:, 0, 1, 1] = k_shortcut
            module.dwc.bias.zero_()
            out = module(x, (h, w))
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            plain = attn(x)
        assert (out - plain).abs().max() > 1e-2

    @pytest.mark.parametrize("agents", [9, (2, 3)])
    def test_equals_the_equations(self, agents):
        torch.manual_seed(1)
        h, w, n = 6, 9, 9 if agents == 9 else 6
        module = AgentAttention(16, 2, agents, k_scale2=0.7, size=(4, 4), qkv_bias=True)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.5)
        x = torch.randn(2, h * w, 16)
        q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
        rows, columns = (3, 3) if agents == 9 else (2, 3)
        a = q.view(2, rows, h // rows, columns, w // columns, 16).mean((2, 4)).reshape(2, n, 16)
        b1, b2 = module.bias1((h, w)), module.bias2((h, w)).transpose(-1, -2)
        out = by_matrices(*(heads(t, 2) for t in (q, k, v, a)), k_scale2=0.7, bias1=b1, bias2=b2)
        image = v.transpose(1, 2).view(2, 16, h, w)
        dwc = F.conv2d(image, module.dwc.weight, module.dwc.bias, padding=1, groups=16)
        expected = module.to_out(tokens_of(out) + dwc.flatten(2).transpose(1, 2))
        torch.testing.assert_close(module(x, (h, w)), expected, rtol=1e-4, atol=1e-4)

    def test_every_parameter_gets_a_gradient(self):
        module = AgentAttention(16, 2, 4)
        module(torch.randn(2, 64, 16)).square().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().max() > 0, name

    def test_trains(self):
        module = AgentAttention(8, 2, 4, size=(4, 4))
        x, target = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            loss = F.mse_loss(module(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    def test_the_agent_bias_is_row_column_and_block_at_the_size_asked_for(self):
        bias = AgentBias(2, 3, (4, 5), block=4)
        for p in bias.parameters():
            torch.nn.init.normal_(p)
        total = bias((4, 5)).view(2, 3, 4, 5)
        block = F.interpolate(bias.block, (4, 5), mode="bilinear")
        for y in range(4):
            for x in range(5):
                expected = bias.row[:, :, y, 0] + bias.column[:, :, 0, x] + block[:, :, y, x]
                torch.testing.assert_close(total[:, :, y, x], expected)
        assert bias((8, 3)).shape == (1, 2, 3, 24)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 3, 4), "dim 10 and heads 3"),
            ((10, 0, 4), "heads 0"),
            ((8, 2, 5), "got 5"),
            ((8, 2, 0), "got 0"),
            ((8, 2, -4), "got -4"),
            ((8, 2, (0, 2)), r"got \(0, 2\)"),
            ((8, 2, "abc"), "got 'abc'"),
            ((8, 2, 2.5), "got 2.5"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AgentAttention(*arguments)

    def test_bad_kernels_and_sizes_are_named(self):
        with pytest.raises(ValueError, match=r"dwc_kernel.*2"):
            AgentAttention(8, 2, 4, dwc_kernel=2)
        module = AgentAttention(8, 2, 4)
        with pytest.raises(ValueError, match=r"15 tokens, got \(4, 4\)"):
            module(torch.randn(1, 15, 8))
        with pytest.raises(ValueError, match=r"16 tokens, got \(3, 5\)"):
            module(torch.randn(1, 16, 8), (3, 5))
        assert module(torch.randn(1, 15, 8), (3, 5)).shape == (1, 15, 8)
