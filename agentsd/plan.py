"""Which layers, and what is done there: the one place that decides it.

Execution, `Patch.explain`, the cost model, the panel's preview and the token map all ask here. A layer is left alone
by the first of these vetoes, in this order:

1. a stage or a rule leaves full attention there (`AgentConfig.at`);
2. it is further down the U-Net than `max_downsample`;
3. it has fewer tokens than `min_tokens`;
4. `merge_attn` is off;
5. the method has nothing to do there, or would not pay (`Method.plan`).

What remains to be seen in a call itself (a host's attention that can't be answered by us, a mask, a foreign context) is
up to `agentsd.patch`. Imports no torch.
"""

from __future__ import annotations

import math

from .config import AUTO, AgentConfig, Block
from .grid import cells, destinations
from .methods import LayerPlan, method_named, method_of, untouched

__all__ = ["Block", "LayerPlan", "downsample_of", "grid_of", "limit", "merged_tokens", "plan_block", "plan_layer"]


def grid_of(latent: tuple[int, int], downsample: int) -> tuple[int, int]:
    """(height, width) of the grid of tokens so far down the U-Net, for a latent of (height, width)."""
    return cells(latent[0], downsample), cells(latent[1], downsample)


def downsample_of(latent: tuple[int, int], size: tuple[int, int]) -> int:
    """How far down the U-Net a layer of this (height, width) is: the power of two nearest to the ratio of the sides."""
    return 2 ** max(0, round(0.5 * math.log2(math.prod(latent) / math.prod(size))))


def limit(config: AgentConfig, first: int) -> int:
    """How far down the U-Net layers are patched, where its largest self-attention layers are `first` down."""
    return first if config.max_downsample == AUTO else int(config.max_downsample)


def plan_block(
    config: AgentConfig,
    block: Block,
    latent: tuple[int, int],
    progress: float | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[AgentConfig, LayerPlan] | None:
    """The settings that hold in one block of a U-Net, and what they do there.

    Args:
        config: the settings, with their stages and rules.
        block: the block.
        latent: (height, width) of the latent.
        progress: fraction of the diffusion done, 0–1; needed only where settings differ over the diffusion.
        size: (height, width) of the block's tokens, where it has been seen; None: as the block's place says.

    Returns:
        The settings and the plan; None where full attention is left, or the block's place is unknown.
    """
    if size is None:
        if block.downsample is None:
            return None
        size = grid_of(latent, block.downsample)
    d = downsample_of(latent, size)
    found = config.at(progress, Block(block.name, d, block.first))
    return None if found is None else (found, plan_layer(found, *size, d, first=block.first))


def plan_layer(config: AgentConfig, height: int, width: int, downsample: int, *, first: int = 1) -> LayerPlan:
    """Say what `config` (its stages and rules aside) does to a block of `height` × `width` tokens.

    As in AgentSD, the numbers of merged tokens are capped at N − N_dst, and agents are used exactly where
    2 · n_agents < n_queries.

    Args:
        config: the settings.
        height: rows of the grid of tokens.
        width: columns of the grid.
        downsample: how far down the U-Net the block is: 1, 2, 4 …
        first: how far down the U-Net's largest self-attention layers are, which is what "auto" stands for.
    """
    N, deepest = height * width, limit(config, first)
    if downsample > deepest:
        return untouched(N, f"layers at level {downsample} are further down than level {deepest}", "max_downsample")
    if config.min_tokens > N:
        return untouched(N, f"{N} tokens are fewer than the minimum of {config.min_tokens}", "min_tokens")
    n_dst = destinations(config.sx, config.sy, height, width)
    r = min(int(N * config.ratio), N - n_dst) if n_dst else 0
    if not config.merge_attn:
        return untouched(N, "self-attention is left out", "merge_attn", r=r)
    return method_named(config.method).plan(config, height, width, r)


def merged_tokens(config: AgentConfig, plan: LayerPlan) -> int:
    """Number of tokens that are really merged away in a block: none where no part of it works on merged tokens."""
    merges = config.merge_crossattn or config.merge_mlp or method_of(plan.action).merges
    return plan.r if merges else 0
