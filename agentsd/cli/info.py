"""info: show which layers of a model would be patched at which size, and what that saves."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..config import AgentConfig
from ..costs import Layout, LevelEstimate, estimate, share_of_run
from ..hosts import find_unet
from ..hosts.layout import layout_of
from ..methods import LayerPlan
from ..patching.patch import Patch
from ..settings import to_config
from .models import bare_unet
from .pictures import print_table
from .tuned import loaded

GIGA = 1e9
HEAD = ("", "down", "blocks", "channels", "tokens", "queries", "agents", "GFLOPs", "left", "self-attention")
_TOLD = ("action", "tokens", "queries", "agents", "reason", "note")


def info(args: argparse.Namespace) -> None:
    """Show what the settings would do to a model's layers, without running it or reading its weights."""
    bare, side, factor = bare_unet(args.model, args.download)
    unet = find_unet(bare)
    layout = layout_of(unet, args.model)
    config = loaded(args.tuning, unet).config_for(unet) if args.tuning else to_config(args.settings)
    sizes = args.size or [(side * factor, side * factor)]
    if args.json:
        found = [_as_record(layout, config, size, factor) for size in sizes]
        print(json.dumps({"model": args.model, "sizes": found}, indent=1))
        return
    print(f"{args.model}: {layout.layers} transformer blocks")
    for size in sizes:
        height, width = (side // factor for side in size)
        print(f"\n{size[1]}×{size[0]} pixels, a latent of {width}×{height}")
        for since, until in config.parts():
            cost = estimate(layout, config, height, width, since)
            changed = cost.flops_left != cost.flops or cost.layers
            print(f"\n  {since:.0%} to {until:.0%} of the diffusion:", "" if changed else "nothing is changed")
            print_table(HEAD, [_row(level) for level in cost.levels])
            print(f"  U-Net: {cost.flops / GIGA:.4g} GFLOPs, {cost.flops_left / GIGA:.4g} are left ({cost.share:.1%})")
        share = share_of_run(layout, config, height, width)
        print(f"\n  the whole diffusion: {share:.1%} of the unpatched U-Net's FLOPs")
        for since, until in config.parts() if args.layers else ():
            print(f"\n  layers, {since:.0%} to {until:.0%}:")
            for name, plan in Patch(unet, config).explain(height, width, since):
                print(f"    {name}: {'full attention' if plan is None else _what(plan)}")


def _row(level: LevelEstimate) -> list[str]:
    plan = level.plan
    numbers = [level.downsample, level.count, level.channels, plan.tokens, plan.queries, plan.agents or "–"]
    flops = [f"{level.count * x / GIGA:.4g}" for x in (level.flops, level.flops_left)]
    return [f"  {level.size[1]}×{level.size[0]}", *map(str, numbers), *flops, _what(plan)]


def _what(plan: LayerPlan) -> str:
    if not plan.acts:
        return f"untouched: {plan.reason}"
    cells = f", cells of {plan.cell[1]}×{plan.cell[0]}" if plan.cell else ""
    return plan.method.phrase + cells + (f" ({plan.note})" if plan.note else "")


def _as_record(layout: Layout, config: AgentConfig, size: tuple[int, int], factor: int) -> dict[str, Any]:
    height, width = (side // factor for side in size)
    parts: list[dict[str, Any]] = []
    for since, until in config.parts():
        cost = estimate(layout, config, height, width, since)
        parts.append({"since": since, "until": until, "flops": cost.flops, "flops_left": cost.flops_left, "levels": []})
        for level in cost.levels:
            about = {"downsample": level.downsample, "blocks": level.count, "channels": level.channels}
            plan = {name: getattr(level.plan, name) for name in _TOLD}
            parts[-1]["levels"].append({**about, **plan, "flops": level.flops, "flops_left": level.flops_left})
    share = share_of_run(layout, config, height, width)
    return {"width": size[1], "height": size[0], "latent": [height, width], "share": share, "parts": parts}
