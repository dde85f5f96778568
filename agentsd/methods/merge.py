"""Token merging alone: full attention among the remaining tokens.

Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604.
"""

from __future__ import annotations

from .base import LayerPlan, Method, SelfAttention, Settings, Tensor, register, untouched


@register
class Merge(Method):
    name = "merge"
    summary = "token merging by Ratio, without agents"
    phrase = "merged"
    merges = True
    reads = ()

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        N = height * width
        return LayerPlan(self, N, N - r, r=r) if r else untouched(N, "no token is merged", "ratio")

    def attend(self, attention: SelfAttention) -> Tensor:
        merged = attention.merged
        if not attention.wrapped():
            return merged.unmerge(attention.proceed(merged.merge(attention.x)))
        # an extension that wraps the projections may rely on seeing all tokens
        q, k, v = (merged.merge(t) for t in attention.project(attention.x))
        return merged.unmerge(attention.project_out(attention.full(q, k, v)))

    def words(self, plan: LayerPlan) -> str:
        return f"{plan.tokens} tokens → {plan.queries} merged"
