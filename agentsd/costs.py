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
from functools import cache
from pathlib import Path
from typing import Any

from .attention.grid import Grid, destinations
from .config import AgentConfig
from .methods import LayerPlan, untouched
from .plan import merged_tokens, plan_block
from .schedule import Block

PROMPT_TOKENS = 77


@dataclass(frozen=True)
class Layout:
    """What the cost model needs to know of a U-Net."""

    name: str  # the U-Net's common name
    blocks: tuple[Block, ...]  # its transformer blocks, in order
    # (level, FLOPs per position of that level) of everything outside the transformer blocks
    rest: tuple[tuple[int, int], ...]
    constant: int  # FLOPs that do not depend on the image size: timestep embedding, keys and values of the prompt


@cache
def layouts() -> dict[str, Layout]:
    """Return the layouts that are known without a model: "SD 1", "SD 2" and "SDXL"."""
    known = {}
    for data in json.loads(Path(__file__).with_name("costs.json").read_text(encoding="utf-8"))["layouts"]:
        largest = min(level for _, level, _ in data["blocks"])
        blocks = tuple(Block(name, level, largest, channels) for name, level, channels in data["blocks"])
        known[data["name"]] = Layout(data["name"], blocks, tuple(map(tuple, data["rest"])), data["constant"])
    return known


@dataclass(frozen=True)
class LevelEstimate:
    """Estimate for a group of identical blocks under the same plan."""

    downsample: int  # their level in the U-Net
    channels: int  # C, the width of a token
    count: int  # number of blocks
    size: tuple[int, int]  # (height, width) of their tokens
    plan: LayerPlan  # what is done in each block
    flops: int  # FLOPs of one block unpatched, for one row of the batch
    flops_left: int  # FLOPs of one block patched


@dataclass(frozen=True)
class Estimate:
    """Estimate for one forward pass of a U-Net under a config."""

    levels: tuple[LevelEstimate, ...]  # the estimate for each kind of block, largest first
    flops: int  # FLOPs of the unpatched U-Net, one row of the batch
    flops_left: int  # FLOPs of the patched U-Net

    @property
    def share(self) -> float:
        """Share of the U-Net's FLOPs that is left; 1 if nothing changes, above 1 if the settings cost more."""
        return self.flops_left / self.flops

    @property
    def changed(self) -> tuple[LevelEstimate, ...]:
        """The kinds of blocks with changed self-attention."""
        return tuple(level for level in self.levels if level.plan.acts)


def _block_flops(channels: int, size: tuple[int, int], plan: LayerPlan, config: AgentConfig | None) -> int:
    """Count the FLOPs of one transformer block of `size` = (height, width) tokens of width C = `channels`.

    Self-attention is counted by its method (`Method.flops`), 8 N C² + 4 N² C where it is full; cross-attention takes
    4 N C² + 4 · 77 · N C, and the gated feed-forward layer 24 N C². `config` is in force there; None: full attention.
    """
    C, N, r, n_dst = channels, plan.tokens, 0, 0
    cross = feed = N
    if config is not None:
        r = merged_tokens(config, plan)
        cross, feed = N - r * config.merge_crossattn, N - r * config.merge_mlp
        n_dst = destinations(config.sx, config.sy, *size) if plan.agent_r or r else 0
    # the last: similarity of each source token to each destination token
    outside = 4 * cross * C * C + 4 * PROMPT_TOKENS * cross * C + 24 * feed * C * C + 2 * (N - n_dst) * n_dst * C
    return plan.method.flops(plan, C) + outside


def estimate(
    layout: Layout, config: AgentConfig | None, height: int, width: int, progress: float | None = None
) -> Estimate:
    """Estimate one forward pass of a U-Net under `config` (None: unpatched) for a latent of `height` × `width`.

    `layout` is one of `layouts()`, or read off a model by `agentsd.hosts.layout.layout_of`; `progress`, 0–1, is needed
    only where settings vary over the diffusion.
    """
    latent, kinds = Grid(height, width), Counter[Any]()
    for block in layout.blocks:
        kinds[block.downsample, block.channels, config and plan_block(config, block, latent, progress)] += 1
    levels = []
    for (downsample, channels, planned), count in sorted(kinds.items(), key=lambda kind: kind[0][:2]):
        size = latent.at(downsample)
        full = untouched(size.tokens, "full attention was asked for", "rules")
        in_force, plan = planned or (None, full)
        unpatched, patched = (_block_flops(channels, size, *how) for how in ((full, None), (plan, in_force)))
        levels.append(LevelEstimate(downsample, channels, count, size, plan, unpatched, patched))
    rest = layout.constant + sum(flops * latent.at(level).tokens for level, flops in layout.rest)
    flops = rest + sum(level.count * level.flops for level in levels)
    left = rest + sum(level.count * level.flops_left for level in levels)
    return Estimate(tuple(levels), flops, left)
