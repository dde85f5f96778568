"""info: which layers of a model would be patched at which size, and what that saves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..config import AgentConfig, LayerPlan
from ..costs import Estimate, Layout, LevelEstimate, estimate, share_of_run
from ..hosts import find_unet, first_downsample
from ..layout import layout_of
from ..patch import Patch
from .commands import print_table
from .options import config_of
from .structure import bare_unet

GIGA = 1e9


def info(args: argparse.Namespace) -> None:
    """Say what the settings would do to a model's layers; nothing is run and no weights are read."""
    bare, side, factor = bare_unet(args.model, args.download)
    unet = find_unet(bare)
    layout = layout_of(unet, args.model)
    config = config_of(args.settings, first_downsample(unet))
    sizes = args.size or [(side * factor, side * factor)]
    if args.json:
        print(
            json.dumps({"model": args.model, "sizes": [_as_record(layout, config, s, factor) for s in sizes]}, indent=1)
        )
        return
    print(f"{args.model}: {layout.layers} transformer blocks")
    for size in sizes:
        _print_size(layout, config, size, factor)
        if args.layers:
            _print_layers(Patch(unet, config), config, size, factor)


def parts_of(config: AgentConfig) -> Iterator[tuple[float, float, AgentConfig | None]]:
    """(from, until, what holds there) for each part of the diffusion."""
    begin = 0.0
    for stage in config.stages:
        yield begin, stage.until, config.within(stage)
        begin = stage.until
    if not config.stages:
        yield 0.0, 1.0, config
    elif begin < 1.0:
        yield begin, 1.0, None


def _print_size(layout: Layout, config: AgentConfig, size: tuple[int, int], factor: int) -> None:
    height, width = (side // factor for side in size)
    print(f"\n{size[1]} × {size[0]} pixels, a latent of {width} × {height}")
    for begin, end, part in parts_of(config):
        print(f"\n  {begin:.0%} to {end:.0%} of the diffusion:", "the model as it is" if part is None else "")
        if part is not None:
            _print_levels(estimate(layout, part, height, width), height, width)
    share = share_of_run(layout, config, height, width)
    print(f"\n  the whole diffusion: {share:.1%} of the unpatched U-Net's FLOPs")


def _print_levels(found: Estimate, height: int, width: int) -> None:
    rows = [_row(level, height, width) for level in found.levels]
    print_table(
        ["", "down", "blocks", "channels", "tokens", "queries", "agents", "GFLOPs", "left", "self-attention"], rows
    )
    print(f"  U-Net: {found.flops / GIGA:.4g} GFLOPs, {found.flops_left / GIGA:.4g} are left ({found.share:.1%})")


def _row(level: LevelEstimate, height: int, width: int) -> list[str]:
    group, plan = level.group, level.plan
    d = group.downsample
    numbers = [d, group.count, group.channels, plan.tokens, plan.queries, plan.agents or "–"]
    flops = [f"{group.count * x / GIGA:.4g}" for x in (level.flops, level.flops_left)]
    return [f"  {-(-width // d)} × {-(-height // d)}", *map(str, numbers), *flops, _what(plan)]


def _what(plan: LayerPlan) -> str:
    if plan.action == "untouched":
        return f"untouched: {plan.reason}"
    return plan.action + (f", cells of {plan.cell[1]} × {plan.cell[0]}" if plan.cell else "")


def _print_layers(patch: Patch, config: AgentConfig, size: tuple[int, int], factor: int) -> None:
    height, width = (side // factor for side in size)
    for begin, end, part in parts_of(config):
        if part is None:
            continue
        print(f"\n  layers, {begin:.0%} to {end:.0%}:")
        for name, plan in patch.explain(height, width, (begin + end) / 2):
            print(f"    {name}: {'its place is unknown' if plan is None else _what(plan)}")


def _as_record(layout: Layout, config: AgentConfig, size: tuple[int, int], factor: int) -> dict[str, Any]:
    height, width = (side // factor for side in size)
    parts = []
    for begin, end, part in parts_of(config):
        found = estimate(layout, part, height, width)
        levels = [_level_record(level) for level in found.levels] if part else []
        parts.append(
            {"since": begin, "until": end, "flops": found.flops, "flops_left": found.flops_left, "levels": levels}
        )
    share = share_of_run(layout, config, height, width)
    return {"width": size[1], "height": size[0], "latent": [height, width], "share": share, "parts": parts}


def _level_record(level: LevelEstimate) -> dict[str, Any]:
    plan, group = level.plan, level.group
    return {
        "downsample": group.downsample,
        "blocks": group.count,
        "channels": group.channels,
        "action": plan.action,
        "tokens": plan.tokens,
        "queries": plan.queries,
        "agents": plan.agents,
        "reason": plan.reason,
        "flops": level.flops,
        "flops_left": level.flops_left,
    }
