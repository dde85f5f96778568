"""The last run: for the panel's status lines, the console and the status route.

A run is everything that one request of the host has made: each image of a plot, each pass, and what other extensions
make in between. Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

from ..attention.grid import Grid
from ..methods import LayerPlan
from ..patching.closeness import Closeness
from ..patching.patch import Patch
from ..settings.presets import TUNED
from .decision import Decision, Hint, last_veto
from .pace import Pace, changed
from .preview import ACTS, NOTHING, SLOWER, WRONG, Line, layers_in_words, steps_in_words, tuned_in_words
from .token_map import Recording

log = logging.getLogger("agentsd.panel")
_KEPT = 50  # earlier runs
_LINES = 8  # of a run; a plot may have made hundreds of images
_TOLD = ("action", "tokens", "queries", "agents")


@dataclass
class PassReport:
    """Report of one sampling pass, or of several that went alike.

    Attributes:
        made: what was decided; None where nobody asked.
        name: what to call the pass, if not by its decision.
        sizes: (height, width) of each latent that the U-Net was called with, without repetition.
        calls: number of self-attention calls by action: "agents", "merge", "pool", "untouched" …
        steps: number of U-Net calls in which self-attention was changed.
        of_steps: number of U-Net calls.
        layers: the distinct plans of the changed layers, each with its number of layers.
        idle: plans of the layers that were left alone.
        notes: reasons for leaving single calls to the host, each with its number of calls.
        models: number of U-Nets that were patched; 2 if a refiner took over.
        pace: speed of the steps.
        tuned: outcome of tuning on this pass; empty if that was not asked for.
        closeness: how close attention was to full attention, in the last U-Net patched; None if not observed.
        times: number of passes that it tells of.
    """

    made: Decision | None = None
    name: str = ""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    of_steps: int = 0
    layers: list[tuple[LayerPlan, int]] = field(default_factory=list)
    idle: list[LayerPlan] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    models: int = 0
    pace: Pace = field(default_factory=Pace)
    tuned: str = ""
    closeness: Closeness | None = None
    times: int = 1

    @property
    def hires(self) -> bool:
        return self.made is not None and self.made.sampling.hires

    @property
    def patched(self) -> bool:
        """Whether anything was changed: self-attention, or tokens merged elsewhere."""
        return changed(self.calls) > 0 or (self.of_steps > 0 and any(plan.r for plan in self.idle))

    @property
    def obstacle(self) -> str:
        """Why the whole pass was left alone; empty if it was not."""
        alone = self.made is not None and not self.made.patches and self.made.reason is not None
        return self.made.reason.text if alone else ""

    @property
    def refused(self) -> bool:
        """Whether it went otherwise than was wanted."""
        return self.tuned.startswith("not ") or (self.made is not None and self.made.refused)

    def see(self, latent: tuple[int, int] | None) -> None:
        """Note the size of a U-Net call."""
        if latent is not None:
            _append_new(self.sizes, tuple(latent))

    def add(self, patch: Patch, progress: float | None) -> None:
        """Collect the report of a patch before it is removed.

        `progress` is where its agents begin; None if there is no one plan to tell, as in a tuning.
        """
        self.notes.update(patch.notes)
        counts = {layer.name: Counter(layer.calls) for layer in patch.report()}
        self.calls.update(sum(counts.values(), Counter()))
        self.steps += max(map(changed, counts.values()), default=0)
        self.of_steps += max((sum(count.values()) for count in counts.values()), default=0)
        self.see(patch.last_call and patch.last_call.latent)
        self.closeness = patch.closeness() or self.closeness
        if self.sizes and progress is not None:
            planned = [(name, plan) for name, plan in patch.explain(*self.sizes[-1], progress) if plan is not None]
            left = {name for name, count in counts.items() if self.steps and not changed(count)}
            # what was planned, but left to the host in every call, was not done
            self._add_plans(plan for name, plan in planned if not (plan.acts and name in left))

    def _add_plans(self, plans: Iterable[LayerPlan]) -> None:
        counts: Counter[LayerPlan] = Counter()
        for plan in plans:
            if plan.acts:
                counts[plan] += 1
            else:
                _append_new(self.idle, plan)
        for plan_and_count in counts.items():  # a refiner's layers do not add to the model's
            _append_new(self.layers, plan_and_count)

    def alike(self, other: PassReport) -> bool:
        """Whether another pass went as this one did, but for numbers of calls and seconds."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("title", "obstacle", "tuned", "layers", "patched")
        ) and set(self.notes) == set(other.notes)

    def with_more(self, other: PassReport) -> PassReport:
        """Sum up two passes that went alike."""
        both = copy(other)
        both.calls, both.notes = self.calls + other.calls, self.notes + other.notes
        both.steps, both.of_steps = self.steps + other.steps, self.of_steps + other.of_steps
        both.times = self.times + other.times
        return both

    @property
    def title(self) -> str:
        """Name of the pass, with the sizes that the U-Net was called with where they are others."""
        own = None if self.made is None else tuple(self.made.sampling.latent)
        others = [f"{Grid(*size).pixels}" for size in self.sizes if size != own]
        if own is None:
            return " ".join(filter(None, (self.name, " and ".join(others))))
        return f"{self.made.sampling}{', in parts of ' if others else ''}{' and '.join(others)}"

    def line(self) -> Line:
        """Describe the pass, in the preview's words."""
        name = self.title + (f", {self.times} times" if self.times > 1 else "")
        if self.tuned:
            return Line(f"{name}: {self.tuned}", None, WRONG if self.refused else ACTS)
        made = self.made
        if made is not None and made.instead:
            name += f": {made.instead}, so the other settings were used"
        if not self.patched:
            return Line(f"{name}: nothing happened", self._why_nothing(), WRONG if self.refused else NOTHING)
        what = tuned_in_words(made) if made is not None and made.tuning else layers_in_words(self.layers)
        what += steps_in_words(self.steps, self.of_steps, "U-Net calls") if self.steps else ""
        close = self.closeness if self.closeness is not None and math.isfinite(self.closeness.worst) else None
        clauses = (f"{name}: {what}", self.pace.words(), "" if close is None else str(close))
        return Line(clauses, self._left(), SLOWER if self.pace.slower else ACTS)

    def sentence(self) -> str:
        """Describe the pass in a few sentences."""
        return str(self.line())

    def _left(self) -> Hint | None:
        """Say which calls were left to the host."""
        told = [f"{reason} ({n} {'call' if n == 1 else 'calls'})" for reason, n in self.notes.items()]
        return Hint(f"left to the host: {'; '.join(told)}") if told else None

    def _why_nothing(self) -> Hint | None:
        if self.obstacle:
            return self.made.reason
        if self.notes:
            return self._left()
        if not self.of_steps:
            return Hint("the U-Net was not called")
        if self.layers or not self.idle:
            return Hint("no step lay between From and Until")
        return last_veto(self.idle)


