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
from .models import LAYOUTS, Layout, build, call, make_inputs

# Timesteps between consecutive calls, as with 20 steps.
STEP = 50
# Methods are not warmed up if a call takes this many seconds, since what a first call takes longer hardly counts then:
# most methods, and the limits, which the others are measured against.
LONG, VERY_LONG = 8.0, 30.0


@cache
def estimate_flops(layout: Layout, size: tuple[int, int], batch: int) -> int:
    """FLOPs of an unpatched forward, counted without allocating memory."""
    meta = torch.device("meta")
    unet, inputs = build(layout, meta, torch.bfloat16), make_inputs(layout, size, batch, meta, torch.bfloat16)
    with meter.flops() as total:
        call(unet, inputs, 500.0)
    return total()


def naive_bytes(layout: Layout, case: Case, itemsize: int) -> int:
    """Bytes that naive attention keeps at the largest layer: its N × N scores and their softmax."""
    tokens = case.size[0] // 8 // layout.downsample * (case.size[1] // 8 // layout.downsample)
    return 2 * case.batch * layout.heads * tokens**2 * itemsize


def out_of_reach(method: Method, case: Case, machine: Machine, patience: float) -> str:
    """Why a method can't be measured on this machine; empty if it can."""
    layout, itemsize = LAYOUTS[case.layout], DTYPES[case.dtype].itemsize
    needed, free = naive_bytes(layout, case, itemsize) if method.naive else 0, machine.available_memory()
    if needed > 0.8 * free:
        return f"needs {needed / 2**30:.0f} GiB for its scores, {free / 2**30:.0f} GiB are free"
    seconds = estimate_flops(layout, case.size, case.batch) / machine.flops_per_second
    if method.quadratic and seconds > patience:
        return f"would take about {seconds:.0f} s per call, more than --patience {patience:.0f}"
    return ""


@dataclass
class Run:
    """Measures one case.

    Attributes:
        case: the case.
        entry: its entry in the results: "results" by method, and "rounds", each with the seconds of its methods.
        unet: the U-Net.
        machine: the machine.
        methods: all methods by name.
        save: called after each round.
        bar: shows the progress.
        patience: seconds of a call above which a method is skipped.
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
        self.inputs = make_inputs(
            layout, self.case.size, self.case.batch, self.machine.device, dtype, self.case.channels_last
        )

    def measure(self) -> None:
        """Add the missing rounds; each calls every method once, in a different order each time."""
        active = [name for name in self.case.methods if self._prepare(self.methods[name])]
        while active:
            finished = min(self._rounds_of(name) for name in active)
            if finished >= self.case.rounds:
                return
            seconds = sum(self._expected(name) for name in active)
            if seconds > self.machine.time_left():
                missing = self.case.rounds - finished
                self._skip("all", f"{missing} rounds are missing: the next would end after --minutes")
                return
            self.machine.unskip(self.case.name, "all")
            self._measure_round(active, finished)

    def _measure_round(self, active: list[str], finished: int) -> None:
        times: dict[str, float] = {}
        # shuffled rather than rotated, so that no method always comes after the same other one
        for name in random.Random(finished).sample(active, len(active)):
            self.bar.set_postfix_str(f"{self.case.name}: round {finished + 1}/{self.case.rounds}, {name}")
            times[name] = self._time(self.methods[name])
            self.bar.update()
        self.entry["rounds"].append({name: times[name] for name in active})
        self.save()

    def _rounds_of(self, name: str) -> int:
        return sum(name in times for times in self.entry["rounds"])

    def _expected(self, name: str) -> float:
        """Seconds that a method will take in a round, estimated from earlier rounds or else from its FLOPs."""
        method = self.methods[name]
        earlier = [times[name] for times in self.entry["rounds"] if name in times]
        flops = self.entry["results"][name]["flops"]
        return method.calls * (median(earlier) if earlier else flops / self.machine.flops_per_second)

    def _prepare(self, method: Method) -> bool:
        """Count a method's costs and warm it up; whether it can be timed."""
        reason = out_of_reach(method, self.case, self.machine, self.patience)
        if not reason and self._rounds_of(method.name) < self.case.rounds:
            reason = self._count_and_warm_up(method)
        if reason:
            self._skip(method.name, reason)
        return not reason

    def _count_and_warm_up(self, method: Method) -> str:
        """Count FLOPs and bytes, unless that has been done, and warm up; why that failed, empty if it did not."""
        self.bar.set_postfix_str(f"{self.case.name}: warm-up, {method.name}")
        results = self.entry["results"]
        try:
            if method.name not in results:
                results[method.name] = {"label": method.label, **self._count(method)}
            longest = VERY_LONG if method.name.startswith("limit") else LONG
            if self._expected(method.name) < longest * method.calls:
                self._time(method)
        except Exception as error:  # a peer that can't run this model is a result too
            results.pop(method.name, None)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def _count(self, method: Method) -> dict[str, int]:
        """FLOPs and bytes of a call; nothing is computed if the method never reads the values of its tensors."""
        try:
            with method.install(self.unet) as check, FakeTensorMode(allow_non_fake_inputs=True):
                costs = meter.count(lambda: call(self.unet, self.inputs, 500.0))
                check()
            return costs
        except Exception:  # it reads values, so compute them
            with method.install(self.unet) as check:
                costs = meter.count(lambda: call(self.unet, self.inputs, 500.0))
                check()
            return costs

    def _time(self, method: Method) -> float:
        """Seconds per call: the mean over `method.calls` calls, after which its cost repeats."""
        with method.install(self.unet) as check:
            self.machine.sync()
            start = time.perf_counter()
            for i in range(method.calls):
                call(self.unet, self.inputs, 999.0 - STEP * i)
            self.machine.sync()
            seconds = (time.perf_counter() - start) / method.calls
            check()
        return seconds

    def _skip(self, method: str, reason: str) -> None:
        self.machine.skip(self.case.name, method, reason)
