"""Where and when settings apply: blocks, rules, and how far the diffusion is. Imports no torch."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import accumulate
from math import exp, inf, log
from operator import mul
from types import MappingProxyType
from typing import Any

from .checks import Setting, reject

DOWNSAMPLES = (1, 2, 4, 8)
MAX_TIMESTEP = 1000
# A pattern of block names: rules as text use other characters as separators, and readers of infotexts balance brackets
_PATTERN = re.compile(r"([A-Za-z0-9_.*?!-]|\[[A-Za-z0-9_.*?!-]+\])+")
# Where and when a rule applies
LEVEL = Setting("downsample", "choice", None, choices=DOWNSAMPLES)
SINCE, UNTIL = (Setting(name, "number", default) for name, default in (("since", 0.0), ("until", 1.0)))


def progress_of(t: float) -> float:
    """Return the fraction of the diffusion that is done at timestep `t` of 0–1000."""
    # a quotient of whole numbers equals the float that `until` holds; 1 − t / 1000 may not
    return (MAX_TIMESTEP - t) / MAX_TIMESTEP


@cache
def _log_sigmas() -> list[float]:
    """ln σ of Stable Diffusion at its training steps: β is a square, linear in its root."""
    low, high = 0.00085**0.5, 0.012**0.5
    betas = ((low + (high - low) * step / (MAX_TIMESTEP - 1)) ** 2 for step in range(MAX_TIMESTEP))
    return [log((1 - kept) / kept) / 2 for kept in accumulate((1 - beta for beta in betas), mul)]


def progress_of_sigma(sigma: float) -> float:
    """Return the fraction of the diffusion that is done where Stable Diffusion has as much noise.

    Args:
        sigma: σ, the standard deviation of the noise over that of the images' scale, 0 or more: 14.6 is the beginning.
    """
    table, log_sigma = _log_sigmas(), log(sigma) if sigma > 0 else -inf
    i = bisect_right(table, log_sigma)
    if i in (0, MAX_TIMESTEP):
        return float(i == 0)
    return progress_of(i - 1 + (log_sigma - table[i - 1]) / (table[i] - table[i - 1]))


def progress_of_edm(t: float) -> float:
    """The same where the timestep is EDM's c_noise = ln σ / 4 (Karras et al., 2022, arXiv 2206.00364, table 1)."""
    return progress_of(t) if t > 2 else progress_of_sigma(exp(4 * t))  # no σ reaches e⁸; training steps do


def progress_of_flow(t: float) -> float:
    """The same where an image is (1 − t / 1000) · image + t / 1000 · noise."""
    return progress_of_sigma(t / (MAX_TIMESTEP - t)) if t < MAX_TIMESTEP else 0.0


Moment = Callable[[float], "float | None"]


class Timesteps:
    """Tells how far the diffusion is by the timesteps of a run, one call after the other.

    Args:
        told: maps a timestep to the fraction of the diffusion that is done; None: timesteps are training steps, 0–1000.
            Where they can't be, the whole run has no progress, rather than one that is taken for its end.
    """

    def __init__(self, told: Moment | None = None) -> None:
        self._told, self._last, self._steps = told, -inf, True

    def progress(self, t: float) -> float | None:
        """Return the fraction of the diffusion done at timestep `t` of the next call, 0–1; None if it isn't known."""
        if self._told is not None:
            try:
                progress = self._told(t)
                return progress if progress is not None and 0 <= progress <= 1 else None
            except Exception:  # the caller's; it must not cost the image
                return None
        if not t <= self._last:  # another run; none of training steps begins at 1 or between two of the last
            self._steps = t == 0 or 2 <= t <= MAX_TIMESTEP
        self._last, self._steps = t, self._steps and 0 <= t <= MAX_TIMESTEP
        return progress_of(t) if self._steps else None


@dataclass(frozen=True)
class Block:
    """Position of a transformer block in its U-Net."""

    name: str = ""
    downsample: int | None = None  # its level in the U-Net: 1, 2, 4 or 8; None if unknown
    largest_level: int = 1  # of the U-Net's largest self-attention layers, for which "auto" stands
    channels: int = 0  # C, the width of its tokens; 0 if it isn't told


ANYWHERE = Block()


@dataclass(frozen=True)
class Rule:
    """Settings that differ in some blocks or during a part of the diffusion.

    Args:
        settings: settings to override, by name; None means full attention.
        downsample: apply the rule only to blocks at this level of the U-Net: 1, 2, 4 or 8, or several of them. Empty:
            any level.
        blocks: apply the rule only to blocks whose full name matches this pattern, or one of several. `*` matches any
            characters, `?` any one character, `[...]` one of those listed. Empty: any block.
        since: progress at which the rule starts to apply, from 0 to below `until`.
        until: progress at which it stops, above 0 and at most 1; progress = 1 − t / 1000.

    Raises:
        SettingError: a value is outside its range; the message names it, the value and the range.
    """

    settings: Mapping[str, Any] | None = field(default_factory=dict)
    downsample: int | tuple[int, ...] = ()
    blocks: str | tuple[str, ...] = ()
    since: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        since, until = SINCE.check(self.since), UNTIL.check(self.until)
        if since >= until:
            raise reject("since", self.since, f"below until, which is {until}")
        if not (self.settings is None or isinstance(self.settings, Mapping)):
            raise reject("settings", self.settings, "a mapping of settings, or None for full attention")
        # a copy, which cannot change once a config has checked its names and values
        settings = None if self.settings is None else dict(self.settings)
        levels, blocks = (_several(values) for values in (self.downsample, self.blocks))
        levels, blocks = tuple(map(LEVEL.check, levels)), tuple(map(_checked_pattern, blocks))
        vars(self).update(settings=settings, downsample=levels, blocks=blocks, since=since, until=until)

    def __hash__(self) -> int:
        settings = None if self.settings is None else tuple(sorted(self.settings.items()))
        return hash((settings, self.downsample, self.blocks, self.since, self.until))

    @property
    def timed(self) -> bool:
        """Whether it applies during only a part of the diffusion."""
        return self.since > 0.0 or self.until < 1.0

    def holds(self, progress: float | None) -> bool:
        """Whether it applies at `progress`, the fraction of the diffusion that is done."""
        inside = progress is not None and self.since <= progress and (progress < self.until or self.until == 1.0)
        return inside or not self.timed

    def names(self, block: Block) -> bool:
        """Whether it applies to this block."""
        named = not self.blocks or any(fnmatchcase(block.name, pattern) for pattern in self.blocks)
        levels: Any = self.downsample  # a tuple, since it was checked
        return named and (not levels or block.downsample in levels)


def _several(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list, set, frozenset)):
        return tuple(value)
    return () if value is None or value == "" else (value,)


def _checked_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
        allowed = "a pattern of block names, of letters, digits and _ . * ? ! - and characters in brackets [ ]"
        raise reject("blocks", pattern, allowed)
    return pattern


def Stage(until: float, settings: Mapping[str, Any] | None = MappingProxyType({})) -> Rule:
    """Make a rule for all blocks until `until`, as one of `AgentConfig.stages`; `settings` as in `Rule`."""
    return Rule(settings, until=until)
