"""Corrected agents: full attention to the cells that matter, one fitted landmark for each of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..attention.grid import HALO, WINDOW, Span, cells, landmark_cell, landmark_places
from ..words import counted
from .base import LayerPlan, Method, SelfAttention, Settings, Tensor, register, too_many_agents, untouched

# With fewer agents, fitted values overshoot between them: see docs/measurements.md for figures.
MIN_AGENTS = 32
# With fewer than these, a rare call deviates forty times as much as most: see there as well.
MIN_AGENTS_TUNED = 64
# More than these are taken only where they are asked for.
MAX_AGENTS = 640


@register
class Corrected(Method):
    name = "corrected"
    summary = (
        "attention to one key of each cell, with values fitted to full attention, and to all keys of the cells that "
        "matter, as many as exact_ratio says; uses neither k_scale2 nor k_shortcut"
    )
    reads = ("agent_ratio", "exact_ratio", "max_agents", "attn_precision")
    takes_text = True
    tuned_from = MIN_AGENTS_TUNED
    candidates = tuple(  # cells of 8×8, 4×4 and 2×2
        {"agent_ratio": ratio, "exact_ratio": exact}
        for ratio in (0.98, 0.95, 0.75)
        for exact in (0.0, 0.04, 0.08, 0.14, 0.25, 0.4)
    )

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        """Take the cells of `agent_ratio`, smaller ones in small layers, where less than half of the products stay."""
        N, most = height * width, settings.max_agents or MAX_AGENTS
        cell, n = landmark_cell(settings.agent_ratio, height, width, MIN_AGENTS, most)
        keys = cell[0] * cell[1]
        opened = min(n, round(settings.exact_ratio * N / keys))
        if n < min(MIN_AGENTS, N):
            return untouched(N, f"at most {counted(most, 'agents')} would be too few to correct", "max_agents", r=r)
        if 2 * n >= N:
            return untouched(N, too_many_agents(n, N), "agent_ratio", r=r)
        if 2 * n + opened * keys >= N:
            why = f"{counted(n, 'agents')} and {opened} open cells of {keys} tokens are as much as full attention"
            return untouched(N, why, "exact_ratio", r=r)
        return LayerPlan(self, N, N, n, cell, r, opened=opened)

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..attention.corrected import corrected_attention

        plan = attention.plan

        def step(q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> Tensor:
            size, cell, opened = attention.size, plan.cell, plan.opened
            return corrected_attention(
                q, k, v, size=size, cell=cell, opened=opened, text=text or None, chosen=attention.chosen
            )

        projected = attention.project(attention.x)
        return attention.project_out(attention.by_heads(step, *projected, *(attention.text or ())))

    def flops(self, plan: LayerPlan, channels: int) -> int:
        """Count projections, the agents' full attention, the queries' keys, and the fit at the agents of windows."""
        C, N, n, (sy, sx) = channels, plan.tokens, plan.agents, plan.cell or (1, 1)
        keys, windows = n + plan.opened * sy * sx, cells(N, WINDOW**2)
        agents = min(n, math.prod(max(1, WINDOW // side) + 2 * HALO for side in (sy, sx)))
        return 8 * N * C * C + 4 * (n + keys) * N * C + 2 * windows * agents * (keys + 3 * n) * C

    def words(self, plan: LayerPlan) -> str:
        return super().words(plan) + (f", {counted(plan.opened, 'cells')} open" if plan.opened else "")

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        return [(y, x, y + 1, x + 1) for y, x in landmark_places((height, width), plan.cell or (1, 1))]

    def caption(self, plan: LayerPlan) -> str:
        opened = ""
        if plan.opened:
            opened = f" A window of tokens attends to all of {counted(plan.opened, 'cells')}, and to the dots."
        return f"Dots: {counted(plan.agents, 'agents')}, one token of each cell. Attention is fitted there.{opened}"
