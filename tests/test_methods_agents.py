"""The paper's equation: `agent_attention` against its matrices."""

import torch
from blocks import Recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_matrices

from agentsd import agent_attention

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


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
