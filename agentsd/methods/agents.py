"""Agent attention: a few agent tokens between queries and keys.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..attention.grid import cell_side, cells, destinations
from ..words import counted
from .base import LayerPlan, Method, SelfAttention, Settings, Span, Tensor, register, too_many_agents, untouched
from .merge import plan_merge


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
        N = height * width
        n, cell, agent_r = _count(settings, height, width)
        if 2 * n < N - r:
            return LayerPlan(self, N, N - r, n, cell, r, agent_r)
        # similarity agents are never fewer than the partition's cells
        capped = self.clusters(settings) and n == destinations(settings.sx, settings.sy, height, width)
        reason, remedy = too_many_agents(n, N - r), ("sx", "sy") if capped else ("agent_ratio",)
        if not r:
            return untouched(N, reason, *remedy)
        if not settings.agent_ratio:  # merging alone is what the settings ask for: no shortfall
            return plan_merge(height, width, r)
        return plan_merge(height, width, r, reason, (*remedy, "ratio"))

    def clusters(self, settings: Settings) -> bool:
        return settings.agent_source != "grid"

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..attention.agent import agent_attention
        from ..attention.tensors import add_scaled

        k_scale2, k_shortcut = attention.settings.k_scale2, attention.settings.k_shortcut

        def step(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
            return add_scaled(agent_attention(q, k, v, a, k_scale2=k_scale2), v, k_shortcut)

        merged = attention.merged
        out = attention.project_out(attention.by_heads(step, *_project(attention)))
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


def _count(settings: Settings, height: int, width: int) -> tuple[int, tuple[int, int] | None, int]:
    """Return (number of agents, their cell, tokens merged away to make them), before deciding whether they pay off."""
    N = height * width
    if settings.agent_source == "grid":
        s = cell_side(settings.agent_ratio, height, width, settings.max_agents)
        return cells(height, s) * cells(width, s), (s, s), 0
    n_dst = destinations(settings.sx, settings.sy, height, width)
    agent_r = int(N * settings.agent_ratio)
    if settings.max_agents is not None and agent_r:
        agent_r = max(agent_r, N - settings.max_agents)
    agent_r = min(agent_r, N - n_dst) if n_dst else 0
    return N - agent_r, None, agent_r


def _project(attention: SelfAttention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute queries, keys and values of the merged tokens, and agents of all tokens.

    A mean and a projection commute, so pool first where that leaves fewer tokens to project, unless another extension
    wraps the projections and may rely on seeing all tokens.
    """
    x, merged = attention.x, attention.merged
    if merged is None or attention.wrapped():
        q, k, v = attention.project(x)
        a = _pooled(attention, q)
        return (q, k, v, a) if merged is None else (merged.merge(q), merged.merge(k), merged.merge(v), a)
    a = _pooled(attention, x)
    return *attention.project(merged.merge(x)), attention.project_q(a)


def _pooled(attention: SelfAttention, x: Tensor) -> Tensor:
    from ..attention.tensors import pool_tokens

    if attention.plan.cell is not None:
        return pool_tokens(x, *attention.size, attention.plan.cell)
    return attention.matching.agents.merge(x)
