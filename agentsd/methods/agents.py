"""Agent attention: a few agent tokens between queries and keys.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..attention.grid import Grid, Span, cell_side, destinations
from ..words import counted
from .base import LayerPlan, Method, SelfAttention, Settings, Tensor, method_named, register, too_many_agents, untouched


@register
class Agents(Method):
    name = "agent"
    action = "agents"
    summary = "agent attention"
    phrase = "with agents"
    merges = averages = True
    reads = ("agent_ratio", "agent_source", "k_scale2", "k_shortcut", "max_agents", "attn_precision")
    candidates = ({"agent_ratio": 0.95},)

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        """Plan agents if 2 · n_agents < n_queries, as in AgentSD; otherwise merging alone."""
        N, n_dst, capped = height * width, destinations(settings.sx, settings.sy, height, width), False
        cell, agent_r = None, 0
        if self.clusters(settings):
            wanted = int(N * settings.agent_ratio)
            if settings.max_agents is not None and wanted:
                wanted = max(wanted, N - settings.max_agents)
            agent_r = min(wanted, N - n_dst) if n_dst else 0
            n = N - agent_r
            capped = n == n_dst  # similarity agents are never fewer than the partition's cells
        else:
            s = cell_side(settings.agent_ratio, height, width, settings.max_agents)
            cell, n = (s, s), Grid(height, width).cells((s, s)).tokens
        if 2 * n < N - r:
            return LayerPlan(self, N, N - r, n, cell, r, agent_r)
        reason, remedy = too_many_agents(n, N - r), ("sx", "sy") if capped else ("agent_ratio",)
        if not r:
            return untouched(N, reason, *remedy)
        merging = method_named("merge").plan(settings, height, width, r)
        # where the settings ask for merging alone, nothing falls short
        return replace(merging, shortfall=reason, remedy=(*remedy, "ratio")) if settings.agent_ratio else merging

    def clusters(self, settings: Settings) -> bool:
        return settings.agent_source != "grid"

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..attention.agent import agent_attention
        from ..attention.tensors import add_scaled, pool_tokens

        plan, settings, merged = attention.plan, attention.settings, attention.merged

        def pooled(x: Tensor) -> Tensor:
            if plan.cell is not None:
                return pool_tokens(x, *attention.size, plan.cell)
            return attention.matching.agents.merge(x)

        def step(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
            return add_scaled(agent_attention(q, k, v, a, k_scale2=settings.k_scale2), v, settings.k_shortcut)

        # A mean and a projection commute: pool first where that leaves fewer tokens to project, unless another
        # extension wraps the projections and may rely on seeing all tokens.
        if merged is not None and not attention.wrapped():
            q, k, v = attention.project(merged.merge(attention.x))
            a = attention.project_q(pooled(attention.x))
        else:
            q, k, v = attention.project(attention.x)
            a = pooled(q)
            if merged is not None:
                q, k, v = (merged.merge(t) for t in (q, k, v))
        out = attention.project_out(attention.by_heads(step, q, k, v, a))
        return out if merged is None else merged.unmerge(out)

    def flops(self, plan: LayerPlan, channels: int) -> int:
        C, M, n = channels, plan.queries, plan.agents
        # agents are pooled from the queries, or projected separately where the queries are merged
        return 8 * M * C * C + (2 * n * C * C if plan.r else 0) + 8 * n * M * C

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        if plan.cell is not None:
            return super().marks(plan, height, width, agent_tokens)
        return [(i // width, i % width, i // width + 1, i % width + 1) for i in map(int, agent_tokens)]

    def caption(self, plan: LayerPlan) -> str:
        return super().caption(plan) or f"Dots: {counted(plan.agents, self.noun)}."
