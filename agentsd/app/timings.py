"""Seconds of passes with and without agents: of the last run, and what was measured here before.

On an accelerator the first pass of its kind times its own layers (`agentsd.Patch.measure`). On a CPU the seconds of
ordinary U-Net calls do, with and without.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
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
class Pace:
    """Median seconds per U-Net call of a pass, with the sampler's own work; None if there was no such call."""

    patched: float | None = None  # over the calls in which some self-attention was changed
    untouched: float | None = None  # over the others

    @property
    def slower(self) -> bool:
        """Whether patched calls took clearly longer than the others."""
        return None not in (self.patched, self.untouched) and self.patched > CLEARLY * self.untouched

    def words(self) -> str:
        """Describe the pace, as in "0.41 s per U-Net call with, 0.52 s without"; empty if nothing was timed."""
        timed = [(name, s) for name, s in (("with", self.patched), ("without", self.untouched)) if s is not None]
        told = ", ".join(f"{s:.{2 if s >= 0.1 else 3}f} s {name}" for name, s in timed)
        return told.replace(" s ", " s per U-Net call ", 1)


class StepClock:
    """Timer of U-Net calls, from one to the next by the clock `now`, without waiting for a device that lags behind."""

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


@dataclass(frozen=True)
class Timing:
    """Seconds per U-Net call that were measured here."""

    patched: float  # with agents
    untouched: float  # without
    layers: bool = False  # whether they are those of the changed layers' self-attention alone

    @property
    def slower(self) -> bool:
        return self.patched > (1.0 if self.layers else CLEARLY) * self.untouched

    @property
    def gain(self) -> float:
        """Seconds without / seconds with."""
        return self.untouched / self.patched

    def words(self) -> str:
        """Describe both, such as "410 → 330 ms per U-Net call"."""
        what = "self-attention " if self.layers else ""
        ours, full = (f"{1000 * s:{'.0f' if s >= 0.01 else '.2g'}}" for s in (self.patched, self.untouched))
        return f"{what}{full} → {ours} ms per U-Net call"


def case_of(unet: nn.Module, checkpoint: str, latent: tuple[int, int], rows: int) -> str:
    """Describe what the seconds of a U-Net call depend on beside the settings."""
    weight = weight_of(unet)
    device = weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    height, width = latent
    return f"{checkpoint} {width}x{height} {rows} {weight.dtype} {name} torch {torch.__version__}"


class Timings:
    """Seconds kept in a host's cache. What is damaged there counts as absent.

    Args:
        open_section: opens a section of it by its name and a default, a mapping of texts to JSON types.
    """

    def __init__(self, open_section: Callable[[str, dict[str, Any]], MutableMapping[str, Any]]) -> None:
        self._open = open_section

    def find(self, key: tuple[str, str]) -> Timing | None:
        """Return what was measured of passes with this case and settings; None if not both are known."""
        layers = self._read(key, "layers")
        if len(layers) == 2:
            return Timing(layers[0], layers[1], layers=True)
        with_, without = self._read(key, "calls"), self._read((key[0], ""), "calls")
        return Timing(statistics.median(with_), statistics.median(without)) if with_ and without else None

    def put_layers(self, key: tuple[str, str], patched: float, untouched: float) -> None:
        """Keep the seconds of the changed layers in a U-Net call."""
        self._write(key, "layers", [patched, untouched])

    def add_calls(self, key: tuple[str, str], patched: float | None, untouched: float | None) -> None:
        """Keep the seconds of a U-Net call in a run; None where there was no such call."""
        for at, seconds in ((key, patched), ((key[0], ""), untouched)):
            if seconds is not None:
                self._write(at, "calls", [*self._read(at, "calls"), seconds][-_RUNS:])

    def _read(self, key: tuple[str, str], kind: str) -> list[float]:
        found = self._open(SECTION, {}).get(_text(key))
        seconds = found.get(kind) if isinstance(found, dict) else None
        valid = isinstance(seconds, list) and all(isinstance(s, float) and s > 0 for s in seconds)
        return seconds if valid else []

    def _write(self, key: tuple[str, str], kind: str, seconds: list[float]) -> None:
        self._open(SECTION, {})[_text(key)] = {kind: seconds}


def _text(key: tuple[str, str]) -> str:
    case, settings = key
    return f"{case} {hashlib.sha1(settings.encode()).hexdigest()[:16] if settings else 'without'}"
