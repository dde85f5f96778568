"""Token downsampling: all queries attend to keys and values averaged over cells.

Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images", arXiv 2402.13573.
"""

from __future__ import annotations

from ..attention.grid import cells
from .base import LayerPlan, Method, SelfAttention, Settings, Tensor, register, untouched


@register
class Pool(Method):
    name = "pool"
    summary = "keys and values averaged over cells of sx × sy tokens"
    noun = "pooled keys"
    candidates = ({"sx": 2, "sy": 2},)
    phrase = "pooled"
    averages = takes_text = True
    reads = ("sx", "sy", "k_shortcut", "attn_precision")

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        N = height * width
        n = cells(height, settings.sy) * cells(width, settings.sx)
        if n < N:
            return LayerPlan(self, N, N, n, (settings.sy, settings.sx), r)
        return untouched(N, "cells of 1×1 pool nothing", "sx", "sy", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        from ..attention.tensors import add_scaled, lost_by_pooling, pool_tokens

        cell, weight = attention.plan.cell, attention.settings.k_shortcut
        q, k, v = attention.project(attention.x)
        k, pooled = (pool_tokens(t, *attention.size, cell) for t in (k, v))
        out = attention.full(q, k, pooled)
        lost = lost_by_pooling(v, pooled, *attention.size, cell) if weight else v
        return attention.project_out(add_scaled(out, lost, weight))
