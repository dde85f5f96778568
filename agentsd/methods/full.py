"""Full attention: the layer is left to the host."""

from __future__ import annotations

from .base import UNTOUCHED, LayerPlan, Method, SelfAttention, Settings, Tensor, register, untouched


@register
class Full(Method):
    """Full attention. Cannot be selected by name: rules and stages ask for it with settings of None."""

    name = UNTOUCHED
    selectable = False

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        return untouched(height * width, "full attention was asked for", "rules", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        return attention.proceed()

    def flops(self, plan: LayerPlan, channels: int) -> int:
        C, N = channels, plan.tokens
        return 8 * N * C * C + 4 * N * N * C

    def words(self, plan: LayerPlan) -> str:
        return f"{plan.tokens} tokens, full attention"
