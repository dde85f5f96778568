"""What became of the last run: for the panel's status line, the console and the status route.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..methods import UNTOUCHED, LayerPlan, method_of
from ..patch import Patch
from .pace import Pace, changed
from .preview import in_layers
from .tokenmap import Recording

log = logging.getLogger("agentsd.panel")
_TOLD = ("action", "tokens", "queries", "agents")


@dataclass
class PassReport:
    """What was done in one sampling pass.

    Attributes:
        hires: whether it was the hires pass.
        latent: (height, width) of the latent; None before the first call of the U-Net.
        calls: number of self-attention calls by what was done: "agents", "merge", "pool", "untouched" …
        layers: the different plans of the layers that were changed, each with the number of its layers.
        idle: why the layers that could have been changed were not meant to be.
        obstacles: why the whole pass was left to the host.
        notes: why single calls were left to the host, with their number.
        models: number of U-Nets that were patched; 2 where a refiner took over.
        pace: how fast its steps were.
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

    @property
    def name(self) -> str:
        return "hires pass" if self.hires else "first pass"

    def add(self, patch: Patch, progress: float) -> None:
        """Take over what a patch has to tell before it is removed; `progress` is where its first stage begins."""
        self.models += 1
        self.notes.update(patch.notes)
        for layer in patch.report():
            self.calls.update(layer.calls)
        self.latent = patch.moment.latent or self.latent
        if self.latent is not None:
            self._add_plans(plan for _, plan in patch.explain(*self.latent, progress) if plan is not None)

    def _add_plans(self, plans: Iterable[LayerPlan]) -> None:
        counts: Counter[LayerPlan] = Counter()
        for plan in plans:
            if plan.acts:
                counts[plan] += 1
            else:
                _append_new(self.idle, plan.reason)
        for found in counts.items():  # a refiner's layers are not the model's once more
            _append_new(self.layers, found)

    def changed(self) -> int:
        """Number of self-attention calls that were changed."""
        return changed(self.calls)

    def sentence(self) -> str:
        """The pass in one sentence."""
        if self.obstacles:
            return f"{self.name}: not applied, {' and '.join(self.obstacles)}"
        size = "" if self.latent is None else f", {self.latent[1] * 8}×{self.latent[0] * 8}"
        if self.changed():
            what = ", ".join(f"{method_of(plan.action).words(plan)} {in_layers(n)}" for plan, n in self.layers)
            pace = self.pace.words()
            return f"{self.name}{size}: {what}; {self._calls_in_words()}" + (f"; {pace}" if pace else "")
        why = "; ".join(self.idle) or "the U-Net was not called"
        if self.layers:
            why = "no step lay between From and Until"
        return f"{self.name}{size}: nothing to do, {why}"

    def _calls_in_words(self) -> str:
        """Such as "40 calls with agents, 88 untouched"."""
        counts = sorted(self.calls.items(), key=_changed_first)
        return "calls: " + ", ".join(f"{n} {method_of(action).phrase}" for action, n in counts)


def _changed_first(item: tuple[str, int]) -> bool:
    return item[0] == UNTOUCHED


def _append_new(where: list[Any], what: Any) -> None:
    if what not in where:
        where.append(what)


class Status:
    """The last run.

    Attributes:
        run: its number.
        enabled: whether it was made with us.
        error: why it was not, though it should have been.
        passes: what was done in its sampling passes.
        recording: what its token map is drawn from; None where that was not asked for.
    """

    def __init__(self) -> None:
        self.run = 0
        self._said: set[str] = set()
        self.clear()

    def clear(self) -> None:
        self.enabled = False
        self.error = ""
        self.passes: list[PassReport] = []
        self.recording: Recording | None = None

    def begin(self, enabled: bool, error: str = "") -> None:
        """A generation begins; with an `error` it is made unpatched."""
        self.clear()
        self.run += 1
        self.enabled, self.error = enabled, error
        if error:
            self.say(f"not applied: {error}")

    def add(self, report: PassReport) -> None:
        """A pass has ended."""
        self.passes.append(report)
        if report.changed():
            log.info(report.sentence())
        for reason in (*report.obstacles, *report.notes):
            self.say(f"stands down: {reason}")

    def say(self, message: str) -> None:
        """Tell the console, once for each different message."""
        if message not in self._said:
            self._said.add(message)
            print(f"[Agent Attention] {message}")

    def obstacles(self) -> list[str]:
        """Why whole passes were left to the host."""
        return list(dict.fromkeys(reason for report in self.passes for reason in report.obstacles))

    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for report in self.passes for note in report.notes))

    def text(self) -> str:
        """The status line; empty where the extension is off."""
        if self.error:
            return f"Not applied: {self.error}"
        # a batch count repeats its passes
        lines = list(dict.fromkeys(report.sentence() for report in self.passes))
        lines += [f"left to the host: {note}" for note in self.notes()]
        return f"Last run: {'. '.join(lines)}." if lines else ""

    def as_dict(self) -> Mapping[str, Any]:
        """The same for the status route, in JSON's types."""
        return {
            "run": self.run,
            "enabled": self.enabled,
            "text": self.text(),
            "error": self.error,
            "notes": [*self.obstacles(), *self.notes()],
            "passes": [
                {
                    "hires": report.hires,
                    "latent": report.latent,
                    "calls": dict(report.calls),
                    "layers": [{**{k: getattr(plan, k) for k in _TOLD}, "count": n} for plan, n in report.layers],
                    "models": report.models,
                    "pace": asdict(report.pace),
                    "obstacles": report.obstacles,
                    "notes": dict(report.notes),
                }
                for report in self.passes
            ],
        }


STATUS = Status()
