"""The last run: for the panel's status line, the console and the status route.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..attention.grid import Grid
from ..methods import UNTOUCHED, LayerPlan, method_of
from ..patching.closeness import Closeness
from ..patching.patch import Patch
from ..settings.presets import TUNED
from .pace import Pace, changed
from .preview import ACTS, NOTHING, SLOWER, WRONG, in_layers
from .token_map import Recording

log = logging.getLogger("agentsd.panel")
_KEPT = 50  # earlier runs
_TOLD = ("action", "tokens", "queries", "agents")


@dataclass
class PassReport:
    """Report of one sampling pass.

    Attributes:
        hires: whether it was the hires pass.
        latent: (height, width) of the latent; None before the first call of the U-Net.
        calls: number of self-attention calls by action: "agents", "merge", "pool", "untouched" …
        layers: the distinct plans of the changed layers, each with its number of layers.
        idle: reasons why other layers were planned as untouched.
        obstacles: reasons for leaving the whole pass to the host.
        notes: reasons for leaving single calls to the host, each with its number of calls.
        models: number of U-Nets that were patched; 2 if a refiner took over.
        pace: speed of the steps.
        plan: which tuning was used, or why none; empty if none was asked for.
        tuned: outcome of tuning on this pass; empty if that was not asked for.
        closeness: how close attention was to full attention, in the last U-Net patched; None if not observed.
    """

    hires: bool
    latent: tuple[int, int] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    layers: list[tuple[LayerPlan, int]] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    models: int = 0
    pace: Pace = field(default_factory=Pace)
    plan: str = ""
    tuned: str = ""
    closeness: Closeness | None = None

    @property
    def refused(self) -> bool:
        """Whether it was to be tuned on, and was not."""
        return self.tuned.startswith("not ")

    @property
    def name(self) -> str:
        return "hires pass" if self.hires else "first pass"

    def add(self, patch: Patch, progress: float | None) -> None:
        """Collect the report of a patch before it is removed.

        `progress` is where its agents begin; None if there is no one plan to tell, as in a tuning.
        """
        self.notes.update(patch.notes)
        for layer in patch.report():
            self.calls.update(layer.calls)
        self.latent = patch.moment.latent or self.latent
        self.closeness = patch.closeness() or self.closeness
        if self.latent is not None and progress is not None:
            self._add_plans(plan for _, plan in patch.explain(*self.latent, progress) if plan is not None)

    def _add_plans(self, plans: Iterable[LayerPlan]) -> None:
        counts: Counter[LayerPlan] = Counter()
        for plan in plans:
            if plan.acts:
                counts[plan] += 1
            else:
                _append_new(self.idle, plan.reason)
        for plan_and_count in counts.items():  # a refiner's layers do not add to the model's
            _append_new(self.layers, plan_and_count)

    def changed(self) -> int:
        """Count the self-attention calls that were changed."""
        return changed(self.calls)

    @property
    def patched(self) -> bool:
        """Whether the patch was put on, and not all that it was to do was left to the host."""
        return self.models > 0 and (self.changed() > 0 or not self.notes)

    def sentence(self) -> str:
        """Describe the pass in one sentence."""
        if self.obstacles:
            return f"{self.name}: not applied, {' and '.join(self.obstacles)}"
        size = "" if self.latent is None else f", {Grid(*self.latent).pixels}"
        if self.tuned:
            return f"{self.name}{size}: {self.tuned}"
        size += f", {self.plan}" if self.plan else ""
        if self.changed():
            what = ", ".join(f"{plan.method.words(plan)} {in_layers(n)}" for plan, n in self.layers)
            parts = (what, self._calls_in_words(), self.pace.words(), str(self.closeness or ""))
            return f"{self.name}{size}: {'; '.join(part for part in parts if part)}"
        why = "; ".join(self.idle) or "the U-Net was not called"
        if self.layers:
            why = "no step lay between From and Until"
        return f"{self.name}{size}: nothing to do, {why}"

    def _calls_in_words(self) -> str:
        """Describe the calls, as in "calls: 40 with agents, 88 untouched"."""
        counts = sorted(self.calls.items(), key=_changed_first)
        return "calls: " + ", ".join(f"{n} {method_of(action).phrase}" for action, n in counts)


def _changed_first(item: tuple[str, int]) -> bool:
    return item[0] == UNTOUCHED


def _append_new(items: list[Any], item: Any) -> None:
    if item not in items:
        items.append(item)


class Status:
    """Status of the last run.

    Attributes:
        run: number of the run.
        task: the host's id of the request that it belongs to; empty if the host has none.
        at: when it began or its last pass ended, in seconds since the epoch.
        enabled: whether the extension was on and its settings were valid.
        error: why the settings were invalid; empty if they were not.
        passes: reports of its sampling passes; before them, those that earlier images of the request were tuned on.
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
        self.enabled = False
        self.error = ""
        self.passes: list[PassReport] = []
        self.tuned = False
        self.recording: Recording | None = None

    def begin(self, enabled: bool, error: str = "", task: str = "") -> None:
        """Start a generation of the request `task`; with an `error` it runs unpatched."""
        if self.task:
            self._earlier[self.task] = self.as_dict()
            while len(self._earlier) > _KEPT:
                self._earlier.popitem(last=False)
        tuned, passes = self.tuned, [report for report in self.passes if report.tuned and task and task == self.task]
        self.clear(task)
        self.passes, self.tuned = passes, tuned and bool(passes)
        self.run += 1
        self.enabled = enabled
        if error:
            self.fail(error)

    @property
    def order_done(self) -> bool:
        """Whether an earlier image of the request was tuned on, or was to be."""
        return any(report.tuned for report in self.passes)

    def fail(self, error: str) -> None:
        """State why nothing of this generation was patched."""
        self.error = error
        self.say(f"not applied: {error}")

    def add(self, report: PassReport) -> None:
        """Add the report of a pass that has ended."""
        self.passes.append(report)
        self.at = time.time()
        if report.changed() or report.tuned:
            log.info(report.sentence())
        for reason in (*report.obstacles, *report.notes):
            self.say(f"left to the host: {reason}")

    def say(self, message: str) -> None:
        """Print a message to the console, each distinct message only once."""
        if message not in self._said:
            self._said.add(message)
            print(f"[Agent Attention] {message}")

    def obstacles(self) -> list[str]:
        """List the reasons for leaving whole passes to the host."""
        return list(dict.fromkeys(reason for report in self.passes for reason in report.obstacles))

    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for report in self.passes for note in report.notes))

    def text(self) -> str:
        """Return the status line; empty while the extension is off."""
        if self.error:
            return f"Not applied: {self.error}"
        # a batch count repeats its passes
        lines = list(dict.fromkeys(report.sentence() for report in self.passes))
        lines += [f"left to the host: {note}" for note in self.notes()]
        return f"Last run: {'. '.join(lines)}." if lines else ""

    def state(self) -> str:
        """Tell how the run went, in the preview's words for a line; empty if there is nothing to tell."""
        if self.error or self.obstacles() or any(report.refused for report in self.passes):
            return WRONG
        if self.tuned:
            return ACTS
        if not any(report.changed() for report in self.passes):
            return NOTHING if self.passes else ""
        return SLOWER if any(report.pace.slower for report in self.passes) else ACTS

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
            "error": self.error,
            "notes": [*self.obstacles(), *self.notes()],
            "preset": TUNED if self.tuned else "",
            "passes": [
                {
                    "hires": report.hires,
                    "latent": report.latent,
                    "calls": dict(report.calls),
                    "layers": [{**{k: getattr(plan, k) for k in _TOLD}, "count": n} for plan, n in report.layers],
                    "models": report.models,
                    "pace": asdict(report.pace),
                    "closeness": None if report.closeness is None else asdict(report.closeness),
                    "plan": report.plan,
                    "tuned": report.tuned,
                    "obstacles": report.obstacles,
                    "notes": dict(report.notes),
                }
                for report in self.passes
            ],
        }


_UNKNOWN = Status().as_dict()
STATUS = Status()
