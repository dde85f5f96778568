"""A tuning: what each block does in each part of the diffusion, what was measured, and how to tell of it.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..attention.grid import Grid
from ..checks import Setting, SettingError, shown
from ..config import AgentConfig
from ..rules import format_rules, parse_rules
from ..schedule import Block, Rule
from ..words import aligned, mebibytes, percent

if TYPE_CHECKING:
    from ..hosts import Site

FORMAT, VERSION = "agentsd tuning", 1
# Letters of the blocks' settings; "." is full attention.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FULL_LETTER = "."
# What the settings of a candidate are differences from, beside the defaults: all levels, and nothing merged.
BASE: Mapping[str, Any] = {"ratio": 0.0, "max_downsample": 8, "agent_source": "grid"}
# Fraction of the diffusion by which a run may begin earlier than what was tuned on.
MARGIN = 0.1

# Settings to override in a block; None means full attention
Candidate = Mapping[str, Any]


@dataclass(frozen=True)
class TunedConfig(AgentConfig):
    """Settings of a tuning. At another size than its own, the planner says what becomes of them."""

    tuned_for: tuple[int, int] | None = None  # type: ignore[misc]


class TuningError(ValueError):
    """A tuning is damaged, or was made for another model. The message says which."""


@contextmanager
def reading(what: str = "this tuning") -> Iterator[None]:
    """Raise TuningError for whatever else is raised while a tuning is read: it is damaged then."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise error if isinstance(error, TuningError) else TuningError(f"{what} is damaged: {error}") from error


class TuningCancelled(Exception):
    """Tuning was cancelled by its `progress`. The model is as it was."""


def tuned_blocks(sites: Sequence[Site]) -> tuple[Block, ...]:
    """Tell where the blocks are; a level is the side, in positions of the latent, of what a token stands for."""
    levels = (site.downsample and site.downsample * site.patch for site in sites)
    return tuple(replace(s.place, downsample=d, channels=s.channels) for s, d in zip(sites, levels, strict=True))


@dataclass(frozen=True)
class Deviation:
    """‖out − full‖ / ‖full‖ of the model's output at one recorded timestep: the largest of its calls."""

    progress: float  # fraction of the diffusion that is done there, 0–1
    predicted: float  # by the errors of single blocks, scaled by what plans were measured to deviate there
    measured: float | None = None  # of the whole plan; None if it was not run


@dataclass(frozen=True)
class TunedPlan:
    """What each block does in each part of the diffusion."""

    tolerance: float  # the deviation that it was chosen for
    choices: tuple[str, ...]  # of each part: a letter for each block in the order of the model, "." for full attention
    deviations: tuple[Deviation, ...] = ()  # at the recorded timesteps
    time: float | None = None  # of a model call, full attention = 1, averaged over these timesteps; None if unknown
    timed: bool = False  # whether that was measured on whole calls; otherwise it is expected from the blocks' times
    peak: int | None = None  # most bytes on the device during a call; None if unknown
    untold: bool = False  # whether it is full attention because nobody could tell if something else is faster

    @property
    def acts(self) -> bool:
        """Whether any block uses anything but full attention."""
        return any(set(part) != {FULL_LETTER} for part in self.choices)

    @property
    def predicted(self) -> float | None:
        """The largest predicted deviation; None if nothing is known."""
        return max((each.predicted for each in self.deviations), default=None)

    @property
    def measured(self) -> float | None:
        """The largest measured deviation; None if the plan as a whole was not run."""
        values = [each.measured for each in self.deviations]
        return max(values) if values and None not in values else None

    @property
    def deviation(self) -> float | None:
        """The measured deviation, or else the predicted one."""
        return self.predicted if self.measured is None else self.measured

    @property
    def speed_up(self) -> float | None:
        """Seconds without / seconds with; None if unknown."""
        return 1 / self.time if self.time else None

    @property
    def gain(self) -> str:
        """The gain in the words that all places use, such as "1.31× measured"; empty if unknown."""
        if not self.acts:
            told = "could not tell whether anything is faster" if self.untold else "nothing is faster"
            return f"{told} within {percent(self.tolerance)}"
        return f"{self.speed_up:.2f}× {'measured' if self.timed else 'expected'}" if self.time else ""

    @property
    def reached(self) -> str:
        """The deviation in the words that all places use, such as "1.8% measured"; empty if unknown."""
        if self.deviation is None:
            return ""
        return f"{percent(self.deviation)} {'expected' if self.measured is None else 'measured'}"


def _of_plan(name: str) -> Any:
    return property(attrgetter(f"plan.{name}"))


