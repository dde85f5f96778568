"""Seconds of U-Net calls with and without agents: in the last run, and as they were measured here before.

On an accelerator the first pass of its kind times its own layers (`agentsd.Patch.measure`). On a CPU the seconds of
ordinary U-Net calls do, with and without.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ..hosts.base import weight_of
from ..methods import UNTOUCHED

SECTION = "agent-attention-timings"  # our section in the host's cache
CLEARLY = 1.05  # what is less is noise, in seconds of whole calls
_RUNS = 5  # the last ones count


def changed(calls: Mapping[str, int]) -> int:
    return sum(n for action, n in calls.items() if action != UNTOUCHED)


@dataclass(frozen=True)
class Timing:
    """Median seconds of a U-Net call with the sampler's own work, or of the changed layers' self-attention in it."""

    patched: float | None = None  # with agents; None if there was no such call
    untouched: float | None = None  # without
    layers: bool = False  # whether it is of the layers alone

    @property
    def slower(self) -> bool:
        """Whether calls with agents took clearly longer."""
        known = self.patched is not None and self.untouched is not None
        return known and self.patched > (1.0 if self.layers else CLEARLY) * self.untouched

    @property
    def gain(self) -> float:
        """Seconds without / seconds with; requires both."""
        return self.untouched / self.patched

    def words(self) -> str:
        """Describe both, such as "410 → 330 ms per U-Net call"; requires them."""
        full, ours = (f"{1000 * s:{'.0f' if s >= 0.01 else '.2g'}}" for s in (self.untouched, self.patched))
        return f"{'self-attention ' * self.layers}{full} → {ours} ms per U-Net call"

    def last_words(self) -> str:
        """Describe what is known of a run, such as "0.41 s per U-Net call with, 0.52 s without"; empty if nothing."""
        timed = [(name, s) for name, s in (("with", self.patched), ("without", self.untouched)) if s is not None]
        told = ", ".join(f"{s:.{2 if s >= 0.1 else 3}f} s {name}" for name, s in timed)
        return told.replace(" s ", " s per U-Net call ", 1)


class StepClock:
    """Timer of U-Net calls, from one to the next by the clock `now`, without waiting for a device that lags behind."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._count = now, 0
        self._begun: float | None = None
        self._laps: dict[bool, list[float]] = {True: [], False: []}

    def lap(self, count: int = 0) -> None:
        """Mark the start of a call or the end of the pass, with `count` changed self-attention calls so far."""
        now = self._now()
        if self._begun is not None:
            self._laps[count > self._count].append(now - self._begun)
        self._begun, self._count = now, count

    def pace(self, skip: int = 0) -> Timing:
        """Return the seconds so far, without the first `skip` calls of each kind, which load what they need."""
        patched, untouched = (median(laps[skip:]) if laps[skip:] else None for laps in self._laps.values())
        return Timing(patched, untouched)


def case_of(unet: nn.Module, checkpoint: str, latent: tuple[int, int], rows: int) -> str:
    """Describe what the seconds of a U-Net call depend on beside the settings."""
    weight, (height, width) = weight_of(unet), latent
    device = weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{checkpoint} {width}x{height} {rows} {weight.dtype} {name} torch {torch.__version__}"


class Timings:
    """Seconds in a host's cache, by (case, settings); full attention has no settings, "". See `kept_tunings.Store`."""

    def __init__(self, open_section: Callable[[str], MutableMapping[str, Any]]) -> None:
        self._open = open_section

    def find(self, key: tuple[str, str]) -> Timing | None:
        """Return what was measured of passes with this case and settings; None if not both are known."""
        layers, ours, full = self._read(*key, "layers"), self._read(*key), self._read(key[0])
        if len(layers) == 2:
            return Timing(layers[0], layers[1], layers=True)
        return Timing(median(ours), median(full)) if ours and full else None

    def put_layers(self, key: tuple[str, str], patched: float, untouched: float) -> None:
        """Keep the seconds of the changed layers in a U-Net call."""
        self._open(SECTION)[_text(*key, "layers")] = [patched, untouched]

    def add_calls(self, key: tuple[str, str], patched: float | None, untouched: float | None) -> None:
        """Keep the seconds of a U-Net call in a run; None where there was no such call."""
        for settings, seconds in ((key[1], patched), ("", untouched)):
            if seconds is not None:
                self._open(SECTION)[_text(key[0], settings)] = [*self._read(key[0], settings), seconds][-_RUNS:]

    def _read(self, *key: str) -> list[float]:
        seconds = self._open(SECTION).get(_text(*key))
        valid = isinstance(seconds, list) and all(isinstance(s, float) and s > 0 for s in seconds)
        return seconds if valid else []


def _text(case: str, settings: str = "", of: str = "calls") -> str:
    return f"{case} {hashlib.sha1(settings.encode()).hexdigest()[:16] if settings else 'without'} {of}"
