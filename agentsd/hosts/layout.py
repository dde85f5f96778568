"""Reading a U-Net's layout (`agentsd.costs.Layout`) off its modules, without running it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from torch import nn

from ..costs import PROMPT_TOKENS, Layout
from .sites import downsamples, find_sites

# Downsample at which a resampling module convolves, relative to that of its stage: LDM's begin with a Downsample and
# end with an Upsample, those of diffusers end with either
_RESAMPLED = {"Downsample": 1.0, "Upsample": 0.5, "Downsample2D": 2.0, "Upsample2D": 0.5}


def layout_of(unet: nn.Module, name: str = "") -> Layout:
    """Read a U-Net's layout, but for blocks of unknown level. Only shapes are read, so any device will do."""
    sites = [site for site in find_sites(unet) if site.downsample is not None]
    blocks = tuple(replace(site.place, channels=site.channels) for site in sites)
    prompted = [site.block.attn2 for site in sites if getattr(site.block, "attn2", None) is not None]
    constant = PROMPT_TOKENS * sum(_flops_per_position(to) for attn in prompted for to in (attn.to_k, attn.to_v))
    inside = {id(module) for site in sites for module in site.block.modules()}
    levels, kinds = dict(downsamples(unet)), {full: type(module).__name__ for full, module in unet.named_modules()}
    resampled = {full: _RESAMPLED[kind] for full, kind in kinds.items() if kind in _RESAMPLED}
    rest: Counter[int] = Counter()
    for full, module in unet.named_modules():
        flops = 0 if id(module) in inside else _flops_per_position(module)
        if isinstance(module, nn.Linear) and not full.endswith(("proj_in", "proj_out")):
            constant += flops  # timestep and class embeddings
        elif flops:
            tables = levels, resampled
            level, factor = (next((n for at, n in each.items() if full.startswith(at + ".")), 1) for each in tables)
            rest[int(level * factor)] += flops
    return Layout(name, blocks, tuple(sorted(rest.items())), constant)


def _flops_per_position(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d):
        return 2 * math.prod(module.kernel_size) * module.in_channels * module.out_channels // module.groups
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    return 0
