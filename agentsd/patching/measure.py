"""Is it faster here? Each patched layer's self-attention, timed with and without on the tensors of a running pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..clock import Clock

Run = Callable[[], Any]


class Measured(NamedTuple):
    """Seconds that one U-Net call spent in what a patch changes, in all layers together."""

    with_seconds: float  # with the patch, clusters included
    without_seconds: float  # with the host's own attention and layers


class Measurement:
    """Times what a patch does beside what it replaces: a first time to warm up, and a second time that counts."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        # seconds (with, without) of each run, by the block's name and its part
        self._runs: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    def time(self, name: str, part: str, ours: Run, host: Run | None, device: torch.device) -> Any:
        """Return what `ours` returns for a part of the block `name`, and time it and the same without the patch.

        `host` is None where the host does nothing of the kind, as matching. What it returns is thrown away.
        """
        out, seconds = self.clock.timed(ours, device)
        try:
            host_seconds = 0.0 if host is None else self.clock.timed(host, device)[1]
        except RuntimeError:  # too little memory for what the patch replaces
            host_seconds = float("inf")
        self._runs[name, part].append((seconds, host_seconds))
        return out

    def end_call(self) -> Measured | None:
        """Return the result at the end of a U-Net call, once every part that was seen has been timed twice."""
        if not self._runs or any(len(runs) < 2 for runs in self._runs.values()):
            return None
        # the first time, kernels are loaded and memory is taken
        return Measured(*map(sum, zip(*(runs[1] for runs in self._runs.values()), strict=True)))
