"""Corrected agents: attention to a sample of the keys, whose values are fitted to full attention at the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..grid import cell_side, sampled
from .base import LayerPlan, Method, SelfAttention, Settings, Span, counted, register, too_many_agents, untouched

if TYPE_CHECKING:
    from torch import Tensor

# Number of conjugate steps of the fit.
FIT_STEPS = 3
# Largest ratio of fitted values to the values they are fitted to and from, beyond which the fit is rejected.
FIT_GROWTH = 16.0
# With fewer agents, corrected values overshoot between them: see docs/fidelity.md for figures.
FEWEST = 32


@register
class Corrected(Method):
    name = "corrected"
    summary = (
        "attention to one key of each cell, as many as grid agents, with values fitted to full attention; uses neither "
        "k_scale2 nor k_shortcut"
    )
    noun = "corrected agents"

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        N = height * width
        s = cell_side(settings.agent_ratio, height, width, settings.max_agents)
        while (n := len(sampled(height, s)) * len(sampled(width, s))) < FEWEST and s > 1:
            s //= 2
        if settings.max_agents is not None and n > settings.max_agents:
            most = counted(settings.max_agents, "agents")
            return untouched(N, f"at most {most} would be too few to correct", "max_agents", r=r)
        if 2 * n < N:
            return LayerPlan(self.action, N, N, n, (s, s), r)
        return untouched(N, too_many_agents(n, N), "agent_ratio", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..tensors import sample_tokens

        q, k, v = attention.project(attention.x)
        few = (sample_tokens(t, *attention.size, attention.plan.cell) for t in (q, k, v))
        return attention.project_out(attention.by_heads(corrected_attention, q, k, v, *few))

    def flops(self, plan: LayerPlan, channels: int) -> int:
        C, N, n = channels, plan.tokens, plan.agents
        # projections; full attention at n queries and broadcast to n keys; n × n weights and their fit
        return 8 * N * C * C + 8 * n * N * C + (4 + 4 * FIT_STEPS) * n * n * C

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        rows, columns = (sampled(*axis) for axis in zip((height, width), plan.cell or (1, 1), strict=True))
        return [(y, x, y + 1, x + 1) for y in rows for x in columns]

    def caption(self, plan: LayerPlan) -> str:
        return f"Dots: {counted(plan.agents, 'agents')}, one token of each cell. Attention is fitted to be exact there."


def corrected_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, k_bar: Tensor, v_bar: Tensor, *, steps: int = FIT_STEPS
) -> Tensor:
    """Compute attention to a few keys whose values are fitted so that it equals full attention at the agents.

        V_A = σ(A Kᵀ · d^-½) V                 agent aggregation
        W   = σ(A K̄ᵀ · d^-½)
        Y   ≈ argmin ‖W Y − V_A‖, from Y = V̄
        O   = σ(Q K̄ᵀ · d^-½) Y                 agent broadcast, corrected

    Without the fit (Y = V̄) this is attention to the few keys and values. With an exact fit it is the Nyström
    approximation σ(Q K̄ᵀ) W⁺ σ(A Kᵀ) V (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902), whose inverse
    agent attention leaves out. W is close to singular: a few steps of the fit recover the directions that carry weight
    and leave alone those that would only amplify noise.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, m, d), which are queries too.
        k_bar: the few keys (B, H, n, d): a sample, as in the patch, or means.
        v_bar: their values (B, H, n, d), the start of the fit.
        steps: number of steps of the fit, at least 0.

    Returns:
        (B, H, N, d). The m × n matrix W and the fit are float32 whatever the dtype of the tensors. Where the fit of a
        row and head is not finite, or grows out of proportion, V̄ is used: attention to the few keys and values.
    """
    from ..tensors import no_autocast, scaled_dot_product_attention

    v_a = scaled_dot_product_attention(a, k, v)
    with no_autocast(q.device.type):
        y = _fitted(a.float(), k_bar.float(), v_a.float(), v_bar.float(), steps).to(v.dtype)
    return scaled_dot_product_attention(q, k_bar, y)


def _fitted(a: Tensor, k_bar: Tensor, v_a: Tensor, v_bar: Tensor, steps: int) -> Tensor:
    w = (a @ k_bar.mT * a.shape[-1] ** -0.5).softmax(dim=-1)
    y = fit_values(w, v_a, v_bar, steps)
    # False for NaN. Decided on the device, so that nothing waits for it.
    bounded = _largest(y) <= FIT_GROWTH * _largest(v_a).maximum(_largest(v_bar))
    return y.where(bounded, v_bar)


def fit_values(w: Tensor, v_a: Tensor, y: Tensor, steps: int) -> Tensor:
    """Minimise ‖W Y − V_A‖² from Y by `steps` conjugate directions, for every column (channel) separately.

    The directions are those of conjugate gradients on the least-squares problem (CGLS). Each image W p is explicitly
    orthogonalised against all earlier ones: by the recursion alone, rounding errors grow a thousandfold within six
    steps, and the picture would depend on the batch. The residual never grows, whatever W is. Products only: no
    factorisation, and nothing that waits for the device.

    Args:
        w: (..., m, n).
        v_a: (..., m, d).
        y: start of the fit (..., n, d).
        steps: number of steps, at least 0.

    Returns:
        The fitted values (..., n, d).
    """
    residual, directions = v_a - w @ y, []
    for _ in range(steps):
        p = w.mT @ residual
        image = w @ p
        before = _dot(image, image)
        for other, other_image in directions:
            overlap = _dot(image, other_image)
            p, image = p - overlap * other, image - overlap * other_image
        square = _dot(image, image)
        # drop a direction that is only rounding error: the column is solved, or W cannot improve it further
        fresh = square > 1e-8 * before
        length = square.where(fresh, 1.0).rsqrt() * fresh
        p, image = p * length, image * length
        gain = _dot(image, residual)
        y, residual = y.addcmul(gain, p), residual.addcmul(gain, image, value=-1)
        directions.append((p, image))
    return y


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-2, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=(-2, -1), keepdim=True)