def _append_new(items: list[Any], item: Any) -> None:
    if item not in items:
        items.append(item)


def summed(reports: Iterable[PassReport]) -> list[PassReport]:
    """Sum up the passes that went alike, in the order in which they came first."""
    found: list[PassReport] = []
    for report in reports:
        at = next((i for i, other in enumerate(found) if other.alike(report)), None)
        if at is None:
            found.append(report)
        else:
            found[at] = found[at].with_more(report)
    return found


class Status:
    """Status of the last run.

    Attributes:
        run: number of generations so far.
        task: the host's id of the request that it belongs to; empty if the host has none.
        at: when it began or its last pass ended, in seconds since the epoch.
        enabled: whether the extension was on and its settings were valid.
        errors: why generations of it were made without us.
        passes: reports of its sampling passes, those of earlier images of the request included.
        tuned: whether a tuning was made.
        recording: the recording for its token map; None if none was requested.
    """

    def __init__(self) -> None:
        self.run = 0
        self._said: set[str] = set()
        self._earlier: OrderedDict[str, dict[str, Any]] = OrderedDict()  # by task
        self.clear()

    def clear(self, task: str = "") -> None:
        self.task, self.at = task, time.time()
        self.enabled = self.tuned = False
        self.errors: list[str] = []
        self.passes: list[PassReport] = []
        self.recording: Recording | None = None

    def begin(self, enabled: bool, error: str = "", task: str = "") -> None:
        """Start a generation of the request `task`; with an `error` it runs unpatched."""
        if not task or task != self.task:
            if self.task:
                self._earlier[self.task] = self.as_dict()
                while len(self._earlier) > _KEPT:
                    self._earlier.popitem(last=False)
            self.clear(task)
        self.run += 1
        self.enabled, self.recording = enabled, None
        if error:
            self.fail(error)

    @property
    def order_done(self) -> bool:
        """Whether an earlier image of the request was tuned on, or was to be."""
        return any(report.tuned for report in self.passes)

    def fail(self, error: str) -> None:
        """State why nothing of this generation was patched."""
        _append_new(self.errors, error)
        self.say(f"not applied: {error}")

    def add(self, report: PassReport) -> None:
        """Add the report of a pass that has ended."""
        self.passes.append(report)
        self.at = time.time()
        if report.patched or report.tuned:
            log.info(report.sentence())
        for reason in (report.obstacle, *report.notes):
            if reason:
                self.say(f"left to the host: {reason}")

    def say(self, message: str) -> None:
        """Print a message to the console, each distinct message only once."""
        if message not in self._said:
            self._said.add(message)
            print(f"[Agent Attention] {message}")

    def notes(self) -> list[str]:
        """List the reasons for leaving passes or calls to the host."""
        reasons = (reason for report in self.passes for reason in (report.obstacle, *report.notes))
        return list(dict.fromkeys(filter(None, reasons)))

    def lines(self) -> list[Line]:
        """Describe the run, one line for each kind of pass; none while the extension is off."""
        reports = summed(self.passes)
        lines = [Line(f"not applied: {error}", None, WRONG) for error in self.errors]
        lines += [report.line() for report in reports[:_LINES]]
        more = len(reports) - _LINES
        return [*lines, Line(f"and {more} more kinds of passes")] if more > 0 else lines

    def text(self) -> str:
        """Return the lines as one text."""
        return " ".join(["Last run:", *told]) if (told := [str(line) for line in self.lines()]) else ""

    def state(self) -> str:
        """Tell how the run went, in the preview's words for a line; empty if there is nothing to tell."""
        states = {line.state for line in self.lines()}
        return next((state for state in (WRONG, SLOWER, ACTS, NOTHING) if state in states), "")

    def of(self, task: str | None = None) -> Mapping[str, Any]:
        """Return the status of the last run, or of the last one that belongs to `task`, in JSON types."""
        if task is None or task == self.task:
            return self.as_dict()
        return self._earlier.get(task, _UNKNOWN)

    def as_dict(self) -> dict[str, Any]:
        """Return the status of the last run in JSON types."""
        return {
            "run": self.run,
            "task": self.task,
            "at": self.at,
            "state": self.state(),
            "enabled": self.enabled,
            "text": self.text(),
            "lines": [line.to_dict() for line in self.lines()],
            "error": "; ".join(self.errors),
            "notes": self.notes(),
            "preset": TUNED if self.tuned else "",
            "passes": [_pass_as_dict(report) for report in self.passes],
        }


def _pass_as_dict(report: PassReport) -> dict[str, Any]:
    return {
        "hires": report.hires,
        "latent": report.sizes[-1] if report.sizes else None,
        "calls": dict(report.calls),
        "steps": [report.steps, report.of_steps],
        "layers": [{**{k: getattr(plan, k) for k in _TOLD}, "count": n} for plan, n in report.layers],
        "models": report.models,
        "pace": asdict(report.pace),
        "closeness": None if report.closeness is None else asdict(report.closeness),
        "plan": tuned_in_words(report.made) if report.made is not None and report.made.tuning else "",
        "tuned": report.tuned,
        "obstacles": [report.obstacle] if report.obstacle else [],
        "notes": dict(report.notes),
    }


_UNKNOWN = Status().as_dict()
STATUS = Status()
