"""The paper's equation, and its module for training."""

import pytest
import torch
import torch.nn.functional as F
from blocks import Recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_matrices, heads, tokens_of

from agentsd import AgentAttention, AgentBias, agent_attention


class TestModule:
    @pytest.mark.parametrize(("agents", "rows", "columns"), [(9, 3, 3), ((2, 3), 2, 3)])
    def test_equals_the_equations(self, agents, rows, columns):
        h, w = 6, 9
        module = AgentAttention(16, 2, agents, k_scale2=0.7, size=(4, 4), qkv_bias=True)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.5)
        x = torch.randn(2, h * w, 16)
        q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
        a = q.view(2, rows, h // rows, columns, w // columns, 16).mean((2, 4)).flatten(1, 2)
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

    def test_the_agent_bias_is_row_column_and_block_at_the_size_asked_for(self):
        bias = AgentBias(2, 3, (4, 5), block=4)
        for p in bias.parameters():
            torch.nn.init.normal_(p)
        block = F.interpolate(bias.block, (4, 5), mode="bilinear")
        torch.testing.assert_close(bias((4, 5)), (bias.row + bias.column + block).flatten(2)[None])
        assert bias((8, 3)).shape == (1, 2, 3, 24)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 3, 4), "dim 10 and heads 3"),
            ((10, 0, 4), "heads 0"),
            ((8, 2, 5), "got 5"),
            ((8, 2, -4), "got -4"),
            ((8, 2, (0, 2)), r"got \(0, 2\)"),
            ((8, 2, "abc"), "got 'abc'"),
            ((8, 2, 2.5), "got 2.5"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AgentAttention(*arguments)
        with pytest.raises(ValueError, match=r"dwc_kernel.*2"):
            AgentAttention(8, 2, 4, dwc_kernel=2)

    @pytest.mark.parametrize(("tokens", "size"), [(15, None), (16, (3, 5))])
    def test_bad_sizes_are_named(self, tokens, size):
        module = AgentAttention(8, 2, 4)
        assert module(torch.randn(1, 15, 8), (3, 5)).shape == (1, 15, 8)
        with pytest.raises(ValueError, match=rf"{tokens} tokens, got \({'4, 4' if size is None else '3, 5'}\)"):
            module(torch.randn(1, tokens, 8), size)


def tensors(B, H, N, M, n, d, dtype=torch.float32):
    return tuple(torch.randn(B, H, length, d, dtype=dtype) for length in (N, M, M, n))


class TestAgentAttention:
    @settings(max_examples=30)
    @given(
        **dict.fromkeys(("B", "H"), st.integers(1, 3)),
        **dict.fromkeys(("N", "M"), st.integers(1, 30)),
        n=st.integers(1, 10),
        d=st.sampled_from([1, 5, 16]),
        k_scale2=st.floats(0, 2),
        biased=st.booleans(),
    )
    def test_equals_the_matrices_and_their_gradients(self, B, H, N, M, n, d, k_scale2, biased):
        ours = [t.requires_grad_() for t in tensors(B, H, N, M, n, d, torch.float64)]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        biases = {"bias1": torch.randn(1, H, n, M).double(), "bias2": torch.randn(B, H, N, n).double()}
        given = {"k_scale2": k_scale2, **(biases if biased else {})}
        out, expected = agent_attention(*ours, **given), by_matrices(*theirs, **given)
        weight = torch.randn(out.shape, dtype=out.dtype)
        grads = (torch.autograd.grad(x, t, weight) for x, t in ((out, ours), (expected, theirs)))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*grads)

    @torch.no_grad()
    def test_makes_no_matrix_of_all_tokens(self):
        q, k, v, a = tensors(1, 2, 1024, 1024, 128, 16)
        with Recorder() as seen:
            agent_attention(q, k, v, a, k_scale2=0.3)
        assert seen.largest <= q.numel()  # N × n alone would be four times as much
        with Recorder() as seen:
            by_matrices(q, k, v, a)
        assert seen.largest == 2 * 1024 * 128  # so the recorder would have seen it
