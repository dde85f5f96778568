"""The last run, for panel, console and status route: all that one request has made, such as all images of a plot."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..attention.grid import Grid
from ..methods import LayerPlan
from ..patching.closeness import Closeness
from ..patching.patch import Patch
from ..settings.presets import TUNED
from ..words import counted
from .decision import Decision, Hint, last_veto
from .preview import ACTS, NOTHING, SLOWER, WRONG, Line, layers_in_words, steps_in_words, tuned_in_words
from .timings import Timing, changed
from .token_map import Recording

log = logging.getLogger("agentsd.panel")
_KEPT = 50  # earlier runs
_LINES = 8  # of a run; a plot may have made hundreds of images
_TOLD = ("action", "tokens", "queries", "agents")


@dataclass
class PassReport:
    """Report of one sampling pass, or of several that went alike."""

    made: Decision | None = None  # what was decided; None where nobody asked
    name: str = ""  # what to call the pass, if not by its decision
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) of each latent that was denoised
    calls: Counter[str] = field(default_factory=Counter)  # self-attention calls by action: "agents", "untouched" …
    steps: int = 0  # U-Net calls in which self-attention was changed
    of_steps: int = 0  # U-Net calls that reached a block
    layers: list[tuple[LayerPlan, int]] = field(default_factory=list)  # distinct plans of changed layers, with numbers
    idle: list[LayerPlan] = field(default_factory=list)  # distinct plans of the layers that were left alone
    skipped: bool = False  # whether no layer that was to be changed was called
    notes: Counter[str] = field(default_factory=Counter)  # why calls were left to the host; 0 of what is no call
    models: int = 0  # U-Nets that were patched; 2 if a refiner took over
    pace: Timing = field(default_factory=Timing)
    tuned: str = ""  # outcome of tuning on this pass, if that was asked for
    closeness: Closeness | None = None  # in the last U-Net patched; None if not observed
    times: int = 1  # number of passes that it tells of

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
        if latent is not None and tuple(latent) not in self.sizes:
            self.sizes.append((latent[0], latent[1]))

    def add(self, patch: Patch, progress: float | None) -> None:
        """Collect the report of a patch, whose agents begin at `progress`; None if there is no one plan to tell."""
        self.notes.update(patch.notes)
        counts = {layer.name: Counter(layer.calls) for layer in patch.report()}
        self.calls.update(sum(counts.values(), Counter()))
        self.steps += max(map(changed, counts.values()), default=0)
        self.of_steps += max((sum(count.values()) for count in counts.values()), default=0)
        self.see(None if patch.last_call is None else patch.last_call.latent)
        self.closeness = patch.closeness() or self.closeness
        for size in self.sizes if progress is not None else ():
            planned = _explained(patch, size, progress)
            acting = {name: plan for name, plan in planned.items() if plan.acts}
            self.skipped = bool(acting) and not any(counts[name].total() for name in acting)
            # what was planned, but left to the host in every call, was not done
            done = Counter(plan for name, plan in acting.items() if changed(counts[name]) or not self.steps)
            self.layers += [each for each in done.items() if each not in self.layers]  # a refiner's do not add up
            self.idle += [plan for plan in dict.fromkeys(planned.values()) if not plan.acts and plan not in self.idle]

    @property
    def title(self) -> str:
        """Name of the pass, with the sizes that the U-Net was called with where they are others."""
        own = None if self.made is None else tuple(self.made.sampling.latent)
        others = " and ".join(f"{Grid(*size).pixels}" for size in self.sizes if size != own)
        if own is None:
            return f"{self.name} {others}".strip()
        name = f"{self.name} {self.made.sampling}".strip()
        return f"{name}, in parts of {others}" if others else name

    @property
    def manner(self) -> tuple[Any, ...]:
        """What passes that went alike have in common: all but numbers of calls and seconds."""
        return self.title, self.obstacle, self.tuned, tuple(self.layers), self.patched, frozenset(self.notes)

    def with_more(self, other: PassReport) -> PassReport:
        """Return the report of both passes, which went alike."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("calls", "steps", "of_steps", "times")}
        notes = Counter({reason: n + self.notes[reason] for reason, n in other.notes.items()})  # those of 0 stay
        return replace(other, notes=notes, **sums)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        told = {name: getattr(self, name) for name in ("models", "tuned")}
        return told | {
            "hires": self.made is not None and self.made.sampling.hires,
            "latent": self.sizes[-1] if self.sizes else None,
            "calls": dict(self.calls),
            "steps": [self.steps, self.of_steps],
            "layers": [{**{k: getattr(plan, k) for k in _TOLD}, "count": n} for plan, n in self.layers],
            "pace": {"patched": self.pace.patched, "untouched": self.pace.untouched},
            "closeness": None if self.closeness is None else asdict(self.closeness),
            "plan": tuned_in_words(self.made) if self.made is not None and self.made.tuning else "",
            "obstacles": [self.obstacle] if self.obstacle else [],
            "notes": dict(self.notes),
        }

    def line(self) -> Line:
        name, made = self.title + (f", {self.times} times" if self.times > 1 else ""), self.made
        if self.tuned:
            return Line(f"{name}: {self.tuned}", None, WRONG if self.refused else ACTS)
        if made is not None and made.instead:
            name += f": {made.instead}, so the other settings were used"
        if not self.patched:
            return Line(f"{name}: nothing happened", self._why_nothing(), WRONG if self.refused else NOTHING)
        what = tuned_in_words(made) if made is not None and made.tuning else layers_in_words(self.layers)
        what += steps_in_words(self.steps, self.of_steps, "U-Net calls") if self.steps else ""
        close = str(self.closeness) if self.closeness is not None and math.isfinite(self.closeness.worst) else ""
        left = self._left_to_host()
        state = SLOWER if self.pace.slower else ACTS
        return Line((f"{name}: {what}", self.pace.last_words(), close), Hint(left) if left else None, state)

    def _left_to_host(self) -> str:
        """Say which calls were left to the host, and what else there is to say."""
        calls = "; ".join(f"{reason} ({counted(n, 'calls')})" for reason, n in self.notes.items() if n)
        others = (reason for reason, n in self.notes.items() if not n)
        return "; ".join(filter(None, (calls and f"left to the host: {calls}", *others)))

    def _why_nothing(self) -> Hint | None:
        if self.obstacle:
            return self.made.reason
        why = last_veto(self.idle) if self.idle and not self.layers else Hint("no step lay between From and Until")
        if any(self.notes.values()):
            why = Hint("")
        elif not self.sizes:
            why = Hint("the U-Net was not called")
        elif not self.of_steps or self.skipped:
            why = Hint("the U-Net was called, but something else skips the blocks that were to be changed")
        elif self.made is not None and self.made.tuning is not None:
            why = Hint(self.made.tuning.advice(*self.sizes[-1]) or "the tuning has full attention in these steps")
        return replace(why, text="; ".join(filter(None, (why.text, self._left_to_host()))))


