"""Agent attention: a few agent tokens between queries and keys.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
"""

from __future__ import annotations

from torch import Tensor

from .tensors import scaled_dot_product_attention


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    *,
    k_scale2: float = 1.0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """Compute σ(Q Aᵀ · (d^-½)^k_scale2 + B₂) σ(A Kᵀ · d^-½ + B₁) V (section 3.2, equation 4), without the shortcut.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, n, d).
        k_scale2: exponent of the broadcast's scale; 1 is the paper's equation, AgentSD uses 0.3.
        bias1: agent bias of the aggregation, broadcastable to (B, H, n, M).
        bias2: agent bias of the broadcast, broadcastable to (B, H, N, n).

    Returns:
        (B, H, N, d). Memory and time are linear in N and M; a fused kernel stores no (N, n) matrix.
    """
    scale = q.shape[-1] ** -0.5
    v_a = scaled_dot_product_attention(a, k, v, attn_mask=bias1, scale=scale)
    return scaled_dot_product_attention(q, a, v_a, attn_mask=bias2, scale=scale**k_scale2)
