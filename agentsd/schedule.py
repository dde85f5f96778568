"""Where and when settings apply: blocks, rules, stages, and how far the diffusion is. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .checks import checked_choice, checked_fraction, checked_overrides, reject

DOWNSAMPLES = (1, 2, 4, 8)
MAX_TIMESTEP = 1000
# Characters of a pattern of block names. Rules as text use others as separators.
_PATTERN = re.compile(r"[\w.*?\[\]!-]+")


def progress_of(t: float) -> float:
    """Return the fraction of the diffusion that is done at timestep `t` of 0–1000."""
    return 1 - t / MAX_TIMESTEP


def timestep_at(progress: float) -> float:
    """Return the timestep, 0–999, at which the fraction `progress` of the diffusion is done."""
    return (1 - progress) * (MAX_TIMESTEP - 1)


def _hashable(settings: Mapping[str, Any] | None) -> Any:
    return None if settings is None else tuple(sorted(settings.items()))


@dataclass(frozen=True)
class Block:
    """Position of a transformer block in its U-Net.

    Attributes:
        name: the block's name.
        downsample: its level in the U-Net: 1, 2, 4 or 8; None if unknown.
        largest_level: level of the U-Net's largest self-attention layers, which is what "auto" stands for.
    """

    name: str = ""
    downsample: int | None = None
    largest_level: int = 1


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
        since, until = checked_fraction("since", self.since), checked_fraction("until", self.until)
        if since >= until:
            raise reject("since", self.since, f"below until, which is {until}")
        levels = tuple(checked_choice("downsample", d, {"choices": DOWNSAMPLES}) for d in _several(self.downsample))
        for name, value in (
            ("settings", checked_overrides(self.settings)),
            ("downsample", levels),
            ("blocks", tuple(_checked_pattern(pattern) for pattern in _several(self.blocks))),
            ("since", since),
            ("until", until),
        ):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((_hashable(self.settings), self.downsample, self.blocks, self.since, self.until))

    @property
    def timed(self) -> bool:
        """Whether it applies during only a part of the diffusion."""
        return self.since > 0.0 or self.until < 1.0

    def holds(self, progress: float | None) -> bool:
        """Whether it applies at `progress`, the fraction of the diffusion that is done."""
        if not self.timed:
            return True
        return progress is not None and self.since <= progress and (progress < self.until or self.until == 1.0)

    def names(self, block: Block) -> bool:
        """Whether it applies to this block."""
        return (not self.downsample or block.downsample in self.downsample) and (
            not self.blocks or any(fnmatchcase(block.name, pattern) for pattern in self.blocks)
        )


def _several(value: Any) -> tuple[Any, ...]:
    if value is None or value == "":
        return ()
    return tuple(value) if isinstance(value, (tuple, list, set, frozenset)) else (value,)


def _checked_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
        raise reject("blocks", pattern, "a pattern of block names, of letters, digits and _ . * ? [ ] ! -")
    return pattern


@dataclass(frozen=True)
class Stage:
    """One part of the diffusion and its settings: a rule for all blocks that starts where the previous stage ended.

    Args:
        until: progress at which the stage ends, in (0, 1]; progress = 1 − t / 1000.
        settings: settings to override, by name; None leaves the model untouched.
    """

    until: float
    settings: Mapping[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        until = checked_fraction("until", self.until)
        if until == 0.0:
            raise reject("until", self.until, "above 0 and at most 1")
        object.__setattr__(self, "until", until)
        object.__setattr__(self, "settings", checked_overrides(self.settings))

    def __hash__(self) -> int:
        return hash((self.until, _hashable(self.settings)))


def as_rules(stages: tuple[Stage, ...]) -> tuple[Rule, ...]:
    """Convert stages to rules; after the last one the model is untouched."""
    ends = [0.0, *(stage.until for stage in stages)]
    rules = [Rule(stage.settings, since=since, until=stage.until) for since, stage in zip(ends, stages, strict=False)]
    return (*rules, Rule(None, since=ends[-1])) if stages and ends[-1] < 1.0 else tuple(rules)
