"""Time methods on a U-Net in interleaved rounds: called as usual, replayed from a CUDA graph, or compiled."""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .machine import DTYPES, Machine, choose_device, parser_for
from .methods import Method, check, methods
from .models import LAYOUTS, build, call, make_inputs
from .results import Results, ResumeError

EAGER, GRAPH, COMPILED = "eager", "graph", "compiled"
TIMESTEP = 500.0
# A timing covers at least this many seconds, so that the clock's resolution does not show.
SHORTEST = 0.02
# A call that takes longer than this is timed without a call before it: planning does not count in it.
LONG = 2.0
# Seconds that are left for writing results.
RESERVE = 5.0

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One U-Net at one size, called in one way."""

    layout: str  # a key of `LAYOUTS`
    size: tuple[int, int]  # (height, width) of the image in pixels
    methods: tuple[str, ...]
    mode: str = EAGER
    dtype: str = "bfloat16"
    batch: int = 2  # cond and uncond
    rounds: int = 7

    @property
    def name(self) -> str:
        height, width = self.size
        label = LAYOUTS[self.layout].label
        return f"{label}, {width}×{height}, {self.dtype}, batch {self.batch}, {self.mode}"


class Bench:
    """Measures cases on one machine; keep cases of one U-Net together, so that it is built once."""

    def __init__(self, machine: Machine, results: Results) -> None:
        self.machine, self.results = machine, results
        machine.skipped = results.out["skipped"]
        self.unet: nn.Module | None = None
        self._built: tuple[str, str] | None = None

    def measure(self, case: Case) -> None:
        """Add the rounds that are missing of a case, as far as the time allows; each calls every method once."""
        entry = self.results.entry(case)
        if len(entry["rounds"]) >= case.rounds or self.machine.time_left() < RESERVE:
            return None
        if case.mode == GRAPH and self.machine.device.type != "cuda":
            return self.machine.skip(case.name, "all", "only CUDA replays graphs")
        inputs = self.build(case)
        runs: dict[str, Callable[[], AbstractContextManager[Run]]] = {}
        known = methods(LAYOUTS[case.layout].downsample)
        with ExitStack() as stack:
            for name in case.methods:
                if self.machine.time_left() < RESERVE:
                    break
                try:
                    runs[name], costs = self._prepare(known[name], case.mode, inputs, stack)
                except Exception as error:  # a method that cannot run here is a result too
                    self.machine.skip(case.name, name, f"{type(error).__name__}: {error}".splitlines()[0])
                    continue
                entry["results"][name] = {"label": known[name].label, **entry["results"].get(name, {}), **costs}
            while runs and len(entry["rounds"]) < case.rounds:
                last = entry["rounds"][-1] if entry["rounds"] else {}
                took = sum(seconds * entry["results"][name]["calls"] for name, seconds in last.items())
                if 2 * took > self.machine.time_left() - RESERVE:
                    self.machine.skip(case.name, "all", f"only {len(entry['rounds'])} rounds fitted into --minutes")
                    break
                self._measure_round(entry, runs)
        torch.compiler.reset()  # the compiled U-Nets are gone
        return None

    def build(self, case: Case) -> dict[str, Any]:
        """Make the case's U-Net, unless it is there, and the arguments of a call."""
        device, dtype, layout = self.machine.device, DTYPES[case.dtype], LAYOUTS[case.layout]
        if self._built != (case.layout, case.dtype):
            self.unet = None  # free the last one before building the next
            self.unet, self._built = build(layout, device, dtype), (case.layout, case.dtype)
        return make_inputs(layout, case.size, case.batch, device, dtype)

    def _prepare(
        self, method: Method, mode: str, inputs: dict[str, Any], stack: ExitStack
    ) -> tuple[Callable[[], AbstractContextManager[Run]], dict[str, Any]]:
        """Install a method, call it for the first time, and return what to time and what it costs besides time."""
        if mode == COMPILED:  # a patch that comes and goes would be compiled anew: each method has a U-Net of its own
            unet = copy.deepcopy(self.unet)
            stack.enter_context(method.install(unet))
            run: Run = partial(call, torch.compile(unet), inputs, TIMESTEP)
            costs = self._first_call(run, unet)
        else:
            run = partial(call, self.unet, inputs, TIMESTEP)
            with method.install(self.unet):
                costs = self._first_call(run, self.unet)
                if mode == GRAPH:
                    run = _captured(run)
        costs["calls"] = 1 if costs["first"] > LONG else max(1, round(SHORTEST / self.machine.seconds(run)))
        if mode == EAGER:
            return partial(_installed, method, self.unet, run, warm=costs["first"] < LONG), costs
        return partial(nullcontext, run), costs

    def _first_call(self, run: Run, unet: nn.Module) -> dict[str, Any]:
        """Call it for the first time: seconds, and on CUDA kernels and the peak of memory beyond what was there."""
        begun = time.perf_counter()
        run()
        check(unet)
        costs = {"first": time.perf_counter() - begun, "kernels": None, "peak": None}
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run()
                torch.cuda.synchronize()
            costs["peak"] = torch.cuda.max_memory_allocated() - before
            costs["kernels"] = sum(event.device_type == DeviceType.CUDA for event in profiler.events())
        return costs

    def _measure_round(self, entry: dict[str, Any], runs: dict[str, Callable[[], AbstractContextManager[Run]]]) -> None:
        # shuffled rather than rotated, so that no method always comes after the same other one
        order = random.Random(len(entry["rounds"])).sample(list(runs), len(runs))
        times = {}
        for name in tqdm(order, desc=f"{entry['case']}, round {len(entry['rounds']) + 1}", leave=False):
            with runs[name]() as run:
                times[name] = self.machine.seconds(run, entry["results"][name]["calls"])
        entry["rounds"].append(times)
        self.results.write()


