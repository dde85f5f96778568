"""Time the methods of a case in interleaved rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from . import meter
from .cases import DTYPES, Case
from .machine import Machine
from .methods import Method
from .models import LAYOUTS, Layout, build, call, inputs

# Timesteps of consecutive calls, as in 20 steps.
STEP = 50
# Seconds of a call from which on a method gets no warm-up of its own, a limit still does, and nothing does: a first
# call's tenths of a second are lost in it, and in the median.
LONG, VERY_LONG = 8.0, 30.0


@cache
def estimate_flops(layout: Layout, size: tuple[int, int], batch: int) -> int:
    """FLOPs of an unpatched forward, counted on a model without storage."""
    meta = torch.device("meta")
    unet, given = build(layout, meta, torch.bfloat16), inputs(layout, size, batch, meta, torch.bfloat16)
    with meter.flops() as counted:
        call(unet, given, 500.0)
    return counted()


def naive_bytes(layout: Layout, case: Case, itemsize: int) -> int:
    """What an N × N attention keeps at its largest layer: the scores and their softmax."""
    tokens = case.size[0] // 8 // layout.downsample * (case.size[1] // 8 // layout.downsample)
    return 2 * case.batch * layout.heads * tokens**2 * itemsize


def out_of_reach(method: Method, case: Case, machine: Machine, patience: float) -> str:
    """Why a method can't be measured here; empty if it can."""
    layout, itemsize = LAYOUTS[case.layout], DTYPES[case.dtype].itemsize
    need, have = naive_bytes(layout, case, itemsize) if method.naive else 0, machine.available_memory()
    if need > 0.8 * have:
        return f"needs {need / 2**30:.0f} GiB for its scores, {have / 2**30:.0f} GiB are free"
    unpatched = method.name == "sdpa" or method.naive or method.name.startswith("tomesd")
    seconds = estimate_flops(layout, case.size, case.batch) / machine.flops_per_second
    if unpatched and seconds > patience:
        return f"would take about {seconds:.0f} s a call, more than --patience {patience:.0f}"
    return ""


@dataclass
class Run:
    """A case on a U-Net, and where its rounds go.

    Attributes:
        entry: the case in the results: "results" by method, and "rounds", each with the seconds of its methods.
        save: called after each round.
    """

    case: Case
    entry: dict[str, Any]
    unet: Any
    machine: Machine
    methods: dict[str, Method]
    save: Callable[[], None]
    bar: tqdm
    patience: float = 120.0

    def __post_init__(self) -> None:
        layout, dtype = LAYOUTS[self.case.layout], DTYPES[self.case.dtype]
        self.given = inputs(
            layout, self.case.size, self.case.batch, self.machine.device, dtype, self.case.channels_last
        )

    def measure(self) -> None:
        """Add the rounds that are missing, each method once in a round, in another order each time."""
        active = [name for name in self.case.methods if self._prepared(self.methods[name])]
        while active:
            done = min(self._rounds_of(name) for name in active)
            if done >= self.case.rounds:
                return
            seconds = sum(self._expected(name) for name in active)
            if seconds > self.machine.time_left():
                left = self.case.rounds - done
                self._skip("all", f"{left} rounds are left to do: the next would go beyond --minutes")
                return
            self._forget_skip("all")
            self._round(active, done)

    def _round(self, active: list[str], done: int) -> None:
        times: dict[str, float] = {}
        # shuffled, and not only rotated: no method shall always come after the same other one
        for name in random.Random(done).sample(active, len(active)):
            self.bar.set_postfix_str(f"{self.case.name}: round {done + 1}/{self.case.rounds}, {name}")
            times[name] = self._time(self.methods[name])
            self.bar.update()
        self.entry["rounds"].append({name: times[name] for name in active})
        self.save()

    def _rounds_of(self, name: str) -> int:
        return sum(name in one for one in self.entry["rounds"])

    def _expected(self, name: str) -> float:
        """Seconds that a method will take in a round: as before, or else as its FLOPs say."""
        method = self.methods[name]
        before = [one[name] for one in self.entry["rounds"] if name in one]
        flops = self.entry["results"][name]["flops"]
        return method.calls * (median(before) if before else flops / self.machine.flops_per_second)

    def _prepared(self, method: Method) -> bool:
        """Whether a method can be timed: it is within reach, its costs are counted and it is warm."""
        reason = out_of_reach(method, self.case, self.machine, self.patience)
        if not reason and self._rounds_of(method.name) < self.case.rounds:
            reason = self._count(method)
        if reason:
            self._skip(method.name, reason)
        return not reason

    def _count(self, method: Method) -> str:
        """Count FLOPs and bytes unless that is done, and warm up; why that failed, or an empty string."""
        self.bar.set_postfix_str(f"{self.case.name}: warm-up, {method.name}")
        results = self.entry["results"]
        try:
            if method.name not in results:
                results[method.name] = {"label": method.label, **self._counted(method)}
            worth = VERY_LONG if method.name.startswith("limit") else LONG
            if self._expected(method.name) < worth * method.calls:
                self._time(method)
        except Exception as error:  # a peer that can't run this model is a result too
            results.pop(method.name, None)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def _counted(self, method: Method) -> dict[str, int]:
        """FLOPs and bytes of a call, without computing it where the method does without the values of its tensors."""
        try:
            with method.install(self.unet) as check, FakeTensorMode(allow_non_fake_inputs=True):
                counted = meter.count(lambda: call(self.unet, self.given, 500.0))
                check()
            return counted
        except Exception:  # whatever it was: the values are needed
            with method.install(self.unet) as check:
                counted = meter.count(lambda: call(self.unet, self.given, 500.0))
                check()
            return counted

    def _time(self, method: Method) -> float:
        """Seconds per call, the mean of as many calls as the method's cost takes to repeat."""
        with method.install(self.unet) as check:
            self.machine.sync()
            start = time.perf_counter()
            for i in range(method.calls):
                call(self.unet, self.given, 999.0 - STEP * i)
            self.machine.sync()
            seconds = (time.perf_counter() - start) / method.calls
            check()
        return seconds

    def _skip(self, names: str, reason: str) -> None:
        self.machine.skip(self.case.name, names, reason)

    def _forget_skip(self, names: str) -> None:
        self.machine.skipped[:] = [
            s for s in self.machine.skipped if (s["case"], s["method"]) != (self.case.name, names)
        ]
