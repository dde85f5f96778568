"""A tuning as data: what each block does in each part of the diffusion, and what was measured. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..attention.grid import Grid
from ..checks import SettingError
from ..config import AgentConfig
from ..rules import format_rules, parse_rules
from ..schedule import Rule

FORMAT, VERSION = "agentsd tuning", 1
# Letters of the blocks' settings in the text form; "." is full attention.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FULL_LETTER = "."
# What the settings of a candidate are differences from, beside the defaults: all levels, and nothing merged.
BASE: Mapping[str, Any] = {"ratio": 0.0, "max_downsample": 8, "agent_source": "grid"}

# Settings to override in a block; None means full attention
Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class TunedConfig(AgentConfig):
    """Settings of a tuning. At another size than its own, the planner says what becomes of them."""

    tuned_for: tuple[int, int] | None = field(default=None, metadata={"kind": "size"})


class TuningError(ValueError):
    """A tuning is damaged, or was made for another model. The message says which."""


class TuningCancelled(Exception):
    """Tuning was cancelled by its `progress`. The model is as it was."""


@dataclass(frozen=True)
class Level:
    """What tunings know of a block besides its place in the order of the U-Net.

    Attributes:
        name: the block's name in the U-Net that was tuned; another family of models may name it differently.
        downsample: its level in the U-Net: 1, 2, 4 …; None if unknown.
    """

    name: str
    downsample: int | None


@dataclass(frozen=True)
class Moment:
    """Deviation of the U-Net's output at one recorded timestep: the largest of its calls.

    Attributes:
        progress: fraction of the diffusion that is done there, 0–1.
        predicted: deviation by the errors of single blocks, scaled by what plans were measured to deviate there.
        measured: deviation of the whole plan; None if it was not run.
    """

    progress: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Point:
    """One plan of the frontier.

    Attributes:
        tolerance: the deviation that it was chosen for.
        moments: (progress, predicted deviation) of each recorded timestep.
        seconds: predicted seconds of a U-Net call, averaged over the recorded moments.
        choices: as in `Tuning`.
    """

    tolerance: float
    moments: tuple[tuple[float, float], ...]
    seconds: float
    choices: tuple[str, ...]

    @property
    def predicted(self) -> float:
        """The largest predicted deviation."""
        return max((deviation for _, deviation in self.moments), default=0.0)


@dataclass(frozen=True)
class Tuning:
    """Result of `agentsd.tune`: data, which can be saved, printed and applied.

    Attributes:
        tolerance: upper limit on the deviation ‖out − full‖ / ‖full‖ of the U-Net's output, which it was tuned for.
        size: (height, width) of the latent.
        candidates: settings to override, one mapping for each letter in `choices`: a, b, c …
        since: progress at which each part of the diffusion begins; the first is 0.
        choices: one text for each part: a letter for each block in the order of the U-Net, "." for full attention.
        structure: fingerprint of the U-Net's blocks.
        weights: fingerprint of some of its weights, such as LoRA does not touch; empty if unknown.
        blocks: the blocks, in the order of the U-Net; empty in a tuning that was read from text.
        moments: deviations at the recorded timesteps.
        seconds_full: seconds of a U-Net call with full attention, averaged over the recorded moments.
        seconds: seconds of a U-Net call with this tuning.
        frontier: plans for several tolerances, from the closest to the fastest; see `at`.
        versions: versions of the libraries, the device and the dtype that it was made with.
        peak_full: most bytes on the device during a U-Net call with full attention; None if the device does not tell.
        peak: most bytes during one with this tuning.
    """

    tolerance: float
    size: tuple[int, int]
    candidates: tuple[Candidate, ...]
    since: tuple[float, ...]
    choices: tuple[str, ...]
    structure: str
    weights: str = ""
    blocks: tuple[Level, ...] = ()
    moments: tuple[Moment, ...] = ()
    seconds_full: float | None = None
    seconds: float | None = None
    frontier: tuple[Point, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    peak_full: int | None = None
    peak: int | None = None

    @property
    def predicted(self) -> float | None:
        """The largest predicted deviation; None if nothing is known."""
        return max((moment.predicted for moment in self.moments), default=None)

    @property
    def measured(self) -> float | None:
        """The largest measured deviation; None if the plan as a whole was not run."""
        values = [moment.measured for moment in self.moments]
        return max(values) if values and None not in values else None

    @property
    def acts(self) -> bool:
        """Whether any block uses anything but full attention."""
        return any(set(part) != {FULL_LETTER} for part in self.choices)

    @property
    def speed_up(self) -> float | None:
        """Seconds without / seconds with; None if unknown."""
        return self.seconds_full / self.seconds if self.seconds and self.seconds_full else None

    @property
    def by_letter(self) -> dict[str, Candidate]:
        """The candidates by the letters that stand for them in `choices`."""
        return dict(zip(LETTERS, self.candidates, strict=False))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The plan as rules for the U-Net that was tuned; they belong to `base`."""
        if not self.blocks:
            raise TuningError("a tuning read from text knows no block names: use rules_for(unet)")
        return self._rules(self.blocks)

    def rules_for(self, unet: Any) -> tuple[Rule, ...]:
        """Return the plan as rules for a U-Net of the same structure, whatever its blocks are called.

        Raises:
            TuningError: the U-Net's blocks are others than those of the tuned one.
        """
        from .fingerprint import ordered_sites, structure_of

        sites = ordered_sites(unet)
        if structure_of(sites) != self.structure:
            raise TuningError(f"this tuning is for another model: of {len(self.choices[0])} blocks, not {len(sites)}")
        return self._rules([Level(site.name, site.downsample) for site in sites])

    @property
    def base(self) -> AgentConfig:
        """The settings that the rules override."""
        return AgentConfig(**BASE)

    def config_for(self, unet: Any) -> AgentConfig:
        """Return the settings for a U-Net.

        Raises:
            TuningError: the U-Net isn't the one that was tuned: its blocks or its weights are others.
        """
        from .fingerprint import weights_of

        rules = self.rules_for(unet)
        if self.weights and weights_of(unet) not in ("", self.weights):
            raise TuningError("this tuning is for another model: same blocks, but other weights")
        return TunedConfig(**BASE, rules=rules, tuned_for=self.size)

    def _rules(self, blocks: Sequence[Level]) -> tuple[Rule, ...]:
        rules = [Rule(None)]
        ends = (*self.since[1:], 1.0)
        for letter, candidate in self.by_letter.items():
            # runs of parts in which the same blocks use this candidate
            users = [tuple(i for i, c in enumerate(part) if c == letter) for part in self.choices]
            for which, run in groupby(range(len(users)), key=users.__getitem__):
                parts = list(run)
                by_tokens = groupby(
                    sorted(which, key=lambda i: self._tokens(blocks[i])), lambda i: self._tokens(blocks[i])
                )
                rules += [
                    Rule(
                        {**candidate, "min_tokens": tokens},
                        blocks=tuple(blocks[i].name for i in sorted(members)),
                        since=self.since[parts[0]],
                        until=ends[parts[-1]],
                    )
                    for tokens, members in by_tokens
                ]
        return tuple(rules)

    def _tokens(self, block: Level) -> int:
        """Number of tokens of a block at the tuned size: with fewer, cells would be coarser than what was measured."""
        if block.downsample is None:
            return 0
        return Grid(*self.size).at(block.downsample).tokens

    def at(self, tolerance: float) -> Tuning:
        """Return the tuning for another tolerance: the fastest plan of the frontier predicted to keep it.

        Only the plan of the tuning's own tolerance has been run as a whole, so `measured` of others is None. Where no
        plan keeps the tolerance, all blocks have full attention.
        """
        if tolerance == self.tolerance:
            return self
        points = [point for point in self.frontier if point.predicted <= tolerance]
        if not points:
            full = tuple(FULL_LETTER * len(part) for part in self.choices)
            return replace(
                self, tolerance=tolerance, choices=full, moments=(), seconds=self.seconds_full, peak=self.peak_full
            )
        best = min(points, key=lambda point: point.seconds)
        return replace(
            self,
            tolerance=tolerance,
            choices=best.choices,
            moments=tuple(Moment(*moment) for moment in best.moments),
            seconds=best.seconds,
            peak=None,
        )

    def advice(self, height: int, width: int) -> str:
        """Explain what becomes of the tuning for a latent of `height` × `width`; empty at its own size."""
        if (height, width) == self.size:
            return ""
        tuned = f"tuned for a latent of {self.size[1]}×{self.size[0]}"
        here, there = height * width, self.size[0] * self.size[1]
        if here < there:
            return f"{tuned}: this one is smaller, and gets full attention"
        other = "larger" if here > there else "of another shape"
        return (
            f"{tuned}: this one is {other}; cells stay as they are, where they would be coarser full attention does, "
            "and the deviation was not measured here"
        )

    # Text and files

    @property
    def text(self) -> str:
        """The plan as a line of text, for infotexts: whoever has it and the model gets the same image.

        Without commas, colons, semicolons, quotes and line breaks. `from_text` reads it.
        """
        height, width = self.size
        head = f"tuning {VERSION} {width}x{height} {self.tolerance} {self.structure}"
        used = {c: candidate for c, candidate in self.by_letter.items() if any(c in part for part in self.choices)}
        settings = [format_rules([Rule(candidate)]) for candidate in used.values()]
        renamed = str.maketrans(dict(zip(used, LETTERS, strict=False)))
        # parts that do the same are written once
        runs = [next(run) for _, run in groupby(zip(self.since, self.choices, strict=True), lambda part: part[1])]
        parts = [f"{since} {choices.translate(renamed)}" for since, choices in runs]
        return " | ".join([head, *settings, *parts])

    @classmethod
    def from_text(cls, text: str) -> Tuning:
        """Read the text that `text` wrote.

        Raises:
            TuningError: it is damaged, or of a later version.
        """
        head, *rest = (part.strip() for part in str(text).split("|"))
        try:
            word, version, size, tolerance, structure = head.split()
            if word != "tuning" or int(version) != VERSION:
                raise TuningError(f"this tuning has version {version}, and {VERSION} is what can be read")
            width, height = map(int, size.split("x"))
            settings = [part for part in rest if "=" in part]
            parts = [part.split() for part in rest if "=" not in part]
            candidates = tuple(rule.settings for part in settings for rule in parse_rules(part))
            since, choices = tuple(float(a) for a, _ in parts), tuple(b for _, b in parts)
            tuning = cls(float(tolerance), (height, width), candidates, since, choices, structure)
        except (ValueError, TypeError, IndexError) as error:
            raise (
                error if isinstance(error, TuningError) else TuningError(f"this tuning is damaged: {error}")
            ) from error
        return tuning.checked()

    def checked(self) -> Tuning:
        """Return the tuning if it makes sense.

        Raises:
            TuningError: it doesn't.
        """
        known = {*self.by_letter, FULL_LETTER}
        plans = [self.choices, *(point.choices for point in self.frontier)]
        sound = (
            self.since[:1] == (0.0,)
            and all(a < b for a, b in zip(self.since, (*self.since[1:], 1.0), strict=True))
            and all(len(plan) == len(self.since) for plan in plans)
            and len({len(part) for plan in plans for part in plan}) == 1
            and all(set(part) <= known for plan in plans for part in plan)
            and len(self.size) == 2
            and all(isinstance(side, int) and side > 0 for side in self.size)
        )
        if not sound:
            raise TuningError("this tuning is damaged: its parts don't fit together")
        try:
            for candidate in self.candidates:
                AgentConfig(rules=(Rule(candidate),))
        except SettingError as error:
            raise TuningError(f"this tuning is damaged: {error}") from error
        return self

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain lists, numbers and strings, for JSON."""
        return json.loads(json.dumps(asdict(replace(self, candidates=tuple(map(dict, self.candidates))))))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Read the tuning that `to_dict` wrote.

        Raises:
            TuningError: it is damaged.
        """
        try:
            given = dict(data)
            for name, kind in (("blocks", Level), ("moments", Moment), ("frontier", Point)):
                given[name] = tuple(kind(**entry) for entry in given.get(name, ()))
            given["frontier"] = tuple(
                replace(point, choices=tuple(point.choices), moments=tuple(map(tuple, point.moments)))
                for point in given["frontier"]
            )
            for name in ("size", "candidates", "since", "choices"):
                given[name] = tuple(given[name])
            return cls(**given).checked()
        except (TypeError, KeyError, AttributeError) as error:
            raise TuningError(f"this tuning is damaged: {error}") from error

    def to_json(self) -> str:
        """Write the tuning as JSON, with its format and a checksum: what `save` saves."""
        data = self.to_dict()
        whole = {"format": FORMAT, "version": VERSION, "checksum": _checksum(data), "tuning": data}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the tuning to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tuning:
        """Read a tuning from the file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            TuningError: it is no tuning, is damaged, or is of a later version.
        """
        try:
            whole = json.loads(Path(path).read_text(encoding="utf-8"))
            if whole["format"] != FORMAT:
                raise KeyError("format")
            version, checksum, data = whole["version"], whole["checksum"], whole["tuning"]
        except (ValueError, KeyError, TypeError) as error:
            raise TuningError(f"{path} is no tuning, or is damaged") from error
        if version != VERSION:
            raise TuningError(f"{path} has version {version}, and {VERSION} is what can be read")
        if checksum != _checksum(data):
            raise TuningError(f"{path} is damaged: its checksum is another one")
        return cls.from_dict(data)

    def __str__(self) -> str:
        from .table import describe

        return describe(self)


def _checksum(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