def _explained(patch: Patch, size: tuple[int, int], progress: float) -> dict[str, LayerPlan]:
    """Plan the layers at `progress`, or else in the first part of the diffusion in which any is changed."""
    parts = (since for since, _ in patch.config.parts())
    plans = [{name: plan for name, plan in patch.explain(*size, at) if plan is not None} for at in (progress, *parts)]
    return next((each for each in plans if any(plan.acts for plan in each.values())), plans[0])


class Status:
    """Status of the last run."""

    def __init__(self) -> None:
        self.run = 0  # number of generations so far
        self._said: set[str] = set()
        self._earlier: dict[str, dict[str, Any]] = {}  # by task
        self.clear()

    def clear(self, task: str = "") -> None:
        self.task = task  # the host's id of the request that it belongs to; empty if the host has none
        self.at = time.time()  # when it began or its last pass ended, in seconds since the epoch
        self.enabled = self.tuned = False  # whether we were on with valid settings, and a tuning was made
        self.errors: list[str] = []  # why generations of it were made without us
        self.passes: list[PassReport] = []  # those of earlier images of the request included
        self.recording: Recording | None = None  # for the token map; None if none was requested

    def begin(self, enabled: bool, error: str = "", task: str = "") -> None:
        """Start a generation of the request `task`; with an `error` it runs unpatched."""
        if not task or task != self.task:
            if self.task:
                self._earlier[self.task] = self.as_dict()
                while len(self._earlier) > _KEPT:
                    del self._earlier[next(iter(self._earlier))]
            self.clear(task)
        self.run += 1
        self.enabled, self.recording = enabled, None
        if error:
            self.fail(error)

    def fail(self, error: str) -> None:
        """State why nothing of this generation was patched."""
        if error not in self.errors:
            self.errors.append(error)
        self.say(f"not applied: {error}")

    def add(self, report: PassReport) -> None:
        self.passes.append(report)
        self.at = time.time()
        if report.patched or report.tuned:
            log.info(str(report.line()))
        for reason, n in {report.obstacle: 1, **report.notes}.items():
            if reason:
                self.say(f"left to the host: {reason}" if n else reason)

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
        """Describe the run, one line for the passes that went alike; none while the extension is off."""
        found: dict[Any, PassReport] = {}
        for report in self.passes:
            found[report.manner] = found[report.manner].with_more(report) if report.manner in found else report
        lines = [Line(f"not applied: {error}", None, WRONG) for error in self.errors]
        lines += [report.line() for report in list(found.values())[:_LINES]]
        more = len(found) - _LINES
        return [*lines, Line(f"and {more} more kinds of passes")] if more > 0 else lines

    def text(self) -> str:
        return " ".join(["Last run:", *told]) if (told := [str(line) for line in self.lines()]) else ""

    def of(self, task: str | None = None) -> Mapping[str, Any]:
        """Return the status of the last run, or of the last one that belongs to `task`, in JSON types."""
        return self.as_dict() if task in (None, self.task) else self._earlier.get(task, _UNKNOWN)

    def as_dict(self) -> dict[str, Any]:
        """Return the status of the last run in JSON types; `state` is the preview's word for the line that counts."""
        lines = self.lines()
        states = {line.state for line in lines}
        return {name: getattr(self, name) for name in ("run", "task", "at", "enabled")} | {
            "state": next((state for state in (WRONG, SLOWER, ACTS, NOTHING) if state in states), ""),
            "text": self.text(),
            "lines": [line.to_dict() for line in lines],
            "error": "; ".join(self.errors),
            "notes": self.notes(),
            "preset": TUNED if self.tuned else "",
            "passes": [report.as_dict() for report in self.passes],
        }


_UNKNOWN = Status().as_dict()
STATUS = Status()
