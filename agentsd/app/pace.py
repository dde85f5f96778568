"""Speed of the U-Net calls of a pass, patched and untouched.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..methods import UNTOUCHED
from .timings import CLEARLY


@dataclass(frozen=True)
class Pace:
    """Median seconds per U-Net call, including the sampler's own work; None if there was no such call.

    Attributes:
        patched: over the calls in which some self-attention was changed.
        untouched: over the other calls.
    """

    patched: float | None = None
    untouched: float | None = None

    @property
    def slower(self) -> bool:
        """Whether patched calls took clearly longer than the others."""
        return None not in (self.patched, self.untouched) and self.patched > CLEARLY * self.untouched

    def words(self) -> str:
        """Describe the pace, as in "0.41 s per U-Net call with, 0.52 s without"; empty if nothing was timed."""
        named = (("with", self.patched), ("without", self.untouched))
        told = ", ".join(f"{_digits(seconds)} s {name}" for name, seconds in named if seconds is not None)
        return told.replace(" s ", " s per U-Net call ", 1)


def _digits(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}"


def changed(calls: Mapping[str, int]) -> int:
    """Count the self-attention calls that were changed."""
    return sum(n for action, n in calls.items() if action != UNTOUCHED)


class StepClock:
    """Timer of U-Net calls, from one to the next, without waiting for a device that lags behind.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begun: float | None = None
        self._count = 0
        self._laps: dict[bool, list[float]] = {True: [], False: []}

    def lap(self, count: int = 0) -> None:
        """Mark the start of a call or the end of the pass, with `count` changed self-attention calls so far."""
        now = self._now()
        if self._begun is not None:
            self._laps[count > self._count].append(now - self._begun)
        self._begun, self._count = now, count

    def pace(self, skip: int = 0) -> Pace:
        """Return the pace so far, without the first `skip` calls of each kind, which load what they need."""
        laps = (self._laps[key][skip:] for key in (True, False))
        return Pace(*(statistics.median(of_kind) if of_kind else None for of_kind in laps))
