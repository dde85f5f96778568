"""Cost model: the tokens, agents, layers and floating-point operations (FLOPs) of a U-Net under a config.

Imports neither torch nor a host. Layouts of the usual U-Nets are in costs.json; `agentsd.hosts.layout` reads one off a
model. `agentsd.plan` decides what is done in a layer, and the method knows what that costs.

FLOPs are those of matrix products and convolutions, two per multiply-add, for one row of the batch and a prompt of 77
tokens: what `torch.utils.flop_counter` counts. FLOPs are not time: sorting, gathering and memory traffic take time but
no FLOPs, and a fused attention kernel is faster per FLOP than most.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .attention.grid import Grid, destinations
from .config import AgentConfig
from .methods import LayerPlan, untouched
from .plan import merged_tokens, plan_block
from .schedule import Block

PROMPT_TOKENS = 77
COSTS_FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class CountedBlock:
    """A transformer block: its name, its level in the U-Net (1, 2, 4 or 8), and C, the width of a token."""

    name: str
    downsample: int
    channels: int


@dataclass(frozen=True)
class Layout:
    """What the cost model needs to know of a U-Net.

    Attributes:
        name: the U-Net's common name.
        blocks: its transformer blocks, in order.
        rest: (level, FLOPs per position of that level) of everything outside the transformer blocks.
        constant: FLOPs that do not depend on the image size: timestep embedding, keys and values of the prompt.
    """

    name: str
    blocks: tuple[CountedBlock, ...]
    rest: tuple[tuple[int, int], ...]
    constant: int

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @cached_property
    def places(self) -> tuple[Block, ...]:
        """Position of each block, for `agentsd.plan`."""
        largest_level = min((block.downsample for block in self.blocks), default=1)
        return tuple(Block(block.name, block.downsample, largest_level) for block in self.blocks)


@cache
def layouts() -> dict[str, Layout]:
    """Return the layouts that are known without a model: "SD 1", "SD 2" and "SDXL"."""
    data = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    return {
        each["name"]: Layout(
            each["name"],
            tuple(CountedBlock(*block) for block in each["blocks"]),
            tuple((level, flops) for level, flops in each["rest"]),
            each["constant"],
        )
        for each in data["layouts"]
    }


@dataclass(frozen=True)
class LevelEstimate:
    """Estimate for a group of identical blocks under the same plan.

    Attributes:
        downsample: their level in the U-Net.
        channels: C, the width of a token.
        count: number of blocks.
        size: (height, width) of their tokens.
        plan: what is done in each block.
        flops: FLOPs of one block unpatched, for one row of the batch.
        flops_left: FLOPs of one block patched.
    """

    downsample: int
    channels: int
    count: int
    size: tuple[int, int]
    plan: LayerPlan
    flops: int
    flops_left: int


@dataclass(frozen=True)
class Estimate:
    """Estimate for one forward pass of a U-Net under a config.

    Attributes:
        levels: the estimate for each kind of block, largest first.
        flops: FLOPs of the unpatched U-Net, one row of the batch.
        flops_left: FLOPs of the patched U-Net.
    """

    levels: tuple[LevelEstimate, ...]
    flops: int
    flops_left: int

    @property
    def share(self) -> float:
        """Share of the U-Net's FLOPs that is left; 1 if nothing changes, above 1 if the settings cost more."""
        return self.flops_left / self.flops

    @property
    def layers(self) -> int:
        """Number of blocks with changed self-attention."""
        return sum(level.count for level in self.changed)

    @property
    def changed(self) -> tuple[LevelEstimate, ...]:
        """The kinds of blocks with changed self-attention."""
        return tuple(level for level in self.levels if level.plan.acts)


def block_flops(channels: int, size: tuple[int, int], plan: LayerPlan, config: AgentConfig | None) -> int:
    """Count the FLOPs of one transformer block under `plan`.

    Self-attention is counted by its method (`Method.flops`), 8 N C² + 4 N² C where it is full; cross-attention takes
    4 N C² + 4 · 77 · N C, and the gated feed-forward layer 24 N C².

    Args:
        channels: C, the width of a token.
        size: (height, width) of the layer's tokens.
        plan: what is done in the layer.
        config: the settings in force there; None for full attention.
    """
    C, N = channels, plan.tokens
    r = 0 if config is None else merged_tokens(config, plan)
    cross = N - r if config is not None and config.merge_crossattn else N
    feed = N - r if config is not None and config.merge_mlp else N
    total = plan.method.flops(plan, C)
    total += 4 * cross * C * C + 4 * PROMPT_TOKENS * cross * C
    total += 24 * feed * C * C
    if config is not None and (plan.agent_r or r):
        n_dst = destinations(config.sx, config.sy, *size)
        total += 2 * (N - n_dst) * n_dst * C  # similarity of each source token to each destination token
    return total


def estimate(
    layout: Layout, config: AgentConfig | None, height: int, width: int, progress: float | None = None
) -> Estimate:
    """Estimate one forward pass of a U-Net under `config` (None: unpatched) for a latent of `height` × `width`.

    Args:
        layout: the U-Net, one of `layouts()` or read off a model by `agentsd.hosts.layout.layout_of`.
        config: the settings, with their stages and rules.
        height: rows of the latent (image height / 8).
        width: columns of the latent.
        progress: fraction of the diffusion done, 0–1; needed only where settings vary over the diffusion.
    """
    kinds: Counter[tuple[Any, ...]] = Counter()
    for block, place in zip(layout.blocks, layout.places, strict=True):
        planned = None if config is None else plan_block(config, place, (height, width), progress)
        kinds[block.downsample, block.channels, planned] += 1
    levels = [_level(*kind, count, (height, width)) for kind, count in kinds.items()]
    levels.sort(key=lambda level: (level.downsample, level.channels))
    rest = layout.constant + sum(flops * Grid(height, width).at(level).tokens for level, flops in layout.rest)
    flops = rest + sum(level.count * level.flops for level in levels)
    left = rest + sum(level.count * level.flops_left for level in levels)
    return Estimate(tuple(levels), flops, left)


def _level(
    downsample: int, channels: int, planned: tuple[AgentConfig, LayerPlan] | None, count: int, latent: tuple[int, int]
) -> LevelEstimate:
    size = Grid(*latent).at(downsample)
    full = untouched(size.tokens, "full attention was asked for", "rules")
    config, plan = planned or (None, full)
    unpatched = block_flops(channels, size, full, None)
    return LevelEstimate(downsample, channels, count, size, plan, unpatched, block_flops(channels, size, plan, config))


def share_of_run(layout: Layout, config: AgentConfig, height: int, width: int, start: float = 0.0) -> float:
    """Return the share of FLOPs left over a whole pass, averaged over timesteps, which is close to that over steps.

    Args:
        layout: the U-Net.
        config: the settings, with their stages and rules.
        height: rows of the latent.
        width: columns of the latent.
        start: progress at which the pass begins, 0–1: 1 − denoising strength.
    """
    if not config.timed:
        return estimate(layout, config, height, width).share
    if start >= 1.0:
        return 1.0
    total = sum(
        (until - max(since, start)) * estimate(layout, config, height, width, since).share
        for since, until in config.parts()
        if until > start
    )
    return total / (1.0 - start)
