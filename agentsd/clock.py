"""Seconds and memory of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all its work."""
    getattr(getattr(torch, device.type, None), "synchronize", lambda: None)()
    return time.perf_counter()


class Clock:
    """Measures seconds. Given to whatever measures, so that a test can decide what it sees."""

    def timed(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        """Return what `run` returns, and its seconds until the device is done."""
        start = now(device)
        result = run()
        return result, now(device) - start


WALL = Clock()


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Return what `run` returns, and the most bytes of tensors that the device held meanwhile, the weights included.

    None where the device does not tell, as a CPU.
    """
    module = getattr(torch, device.type, None)
    if not hasattr(module, "max_memory_allocated"):
        return run(), None
    module.reset_peak_memory_stats(device)
    return run(), module.max_memory_allocated(device)
