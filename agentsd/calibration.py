"""Find the token count above which agent attention is faster, on the machine that will run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .apply import patch_unet
from .checks import SettingError
from .clock import timed
from .config import AgentConfig
from .hosts import Site, UnsupportedModelError, find_sites, find_unet
from .hosts.base import weight_of
from .hosts.single import SingleAttention
from .plan import deepest_level

SIZES = (256, 384, 512, 640, 768, 1024)
MIN_SIDE, MAX_SIDE = 64, 8192
# The panel's default: grid agents over 4×4 tokens.
GRID = AgentConfig(ratio=0.0, agent_source="grid")
# Time ratio up to which a layer counts as faster: a smaller gain is noise.
_WORTH = 0.98
# Time ratio below which no larger size needs timing: the gain grows with the number of tokens.
_CLEAR = 0.5
_ROUNDS = 7


@dataclass(frozen=True)
class Timing:
    """Timings of one self-attention layer, with and without the patch.

    Attributes:
        tokens: N, the number of tokens of the layer.
        channels: C, the width of a token.
        unpatched: seconds per call of the host's own attention.
        patched: seconds per call with the patch.
    """

    tokens: int
    channels: int
    unpatched: float
    patched: float


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        min_tokens: proposed value of the setting of that name: the smallest number of tokens at or above which every
            timed layer was faster with the patch. One more than the largest layer's tokens if none was.
        timings: the underlying measurements, sorted by number of tokens.
    """

    min_tokens: int
    timings: tuple[Timing, ...]


@torch.no_grad()
def calibrate(
    model: Any,
    sizes: Iterable[int | tuple[int, int]] = SIZES,
    *,
    config: AgentConfig = GRID,
    batch: int = 2,
    seconds: float = 5.0,
    dtype: torch.dtype | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Calibration:
    """Time a model's own self-attention layers with and without the patch, and propose `min_tokens`.

    Run single layers only, on random tokens, for a few seconds in total. The model is left as it was, patched or not.
    Note that `min_tokens` changes the image: layers below it are left alone.

    Args:
        model: as for `apply_patch`.
        sizes: image sizes in pixels: the side of a square or (height, width), from 64 to 8192.
        config: the settings to time; their `min_tokens`, stages and rules are ignored.
        batch: batch size, at least 1; 2 for cond and uncond.
        seconds: time budget in seconds, above 0. Sizes that would exceed it are skipped.
        dtype: dtype of the tokens; None means that of the weights.
        tick: called after every timed call of a layer; may raise to stop.

    Raises:
        SettingError: an argument is outside its range.
        UnsupportedModelError: the model has no self-attention that could be patched.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise SettingError(f"batch must be a whole number from 1, got {batch!r}")
    if not seconds > 0:
        raise SettingError(f"seconds must be above 0, got {seconds!r}")
    pixel_sizes = sorted({_checked_size(size) for size in sizes}, key=lambda size: size[0] * size[1])
    if not pixel_sizes:
        raise SettingError("sizes must name at least one size in pixels, got none")
    timings: list[Timing] = []
    layers = _distinct(find_sites(find_unet(model)), config)
    if not layers:
        raise UnsupportedModelError("none of the model's self-attentions can be patched")
    for layer in layers:
        timings += _time_layer(layer, pixel_sizes, _always(config), batch, seconds / len(layers), dtype, tick)
    return Calibration(_threshold(timings), tuple(sorted(timings, key=lambda t: (t.tokens, t.channels))))


def _checked_size(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    if len(pair) != 2 or not whole or not all(MIN_SIDE <= side <= MAX_SIDE for side in pair):
        raise SettingError(
            f"sizes must be sides or (height, width) in pixels from {MIN_SIDE} to {MAX_SIDE}, got {size!r}"
        )
    return pair


def _always(config: AgentConfig) -> AgentConfig:
    """Make the settings apply at any number of tokens, and at level 1, which is where a single layer sits."""
    return replace(config, min_tokens=0, stages=(), rules=(), max_downsample=1)


def _distinct(sites: list[Site], config: AgentConfig) -> list[Site]:
    """Pick one site per (downsample, channels), down to the config's limit, or to the first level with any."""
    usable = [site for site in sites if site.downsample is not None and not site.obstacle]
    first = min((site.downsample for site in usable), default=1)
    deepest = max(deepest_level(config, first), first)
    kinds = {(site.downsample, site.channels): site for site in usable if site.downsample <= deepest}
    return list(kinds.values())


def _time_layer(
    site: Site,
    sizes: list[tuple[int, int]],
    config: AgentConfig,
    batch: int,
    seconds: float,
    dtype: torch.dtype | None,
    tick: Callable[[], None],
) -> list[Timing]:
    """Time one layer at increasing sizes, until the gain is clear or the time is up."""
    weight = weight_of(site.block.attn1)
    unit = 8 * (site.downsample or 1)
    end, timings = time.perf_counter() + seconds, []
    for height, width in sizes:
        h, w = -(-height // unit), -(-width // unit)
        if timings and _forecast(timings[-1], h * w) > end - time.perf_counter():
            break
        image = torch.randn(batch, h, w, site.channels, device=weight.device)
        image = image.to(dtype or weight.dtype).permute(0, 3, 1, 2)
        timings.append(Timing(h * w, site.channels, *_time_both(site, image, config, end, tick)))
        if timings[-1].patched < _CLEAR * timings[-1].unpatched:
            break
    return timings


def _forecast(last: Timing, tokens: int) -> float:
    """Estimate the seconds that two rounds at `tokens` tokens will take."""
    return 2 * (last.unpatched + last.patched) * (tokens / last.tokens) ** 2


def _time_both(
    site: Site, image: Tensor, config: AgentConfig, end: float, tick: Callable[[], None]
) -> tuple[float, float]:
    """Measure the seconds per call without and with the patch: medians over at least one interleaved round."""
    layer = SingleAttention(site)
    unpatched, patched = [], []
    for round_ in range(1 + _ROUNDS):
        unpatched.append(timed(partial(layer, image, 500.0), image.device)[1])
        tick()
        patch = patch_unet(layer, config)
        try:
            patched.append(timed(partial(layer, image, 500.0), image.device)[1])
        finally:
            patch.remove()
        tick()
        if round_ and time.perf_counter() > end:
            break
    return median(unpatched[1:]), median(patched[1:])  # the first is a warm-up


def _threshold(timings: list[Timing]) -> int:
    """Return the smallest number of tokens at or above which no layer was slower."""
    best = max((t.tokens for t in timings), default=0) + 1
    for tokens in sorted({t.tokens for t in timings}, reverse=True):
        if any(t.tokens == tokens and t.patched > _WORTH * t.unpatched for t in timings):
            break
        best = tokens
    return best
