"""Corrected agents: attention to a sample of the keys, whose values are fitted to full attention at the sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..grid import landmark_cell, sampled
from .base import LayerPlan, Method, SelfAttention, Settings, Span, counted, register, too_many_agents, untouched
from .fit import FEWEST, MU, fit_tikhonov, fitted_to
from .landmarks import SUPERPIXEL, superpixels

if TYPE_CHECKING:
    from torch import Tensor

# More agents cost more than they gain: their fit takes n × n matrices. See docs/zoo.md for figures.
MOST = 1024


@register
class Corrected(Method):
    name = "corrected"
    summary = (
        "attention to one key of each cell, as many as grid agents, with values fitted to full attention; uses neither "
        "k_scale2 nor k_shortcut"
    )
    noun = "corrected agents"
    unused = ("k_scale2", "k_shortcut", "agent_source")
    candidates = (  # cells of 8×8, 4×4 and 2×2
        {"agent_ratio": 0.98},
        {"agent_ratio": 0.95},
        {"agent_ratio": 0.75},
        {"agent_ratio": 0.98, "landmarks": SUPERPIXEL},
        {"agent_ratio": 0.95, "landmarks": SUPERPIXEL},
    )

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        N, most = height * width, settings.max_agents or MOST
        cell, n = landmark_cell(settings.agent_ratio, height, width, FEWEST, most)
        if n < min(FEWEST, N):
            return untouched(N, f"at most {counted(most, 'agents')} would be too few to correct", "max_agents", r=r)
        if 2 * n < N:
            return LayerPlan(self.action, N, N, n, cell, r)
        return untouched(N, too_many_agents(n, N), "agent_ratio", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..tensors import sample_each

        tokens, size, cell = attention.project(attention.x), attention.size, attention.plan.cell
        few = sample_each(tokens, size, cell)
        step = corrected_attention
        if attention.settings.landmarks == SUPERPIXEL:
            few, step = few[:1], partial(_by_superpixels, size=size, cell=cell)
        return attention.project_out(attention.by_heads(step, *tokens, *few))

    def flops(self, plan: LayerPlan, channels: int) -> int:
        C, N, n = channels, plan.tokens, plan.agents
        # projections; full attention at n queries and broadcast to n keys; n × n weights and their fit, where WᵀW and
        # its factors grow with the number of heads: that of heads of 64 channels
        return 8 * N * C * C + 8 * n * N * C + 8 * n * n * C + 7 * n**3 // 3 * -(-C // 64)

    def steps(self, plan: LayerPlan) -> tuple[tuple[int, int], ...]:
        return ((plan.agents, plan.queries), (plan.queries, plan.agents))

    def kernels(self, plan: LayerPlan) -> int:
        return 20

    def traffic(self, plan: LayerPlan) -> float:
        return 21.0  # as counted at 4×4 cells, where the m × n weights are most of it

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        rows, columns = (sampled(*axis) for axis in zip((height, width), plan.cell or (1, 1), strict=True))
        return [(y, x, y + 1, x + 1) for y in rows for x in columns]

    def caption(self, plan: LayerPlan) -> str:
        return f"Dots: {counted(plan.agents, 'agents')}, one token of each cell. Attention is fitted to be exact there."


def _by_superpixels(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, size: tuple[int, int], cell: tuple[int, int]
) -> Tensor:
    return corrected_attention(q, k, v, a, *superpixels(k, v, size, cell))


def corrected_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, k_bar: Tensor, v_bar: Tensor, *, mu: float = MU
) -> Tensor:
    """Compute attention to a few keys whose values are fitted so that it equals full attention at the agents.

        V_A = σ(A Kᵀ · d^-½) V                            agent aggregation
        W   = σ(A K̄ᵀ · d^-½)
        Y   = argmin ‖W Y − V_A‖² + λ ‖Y − V̄‖²            see `fit_tikhonov`
        O   = σ(Q K̄ᵀ · d^-½) Y                            agent broadcast, corrected

    With a heavy penalty (Y = V̄) this is attention to the few keys and values; without any it is the Nyström
    approximation σ(Q K̄ᵀ) W⁺ σ(A Kᵀ) V (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902), whose inverse
    agent attention leaves out. W is close to singular: the penalty keeps to V̄ in directions that would only amplify
    noise.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, n, d), which are queries too.
        k_bar: the few keys (B, H, n, d): a sample, as in the patch, or means.
        v_bar: their values (B, H, n, d), which the fit begins with.
        mu: weight of the penalty, above 0.

    Returns:
        (B, H, N, d). The n × n matrix W and the fit are float32 whatever the dtype of the tensors. A row and head whose
        fit is not finite uses V̄: attention to the few keys and values.
    """
    import torch

    from ..tensors import no_autocast, scaled_dot_product_attention

    v_a = scaled_dot_product_attention(a, k, v)
    with no_autocast(q.device.type):
        few = torch.stack([a, k_bar, v_bar]).float()  # laid out by heads
        few_q, few_k = few[:2].flatten(1, 2)
        scores = torch.baddbmm(few_q.new_empty(()), few_q, few_k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        w = scores.softmax(dim=-1).unflatten(0, q.shape[:2])
        y = fitted_to(v.dtype, fit_tikhonov(w, v_a, few[2], mu))
    return scaled_dot_product_attention(q, k_bar, y)
