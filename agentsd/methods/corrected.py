"""Corrected agents: attention to a sample of the keys, whose values are fitted to full attention at the sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..attention.fit import FEWEST, MOST, MU, SURE, fit_tikhonov, fitted_to
from ..attention.grid import landmark_cell, sampled
from ..attention.landmarks import HEAVY, SUPERPIXEL, count_heavy, heavy_hitters, heavy_weight, superpixels, taken_at
from .base import LayerPlan, Method, SelfAttention, Settings, Span, counted, register, too_many_agents, untouched

if TYPE_CHECKING:
    from torch import Tensor


@register
class Corrected(Method):
    name = "corrected"
    summary = (
        "attention to one key of each cell, as many as grid agents, with values fitted to full attention; uses neither "
        "k_scale2 nor k_shortcut"
    )
    noun = "corrected agents"
    reads = ("agent_ratio", "max_agents", "landmarks", "attn_precision")
    tuned_from = SURE
    candidates = (  # cells of 8×8, 4×4 and 2×2
        {"agent_ratio": 0.98},
        {"agent_ratio": 0.95},
        {"agent_ratio": 0.75},
        {"agent_ratio": 0.98, "landmarks": SUPERPIXEL},
        {"agent_ratio": 0.95, "landmarks": SUPERPIXEL},
        {"agent_ratio": 0.98, "landmarks": HEAVY},
        {"agent_ratio": 0.95, "landmarks": HEAVY},
    )

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        N, most = height * width, settings.max_agents or MOST
        cell, n = landmark_cell(settings.agent_ratio, height, width, FEWEST, most)
        if n < min(FEWEST, N):
            return untouched(N, f"at most {counted(most, 'agents')} would be too few to correct", "max_agents", r=r)
        if 2 * n < N:
            heavy = count_heavy(settings.landmarks, (height, width), cell)
            return LayerPlan(self.action, N, N, n, cell, r, heavy=heavy)
        return untouched(N, too_many_agents(n, N), "agent_ratio", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..attention.tensors import sample_each

        tokens, size, cell = attention.project(attention.x), attention.size, attention.plan.cell
        few = sample_each(tokens, size, cell)
        step = corrected_attention
        if attention.settings.landmarks == SUPERPIXEL:
            few, step = few[:1], partial(by_superpixels, size=size, cell=cell)
        elif attention.settings.landmarks == HEAVY:
            step = partial(by_heavy_hitters, size=size, cell=cell)
        return attention.project_out(attention.by_heads(step, *tokens, *few))

    def flops(self, plan: LayerPlan, channels: int) -> int:
        C, N, n, K = channels, plan.tokens, plan.agents, plan.agents + plan.heavy
        # projections; full attention at n queries and broadcast to K keys; n × K weights and their fit, where W Wᵀ and
        # its factors grow with the number of heads: that of heads of 64 channels
        fit = 8 * n * K * C + (2 * n * n * K + n**3 // 3) * -(-C // 64)
        return 8 * N * C * C + 4 * (n + K) * N * C + fit

    def steps(self, plan: LayerPlan) -> tuple[tuple[int, int], ...]:
        return ((plan.agents, plan.queries), (plan.queries, plan.agents + plan.heavy))

    def kernels(self, plan: LayerPlan) -> int:
        return 32 if plan.heavy else 20

    def traffic(self, plan: LayerPlan) -> float:
        # as counted at 4×4 cells, where the m × n weights are most of it
        return 29.0 if plan.heavy else 21.0

    def words(self, plan: LayerPlan) -> str:
        return super().words(plan) + (f" and {counted(plan.heavy, 'heavy hitters')}" if plan.heavy else "")

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        rows, columns = (sampled(*axis) for axis in zip((height, width), plan.cell or (1, 1), strict=True))
        return [(y, x, y + 1, x + 1) for y in rows for x in columns]

    def caption(self, plan: LayerPlan) -> str:
        return f"Dots: {counted(plan.agents, 'agents')}, one token of each cell. Attention is fitted to be exact there."


def by_superpixels(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, size: tuple[int, int], cell: tuple[int, int]
) -> Tensor:
    """Compute `corrected_attention` to means over superpixels of the grid; `a`: the sampled queries."""
    return corrected_attention(q, k, v, a, *superpixels(k, v, size, cell))


def by_heavy_hitters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    k_bar: Tensor,
    v_bar: Tensor,
    *,
    size: tuple[int, int],
    cell: tuple[int, int],
) -> Tensor:
    """Compute `corrected_attention` to the sampled keys and the heavy hitters; `a`, `k_bar`, `v_bar`: the sample."""
    import torch

    index = heavy_hitters(k, a, size, cell)
    k_bar, v_bar = (torch.cat([few, taken_at(x, index)], dim=2) for few, x in ((k_bar, k), (v_bar, v)))
    bias = torch.nn.functional.pad(q.new_zeros(a.shape[2]), (0, index.shape[2]), value=heavy_weight(cell))
    return corrected_attention(q, k, v, a, k_bar, v_bar, bias)


def corrected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    k_bar: Tensor,
    v_bar: Tensor,
    bias: Tensor | None = None,
    *,
    mu: float = MU,
) -> Tensor:
    """Compute attention to a few keys whose values are fitted so that it equals full attention at the agents.

        V_A = σ(A Kᵀ · d^-½) V                            agent aggregation
        W   = σ(A K̄ᵀ · d^-½ + b)
        Y   = argmin ‖W Y − V_A‖² + λ ‖Y − V̄‖²            see `fit_tikhonov`
        O   = σ(Q K̄ᵀ · d^-½ + b) Y                        agent broadcast, corrected

    With a heavy penalty (Y = V̄) this is attention to the few keys and values; without any it is the Nyström
    approximation σ(Q K̄ᵀ) W⁺ σ(A Kᵀ) V (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902), whose inverse
    agent attention leaves out. W is close to singular: the penalty keeps to V̄ in directions that would only amplify
    noise.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, n, d), which are queries too.
        k_bar: the few keys (B, H, m, d): a sample, as in the patch, or means.
        v_bar: their values (B, H, m, d), which the fit begins with.
        bias: b, the log of each key's weight (m,), in the dtype of `q`; None for even ones.
        mu: weight of the penalty, above 0.

    Returns:
        (B, H, N, d). The n × m matrix W and the fit are float32 whatever the dtype of the tensors. A row and head whose
        fit is not finite uses V̄: attention to the few keys and values.
    """
    import torch

    from ..attention.tensors import no_autocast, scaled_dot_product_attention

    v_a = scaled_dot_product_attention(a, k, v)
    with no_autocast(q.device.type):
        if bias is None:
            few_q, few_k, few_v = torch.stack([a, k_bar, v_bar]).float()  # laid out by heads
            added, share = q.new_empty((), dtype=torch.float32), 0.0
        else:
            few_q, few_k, few_v = a.float(), k_bar.float(), v_bar.float()
            added, share = bias.float(), 1.0
        few_q, few_k = few_q.flatten(0, 1), few_k.flatten(0, 1)
        scores = torch.baddbmm(added, few_q, few_k.mT, beta=share, alpha=q.shape[-1] ** -0.5)
        w = scores.softmax(dim=-1).unflatten(0, q.shape[:2])
        y = fitted_to(v.dtype, fit_tikhonov(w, v_a, few_v, mu))
    return scaled_dot_product_attention(q, k_bar, y, attn_mask=None if bias is None else bias[None, None, None])
