"""Time methods on a U-Net in interleaved rounds: called as usual, replayed from a CUDA graph, or compiled."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from agentsd.hosts import find_sites

from .machine import DTYPES, Machine
from .methods import Method, methods
from .models import LAYOUTS, build, call, make_inputs
from .results import Results

EAGER, GRAPH, COMPILED = "eager", "graph", "compiled"
TIMESTEP = 500.0
# A timing covers at least this many seconds, so that the clock's resolution does not show.
SHORTEST = 0.02
# A call that takes longer than this is timed without a call before it: planning does not count in it.
LONG = 2.0
# Seconds that are left for writing results.
RESERVE = 5.0


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
        with ExitStack() as stack:
            runs = dict(self._prepared(case, entry, inputs, stack))
            while runs and len(entry["rounds"]) < case.rounds:
                if 2 * _seconds_of_round(entry) > self.machine.time_left() - RESERVE:
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

    def _prepared(
        self, case: Case, entry: dict[str, Any], inputs: dict[str, Any], stack: ExitStack
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield each method that works here, and what to time; costs are measured on the way."""
        known = methods(LAYOUTS[case.layout].downsample)
        for name in case.methods:
            if self.machine.time_left() < RESERVE:
                return
            try:
                run, costs = self._prepare(known[name], case.mode, inputs, stack)
            except Exception as error:  # a method that cannot run here is a result too
                self.machine.skip(case.name, name, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            entry["results"][name] = {"label": known[name].label, **entry["results"].get(name, {}), **costs}
            yield name, run

    def _prepare(
        self, method: Method, mode: str, inputs: dict[str, Any], stack: ExitStack
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Install a method, call it for the first time, and return what to time and what it costs besides time."""
        if mode == COMPILED:  # a patch that comes and goes would be compiled anew: each method has a U-Net of its own
            unet = copy.deepcopy(self.unet)
            check = stack.enter_context(method.install(unet))
            compiled = torch.compile(unet)
            run = lambda: call(compiled, inputs, TIMESTEP)  # noqa: E731
            costs = self._first_call(run, check, count=False)  # nothing is compiled within a dispatch mode
        else:
            run = lambda: call(self.unet, inputs, TIMESTEP)  # noqa: E731
            with method.install(self.unet) as check:
                costs = self._first_call(run, check)
                if mode == GRAPH:
                    run = _captured(run)
            if mode == EAGER:
                run = _Installed(method, self.unet, run, warm=costs["first"] < LONG)
        costs["calls"] = 1 if costs["first"] > LONG else max(1, round(SHORTEST / self.machine.seconds(run)))
        return run, costs

    def _first_call(self, run: Callable[[], Any], check: Callable[[], None], count: bool = True) -> dict[str, Any]:
        """Call it for the first time: seconds, kernels launched, and the peak of memory beyond what was there."""
        begun, seen = time.perf_counter(), Launches()
        with seen if count else ExitStack():
            run()
        check()
        costs = {"first": time.perf_counter() - begun, "kernels": seen.total, "peak": 0}
        if self.machine.device.type == "cuda":
            self.machine.sync()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run()
                self.machine.sync()
            costs["peak"] = torch.cuda.max_memory_allocated() - before
            costs["kernels"] = sum(event.device_type == DeviceType.CUDA for event in profiler.events())
        return costs

    def _measure_round(self, entry: dict[str, Any], runs: dict[str, Callable[[], Any]]) -> None:
        # shuffled rather than rotated, so that no method always comes after the same other one
        order = random.Random(len(entry["rounds"])).sample(list(runs), len(runs))
        times = {}
        for name in tqdm(order, desc=f"{entry['case']}, round {len(entry['rounds']) + 1}", leave=False):
            with runs[name].inside() if isinstance(runs[name], _Installed) else ExitStack():
                times[name] = self.machine.seconds(runs[name], entry["results"][name]["calls"])
        entry["rounds"].append(times)
        self.results.write()


def _seconds_of_round(entry: dict[str, Any]) -> float:
    last = entry["rounds"][-1] if entry["rounds"] else {}
    return sum(seconds * entry["results"][name]["calls"] for name, seconds in last.items())


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first call may set up what no graph can record
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.output = run()
    return graph.replay


class _Installed:
    """A call of a U-Net that a method is installed on only while it is timed."""

    def __init__(self, method: Method, unet: nn.Module, run: Callable[[], Any], warm: bool) -> None:
        self.method, self.unet, self.run, self.warm = method, unet, run, warm

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Install the method for the length of a `with` block; a first call there plans, and is not timed."""
        with self.method.install(self.unet) as check:
            if self.warm:
                self.run()
            yield
            check()

    def __call__(self) -> Any:
        return self.run()


class Launches(TorchDispatchMode):
    """Counts the operators that compute something: as many as kernels on a card, unless a library splits one."""

    _ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not (func.is_view or func.overloadpacket.__name__ in self._ROOM)
        return func(*args, **(kwargs or {}))


def self_attention_share(unet: nn.Module, run: Callable[[], Any], machine: Machine) -> dict[str, float]:
    """Shares of an unpatched call's time by the profiler: of the self-attention layers, and of SDPA within them."""
    cuda = machine.device.type == "cuda"
    open_ranges: list[Any] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function("self-attention").__enter__())

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    layers = [site.block.attn1 for site in find_sites(unet)]
    handles = [
        h for layer in layers for h in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))
    ]
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler, record_function("call"):
        run()
        machine.sync()
    for handle in handles:
        handle.remove()

    def seconds(name: str, within: str = "") -> float:
        found = [e for e in profiler.events() if e.name == name and e.device_type == DeviceType.CPU]
        found = [e for e in found if not within or any(p.name == within for p in _parents(e))]
        return sum(e.device_time_total if cuda else e.cpu_time_total for e in found)

    whole = seconds("call")
    sdpa = seconds("aten::scaled_dot_product_attention", "self-attention")
    return {"layers": seconds("self-attention") / whole, "sdpa": sdpa / whole}


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def sdpa_seconds(machine: Machine, layout: str, side: int, dtype: str) -> list[dict[str, Any]]:
    """Seconds of SDPA, and FLOPs, of each class of self-attention layers of a U-Net."""
    classes: dict[tuple[int, int, int], int] = {}
    with torch.device("meta"):
        sites = find_sites(LAYOUTS[layout].build())
    for site in sites:
        key = (site.downsample, site.channels, site.heads)
        classes[key] = classes.get(key, 0) + 1
    rows = []
    for (downsample, channels, heads), count in sorted(classes.items()):
        tokens = (side // 8 // downsample) ** 2
        shape = (2, heads, tokens, channels // heads)
        qkv = [torch.randn(shape, device=machine.device).to(DTYPES[dtype]) for _ in range(3)]

        def attend(qkv: list[torch.Tensor] = qkv) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(*qkv)

        attend()
        figures = {"layers": count, "tokens": tokens, "heads": heads, "width": channels // heads}
        seconds = median(machine.seconds(attend, 3) for _ in range(3))
        rows.append({"layout": layout, "side": side, "dtype": dtype, **figures, "seconds": seconds})
        rows[-1]["flops"] = 4 * 2 * tokens**2 * channels
    return rows