@dataclass(frozen=True)
class Tuning:
    """Result of `agentsd.tune`: data, which can be saved, printed and applied."""

    size: tuple[int, int]  # (height, width) of the latent
    candidates: tuple[Candidate, ...]  # settings to override, one mapping for each letter in a plan's `choices`: a, b …
    since: tuple[float, ...]  # progress at which each part of the diffusion begins; the first is 0
    plan: TunedPlan  # the plan in force
    structure: str  # fingerprint of the model's blocks
    weights: str = ""  # values of some of its weights, such as LoRA does not touch; empty if unknown
    adapters: str = ""  # values of some that LoRA changes; empty if unknown
    blocks: tuple[Block, ...] = ()  # in the order of the model; empty in a tuning that was read from text
    frontier: tuple[TunedPlan, ...] = ()  # plans for several tolerances, from the closest to the fastest; see `at`
    # seconds of a model call with full attention, averaged over the recorded timesteps
    seconds_full: float | None = None
    peak_full: int | None = None  # most bytes on the device during one; None if the device does not tell
    covers: tuple[float, float] = (0.0, 1.0)  # the fraction of the diffusion that it was tuned on, from and until
    # what else it was made under, by name, such as {"lora": "detail 0.8"}
    conditions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what could not be seen while it was made
    # versions of the libraries, the device and the dtype that it was made with
    versions: Mapping[str, str] = field(default_factory=dict)

    # Of the plan in force, as `TunedPlan` documents them
    tolerance: ClassVar[float] = _of_plan("tolerance")
    choices: ClassVar[tuple[str, ...]] = _of_plan("choices")
    acts: ClassVar[bool] = _of_plan("acts")
    measured: ClassVar[float | None] = _of_plan("measured")
    predicted: ClassVar[float | None] = _of_plan("predicted")
    speed_up: ClassVar[float | None] = _of_plan("speed_up")

    @property
    def seconds(self) -> float | None:
        """Seconds of a model call with the plan in force: measured if `plan.timed`, otherwise expected."""
        return self.seconds_full * self.plan.time if self.seconds_full and self.plan.time else None

    def at(self, tolerance: float) -> Tuning:
        """Return the tuning for another tolerance: the fastest plan of the frontier that is to keep it.

        Only the plan of the tolerance that was tuned for has been run as a whole. Where no plan keeps the tolerance,
        all blocks have full attention.
        """
        if tolerance == self.tolerance:
            return self
        choices = tuple(FULL_LETTER * len(part) for part in self.choices)
        full = TunedPlan(tolerance, choices, time=1.0, untold=self.plan.untold)
        kept = [plan for plan in self.frontier if plan.deviation is not None and plan.deviation <= tolerance]
        best = min([full, *kept], key=lambda plan: 1.0 if plan.time is None else plan.time)
        return replace(self, plan=replace(best, tolerance=tolerance))

    # As settings

    @property
    def _by_letter(self) -> dict[str, Candidate]:
        return dict(zip(LETTERS, self.candidates, strict=False))

    def config_for(self, model: Any) -> AgentConfig:
        """Return the settings for a model, whatever its blocks are called.

        Raises:
            TuningError: the model isn't the one that was tuned: its blocks or its weights are others.
        """
        from .fingerprint import agree, ordered_sites, structure_of, weights_of

        sites = ordered_sites(model)
        if structure_of(sites) != self.structure:
            raise TuningError(f"this tuning is for another model: of {len(self.choices[0])} blocks, not {len(sites)}")
        if not agree(self.weights, weights_of(model)):
            raise TuningError("this tuning is for another model: same blocks, but other weights")
        grid = Grid(*self.size).patches(sites[0].patch)
        return TunedConfig(**BASE, rules=self.rules(tuned_blocks(sites)), tuned_for=grid)

    def rules(self, blocks: Sequence[Block]) -> tuple[Rule, ...]:
        """Return the plan as rules beside `BASE`; `blocks` are those of a model, in its order."""
        rules, by_letter, size = [Rule(None)], self._by_letter, Grid(*self.size)
        for since, until, choices in self._runs():
            users: dict[tuple[str, int], list[str]] = {}
            for letter, block in zip(choices, blocks, strict=True):
                # with fewer tokens than at the tuned size, cells would be coarser than what was measured
                tokens = size.at(block.downsample).tokens if block.downsample else 0
                users.setdefault((letter, tokens), []).append(block.name)
            for (letter, tokens), names in sorted(users.items()):
                if letter != FULL_LETTER:
                    settings = {**by_letter[letter], "min_tokens": tokens}
                    rules.append(Rule(settings, blocks=tuple(names), since=since, until=until))
        return tuple(rules)

    def _runs(self) -> list[tuple[float, float, str]]:
        """Parts of the diffusion, from and until, and their choices; neighbours that do the same are one."""
        begun = [next(run) for _, run in groupby(zip(self.since, self.choices, strict=True), lambda part: part[1])]
        ends = (*(since for since, _ in begun[1:]), 1.0)
        return [(since, until, choices) for (since, choices), until in zip(begun, ends, strict=True)]

    # What it does not hold for

    def advice(self, height: int, width: int) -> str:
        """Explain what becomes of the tuning for a latent of `height` × `width`; empty at its own size."""
        if (height, width) == self.size:
            return ""
        tuned, larger = f"tuned for a latent of {Grid(*self.size)}", height * width - Grid(*self.size).tokens
        if larger < 0:
            return f"{tuned}: this one is smaller, and gets full attention"
        return (
            f"{tuned}: this one is {'larger' if larger else 'of another shape'}; cells stay as they are, where "
            "they would be coarser full attention does, and the deviation was not measured here"
        )

    def doubts(self, conditions: Mapping[str, str] | None = None, start: float = 0.0, adapters: str = "") -> str:
        """Say what a run differs in from what was tuned on; empty if nothing is known to.

        Args:
            conditions: what the run is made under, by the names of `conditions`.
            start: progress at which it begins, 0–1.
            adapters: as in the tuning, of the model as it is now.
        """
        found = [
            f"tuned with {name} {tuned or 'none'} and not {value or 'none'}"
            for name, value in (conditions or {}).items()
            if self.blocks and (tuned := self.conditions.get(name, "")) != value
        ]
        if self.adapters and adapters and not found:
            from .fingerprint import agree

            found += ["tuned with another LoRA"] * (not agree(self.adapters, adapters))
        if start < self.covers[0] - MARGIN:
            found.append(f"tuned from {self.covers[0]:.2g} of the diffusion on; full attention stays before")
        return " and ".join(found)

    # Text and files

    @property
    def text(self) -> str:
        """The plan as a line of text, for infotexts: whoever has it and the model gets the same image.

        Without commas, colons, semicolons, quotes and line breaks. `from_text` reads it.
        """
        head = f"tuning {VERSION} {self.size[1]}x{self.size[0]} {self.tolerance} {self.structure}"
        used = {c: each for c, each in self._by_letter.items() if any(c in part for part in self.choices)}
        renamed = str.maketrans(dict(zip(used, LETTERS, strict=False)))
        parts = [f"{since} {choices.translate(renamed)}" for since, _, choices in self._runs()]
        return " | ".join([head, *(format_rules([Rule(each)]) for each in used.values()), *parts])

    @classmethod
    def from_text(cls, text: str) -> Tuning:
        """Read the text that `text` wrote, also with the word "plan:" in front, as reports show it.

        Raises:
            TuningError: it is damaged, or of a later version.
        """
        head, *rest = (part.strip() for part in str(text).strip().removeprefix("plan:").split("|"))
        with reading():
            word, version, size, tolerance, structure = head.split()
            if word != "tuning" or int(version) != VERSION:
                raise TuningError(f"this tuning has version {version}, and {VERSION} is what can be read")
            width, height = map(int, size.split("x"))
            candidates = tuple(rule.settings for part in rest if "=" in part for rule in parse_rules(part))
            since, choices = zip(*(part.split() for part in rest if "=" not in part), strict=True)
            plan = TunedPlan(float(tolerance), choices)
            return cls((height, width), candidates, tuple(map(float, since)), plan, structure).checked()

    def checked(self) -> Tuning:
        """Return the tuning; raise TuningError if it makes no sense."""
        plans = (self.plan, *self.frontier)
        found = [each for plan in plans for each in plan.deviations]
        shares = (*self.since, *self.covers, *(plan.tolerance for plan in plans), *(each.progress for each in found))
        known = (self.seconds_full, self.peak_full, *(plan.time for plan in plans), *(plan.peak for plan in plans))
        with reading():
            for name, high, values in (
                ("a share", 1.0, shares),
                ("a deviation", 1e6, [each.predicted for each in found]),
                ("a measurement", 1e18, [v for v in (*known, *(each.measured for each in found)) if v is not None]),
                ("a side", 2.0**16, self.size),
            ):
                for value in values:
                    Setting(name, "whole" if name == "a side" else "number", None, high=high).check(value)
            AgentConfig(**BASE, rules=tuple(map(Rule, self.candidates)))
        choices = [part for plan in plans for part in plan.choices]
        sound = (
            all(plan.tolerance > 0 or not plan.acts for plan in plans)
            and [type(side) for side in self.size] == [int, int]
            and self.since[:1] == (0.0,)
            and all(a < b for a, b in zip(self.since, (*self.since[1:], 1.0), strict=True))
            and all(len(plan.choices) == len(self.since) for plan in plans)
            and len({*map(len, choices), len(self.blocks) or len(choices[0])}) == 1
            and set().union(*choices) <= {*LETTERS[: len(self.candidates)], FULL_LETTER}
            and all(self.size)
            and all(isinstance(text, str) for text in (self.structure, self.weights, self.adapters, *self.notes))
        )
        if not sound:
            raise TuningError("this tuning is damaged: its parts don't fit together")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain lists, numbers and strings, for JSON."""
        return json.loads(json.dumps(asdict(replace(self, candidates=tuple(map(dict, self.candidates))))))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Read the tuning that `to_dict` wrote; raise TuningError if it is damaged."""
        with reading():
            given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
            given["plan"] = _plan_from(given["plan"])
            given["frontier"] = tuple(map(_plan_from, given.get("frontier", ())))
            given["blocks"] = tuple(Block(**block) for block in given.get("blocks", ()))
            for name in ("conditions", "versions"):
                given[name] = {str(key): str(value) for key, value in dict(given.get(name, {})).items()}
            return cls(**given).checked()

    def to_json(self) -> str:
        """Write the tuning as JSON, with its format and a checksum: what `save` saves."""
        data = self.to_dict()
        whole = {"format": FORMAT, "version": VERSION, "checksum": _checksum(data), "tuning": data}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tuning to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Tuning:
        """Read a tuning from the file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            TuningError: it is no tuning, is damaged, or is of a later version.
        """
        text = Path(path).read_bytes().decode("utf-8", "replace")
        with reading(f"{path} is no tuning, or"):
            whole = json.loads(text)
            if whole["format"] != FORMAT:
                raise KeyError("format")
            if whole["version"] != VERSION:
                raise TuningError(f"{path} has version {shown(whole['version'])}, and {VERSION} is what can be read")
            if whole["checksum"] != _checksum(whole["tuning"]):
                raise TuningError(f"{path} is damaged: its checksum is another one")
            return cls.from_dict(whole["tuning"])

    def __str__(self) -> str:
        """Describe what was promised, what was reached, and what the blocks do in each part of the diffusion."""
        words = {letter: format_rules([Rule(each)]).replace("method=", "") for letter, each in self._by_letter.items()}
        rows = []
        for since, until, choices in zip(self.since, (*self.since[1:], 1.0), self.choices, strict=True):
            inside = [d for d in self.plan.deviations if since <= d.progress < until or d.progress == until == 1]
            most = max((d.predicted if d.measured is None else d.measured for d in inside), default=None)
            # such as "3 corrected agent_ratio=0.95, 13 full"
            actions = (f"{count} {words.get(letter, 'full')}" for letter, count in Counter(choices).most_common())
            part = f"{percent(since)} – {percent(until)}"
            rows.append([part, "" if most is None else percent(most), ", ".join(actions)])
        lines = [headline(self), *self.notes, "", *aligned(["part of the diffusion", "deviation", "blocks"], rows)]
        if self.frontier:
            rows = [[percent(plan.tolerance), plan.reached, plan.gain] for plan in self.frontier]
            lines += ["", *aligned(["how close", "deviation", "speed"], rows)]
        return "\n".join(lines)


