"""What a config does to a U-Net's arithmetic: tokens, agents, layers and floating-point operations (FLOPs).

Imports neither torch nor a host. javascript/agent_attention.js holds the same arithmetic, number for number: the
layouts of both are in costs.json, and tests/cases/costs.json is a table that both must reproduce.

FLOPs are those of matrix products and convolutions, two for each multiply-add, for one row of the batch and a prompt
of 77 tokens: what `torch.utils.flop_counter` counts. They are not time: sorting, gathering and memory traffic cost time
and no FLOPs, and a fused attention kernel is faster per FLOP than most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .config import FIT_STEPS, AgentConfig, LayerPlan, destinations, plan_layer

PROMPT_TOKENS = 77
COSTS_FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class BlockGroup:
    """Transformer blocks that are alike.

    Attributes:
        downsample: how far down the U-Net they are: 1, 2, 4 or 8.
        channels: C, the width of a token.
        count: how many there are.
    """

    downsample: int
    channels: int
    count: int


@dataclass(frozen=True)
class Layout:
    """What a U-Net is made of, as far as its arithmetic goes.

    Attributes:
        name: what people call it.
        blocks: its transformer blocks.
        rest: (downsample, FLOPs per position of that level) of everything outside the transformer blocks.
        constant: FLOPs that do not depend on the image's size: timestep embedding, keys and values of the prompt.
    """

    name: str
    blocks: tuple[BlockGroup, ...]
    rest: tuple[tuple[int, int], ...]
    constant: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """The layout that `to_dict` wrote."""
        blocks = tuple(BlockGroup(**group) for group in data["blocks"])
        rest = tuple((level, flops) for level, flops in data["rest"])
        return cls(data["name"], blocks, rest, data["constant"])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return asdict(self)

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return sum(group.count for group in self.blocks)


@cache
def layouts() -> dict[str, Layout]:
    """The layouts that are known without a model: "SD 1", "SD 2" and "SDXL"."""
    data = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    return {entry["name"]: Layout.from_dict(entry) for entry in data["layouts"]}


@dataclass(frozen=True)
class LevelEstimate:
    """What happens in one group of blocks: the group, the plan of each of its blocks, and a block's FLOPs."""

    group: BlockGroup
    plan: LayerPlan
    flops: int
    flops_left: int


@dataclass(frozen=True)
class Estimate:
    """What a config does to one forward pass of a U-Net.

    Attributes:
        levels: what happens in each group of blocks.
        flops: FLOPs of the unpatched U-Net, one row of the batch.
        flops_left: FLOPs of the patched one.
    """

    levels: tuple[LevelEstimate, ...]
    flops: int
    flops_left: int

    @property
    def share(self) -> float:
        """Share of the U-Net's FLOPs that is left; 1 where nothing happens. Above 1 if the settings cost more."""
        return self.flops_left / self.flops

    @property
    def layers(self) -> int:
        """Number of blocks whose self-attention is changed."""
        return sum(level.group.count for level in self.acted)

    @property
    def acted(self) -> tuple[LevelEstimate, ...]:
        """The groups whose self-attention is changed."""
        return tuple(level for level in self.levels if level.plan.action != "untouched")


def block_flops(channels: int, height: int, width: int, downsample: int, config: AgentConfig | None) -> int:
    """FLOPs of one transformer block under `config` (its stages aside; None: of an unpatched block).

    Self-attention takes 8 N C² for the four projections and 4 N² C for its two products; agents take 4 N n C for each
    of their two steps (section 3.2 of the paper); cross-attention takes 4 N C² + 4 · 77 · N C, and the gated
    feed-forward 24 N C².

    Args:
        channels: C, the width of a token.
        height: rows of the layer's tokens.
        width: columns of the layer's tokens.
        downsample: how far down the U-Net it is.
        config: the settings.
    """
    config = config or UNPATCHED
    plan = plan_layer(config, height, width, downsample)
    C, N = channels, plan.tokens
    cross = N - plan.r if config.merge_crossattn else N
    feed = N - plan.r if config.merge_mlp else N
    total = _self_attention_flops(C, plan)
    total += 4 * cross * C * C + 4 * PROMPT_TOKENS * cross * C
    total += 24 * feed * C * C
    if plan.agent_r or (plan.r and _merges(config, plan)):
        n_dst = destinations(config, height, width)
        total += 2 * (N - n_dst) * n_dst * C  # similarity of each source token to each destination token
    return total


UNPATCHED = AgentConfig(ratio=0.0, merge_attn=False, max_downsample=8)


def _merges(config: AgentConfig, plan: LayerPlan) -> bool:
    return config.merge_crossattn or config.merge_mlp or plan.action in ("agents", "merge")


def _self_attention_flops(C: int, plan: LayerPlan) -> int:
    N, M, n = plan.tokens, plan.queries, plan.agents
    if plan.action == "agents":
        # with merged queries the agents are projected on their own; without, they are pooled from the queries
        return 8 * M * C * C + (2 * n * C * C if plan.r else 0) + 8 * n * M * C
    if plan.action == "merge":
        return 8 * M * C * C + 4 * M * M * C
    if plan.action == "pool":
        return 8 * N * C * C + 4 * N * n * C
    if plan.action == "corrected":
        # full attention at n queries, n × n weights and their fit, attention of all queries to n keys
        return 8 * N * C * C + 8 * n * N * C + (4 + 4 * FIT_STEPS) * n * n * C
    return 8 * N * C * C + 4 * N * N * C


def estimate(layout: Layout, config: AgentConfig | None, height: int, width: int) -> Estimate:
    """What `config` (its stages aside; None: nothing) does to a U-Net for a latent of `height` × `width`.

    Args:
        layout: the U-Net, one of `layouts()` or what `agentsd.layout.layout_of` reads off a model.
        config: the settings.
        height: rows of the latent (image height / 8).
        width: columns of the latent.
    """
    levels = tuple(_level(group, config, height, width) for group in layout.blocks)
    rest = layout.constant + sum(flops * positions(height, width, level) for level, flops in layout.rest)
    flops = rest + sum(level.group.count * level.flops for level in levels)
    left = rest + sum(level.group.count * level.flops_left for level in levels)
    return Estimate(levels, flops, left)


def _level(group: BlockGroup, config: AgentConfig | None, height: int, width: int) -> LevelEstimate:
    d = group.downsample
    h, w = -(-height // d), -(-width // d)
    plan = plan_layer(config or UNPATCHED, h, w, d)
    return LevelEstimate(
        group,
        plan,
        flops=block_flops(group.channels, h, w, d, None),
        flops_left=block_flops(group.channels, h, w, d, config),
    )


def positions(height: int, width: int, downsample: int) -> int:
    """Positions of a level of the U-Net: ⌈height / downsample⌉ · ⌈width / downsample⌉."""
    return -(-height // downsample) * -(-width // downsample)


def share_of_run(layout: Layout, config: AgentConfig, height: int, width: int, start: float = 0.0) -> float:
    """Share of the FLOPs that is left over a whole pass, averaged over the timesteps; nearly that over the steps.

    Args:
        layout: the U-Net.
        config: the settings, with their stages.
        height: rows of the latent.
        width: columns of the latent.
        start: fraction of the diffusion done when the pass begins, 0–1: 1 − denoising strength.
    """
    if not config.stages:
        return estimate(layout, config, height, width).share
    if start >= 1.0:
        return 1.0
    total, low = 0.0, start
    for stage in config.stages:
        if stage.until > low:
            total += (stage.until - low) * estimate(layout, config.within(stage), height, width).share
            low = stage.until
    return (total + (1.0 - low)) / (1.0 - start)