@contextmanager
def _installed(method: Method, unet: nn.Module, run: Run, warm: bool) -> Iterator[Run]:
    """Install a method while it is timed; a first call there plans, and is not timed."""
    with method.install(unet):
        if warm:
            run()
        yield run
        check(unet)


def _captured(run: Run) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first call may set up what no graph can record
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.output = run()
    return graph.replay


# The command line of programs that measure cases


def make_parser(module: str, description: str | None, epilog: str = "", **defaults: Any) -> argparse.ArgumentParser:
    """The options that they share, with defaults of their own."""
    parser = parser_for(module, description, epilog)
    add, name = parser.add_argument, module.rpartition(".")[2]
    add("--layouts", "--only", nargs="+", choices=sorted(LAYOUTS), metavar="UNET", help="U-Nets (default %(default)s)")
    add("--sizes", nargs="+", type=_size, metavar="SIZE", help="only these sizes in pixels: 512, or WIDTHxHEIGHT")
    add("--dtype", choices=sorted(DTYPES), help="dtype of the U-Nets (default %(default)s)")
    add("--rounds", type=int, help="rounds of each case (default %(default)s)")
    add("--minutes", type=float, help="begin no round that would end after so many minutes (default %(default)s)")
    add("--device", default="auto", help="a device, or auto for the first of CUDA, MPS and CPU (default auto)")
    add("--resume", action=argparse.BooleanOptionalAction, help="add what is missing to the results that are there")
    add("--publish", action="store_true", help="measure nothing; write the results into docs/")
    add("--out", type=Path, default=Path("out", name), help="folder of the results (default %(default)s)")
    parser.set_defaults(**defaults, stem=name)
    return parser


def opened(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Bench:
    """What measures the cases of a command line."""
    machine = Machine(choose_device(options.device), deadline=time.monotonic() + 60 * options.minutes)
    try:
        return Bench(machine, Results(options.out / options.stem, machine.describe(), options.resume))
    except ResumeError as error:
        return parser.error(f"{error}; --no-resume begins anew")


def _size(text: str) -> tuple[int, int]:
    """(height, width) of a size that is written width first."""
    sides = [int(side) for side in text.lower().replace("×", "x").split("x")]
    width, height = sides if len(sides) == 2 else sides * 2
    if min(height, width) < 64 or height % 64 or width % 64 or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be multiples of 64 pixels, from 64, got {text}")
    return height, width