def as_tuning(value: Any) -> Tuning:
    """Return a tuning, given as such, as text, or by the path of its file; raise SettingError if it is none."""
    if isinstance(value, Tuning):
        return value
    if not isinstance(value, (str, PathLike)):
        raise SettingError(f"tuning must be a Tuning, its text or the path of its file, got {shown(value)}")
    text = str(value).strip()
    return Tuning.from_text(text) if text.startswith(("tuning ", "plan:")) else Tuning.load(value)


def headline(tuning: Tuning) -> str:
    """Describe in a sentence what was asked for and reached."""
    plan, memory = tuning.plan, mebibytes(tuning.peak_full, tuning.plan.peak)
    told = [f"deviation {plan.reached}" if plan.acts and plan.reached else "", plan.gain]
    if plan.acts and plan.timed and tuning.seconds:
        told.append(f"{tuning.seconds_full:.3g} → {tuning.seconds:.3g} s a model call")
    told.append(memory and f"peak memory {memory}")
    return f"tuned to {percent(tuning.tolerance)} at a latent of {Grid(*tuning.size)}: {', '.join(filter(None, told))}"


def _plan_from(data: Mapping[str, Any]) -> TunedPlan:
    deviations = tuple(Deviation(**each) for each in data.get("deviations", ()))
    return TunedPlan(**{**data, "choices": tuple(map(str, data["choices"])), "deviations": deviations})


def _checksum(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
