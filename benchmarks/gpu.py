"""Everything that can be measured on a card, in one command; it also runs on a CPU, slowly.

    python -m benchmarks.gpu                # out/gpu/gpu.md after eight minutes at most
    python -m benchmarks.gpu --minutes 30   # go on where it ended, and add what was missing
    python -m benchmarks.gpu --only sd15    # one part

U-Nets with random weights; each method on the largest self-attention layers, in interleaved rounds in random order:
called as usual, replayed from a CUDA graph, and compiled. Times are CUDA events' (the wall clock's on a CPU). What
tells most comes first, results are written after each round, and a later run adds to them. docs/gpu.md says how to run
it on a machine without a network.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from agentsd.hosts import find_sites

from . import gpu_report, meter
from .cases import DTYPES
from .machine import ROOT, Machine, choose_device, this_run
from .methods import Method, on_largest
from .models import LAYOUTS, build, call, make_inputs
from .results import Results, ResumeError

MODULE = "benchmarks.gpu"
# The ways to call a U-Net
EAGER, GRAPH, COMPILED = "eager", "graph", "compiled"
MAIN = ("sdpa", "limit", "grid4", "corrected4", "local", "pool2", "paper", "merge.5", "tomesd.5", "tiles")
ALL = (*MAIN, "grid8", "corrected8", "similarity", "idle")
FEW = ("sdpa", "limit", "grid4", "corrected4", "local", "pool2", "tomesd.5")
# A timing covers at least this many seconds, so that the clock's resolution does not show.
SHORTEST = 0.02
# What a part of the program leaves for writing and for the table
RESERVE = 5.0


@dataclass(frozen=True)
class Case:
    """One U-Net at one size, called in one way.

    Attributes:
        layout: the U-Net, by its key in `LAYOUTS`.
        side: side of the image in pixels.
        mode: how it is called.
        methods: the methods to compare.
        dtype: dtype of the U-Net.
        batch: rows of the batch.
    """

    layout: str
    side: int
    mode: str = EAGER
    methods: tuple[str, ...] = MAIN
    dtype: str = "float16"
    batch: int = 2

    @property
    def name(self) -> str:
        label = LAYOUTS[self.layout].label
        return f"{label}, {self.side}×{self.side}, {self.dtype}, batch {self.batch}, {self.mode}"


def plan(layouts: tuple[str, ...], sides: tuple[int, ...] = ()) -> list[Case]:
    """The cases, those that tell most first; cases of one U-Net are together where that costs nothing."""
    if sides:  # a miniature
        return [Case(layout, side, mode, FEW) for layout in layouts for side in sides for mode in (EAGER, GRAPH)]
    both = (EAGER, GRAPH)
    first = [Case("sd15", side, mode, ALL if side == 512 else MAIN) for side in (512, 1024) for mode in both]
    first += [Case("sdxl", side, mode) for side in (1024, 2048) for mode in both]
    compiled = [Case("sd15", side, COMPILED, ("sdpa", "grid4", "corrected4")) for side in (512, 1024)]
    rest = [Case("sd15", side, mode) for side in (2048, 768, 1536, 640) for mode in both]
    rest += [Case("sdxl", 1536, mode) for mode in both]
    rest += [Case("sdxl", 1024, COMPILED, ("sdpa", "grid4"))]
    for layout, side in (("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("sdxl", 2048)):
        rest += [Case(layout, side, mode, FEW, batch=1) for mode in both]
        rest += [Case(layout, side, mode, FEW, dtype="bfloat16") for mode in both]
    return [case for case in (*first, *compiled, *rest) if case.layout in layouts]


class GpuResults(Results):
    """The file of results: cases, layers of SDPA, closeness and tests."""

    def entry(self, case: Case) -> dict[str, Any]:
        """The entry of a case."""
        for entry in self.out["cases"]:
            if entry["case"] == case.name:
                return entry
        self.out["cases"].append({"case": case.name, **vars(case), "results": {}, "rounds": []})
        return self.out["cases"][-1]

    def write(self) -> None:
        """Write the JSON and the table."""
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)
        self.stem.with_name(self.stem.name + ".md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        return gpu_report.markdown(self.out)


class Clock:
    """Times calls on a device: by CUDA events, or by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call of `run`."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


class Bench:
    """Measures cases on one machine.

    Args:
        machine: the machine.
        results: where figures go.
        rounds: rounds that each case gets.
    """

    def __init__(self, machine: Machine, results: GpuResults, rounds: int) -> None:
        self.machine, self.results, self.rounds = machine, results, rounds
        self.clock = Clock(machine.device)
        self.unet: nn.Module | None = None
        self._built: tuple[str, str] | None = None

    def measure(self, case: Case) -> None:
        """Add what is missing of a case, as far as the time allows."""
        entry = self.results.entry(case)
        if len(entry["rounds"]) >= self.rounds or self.machine.time_left() < RESERVE:
            return
        if case.mode == GRAPH and self.machine.device.type != "cuda":
            self.machine.skip(case.name, "all", "only CUDA replays graphs")
            return
        self._build(case)
        inputs = make_inputs(
            LAYOUTS[case.layout], (case.side,) * 2, case.batch, self.machine.device, DTYPES[case.dtype]
        )
        with ExitStack() as stack:
            runs = dict(self._prepared(case, entry, inputs, stack))
            while runs and len(entry["rounds"]) < self.rounds:
                if 2 * self._seconds_of_round(entry) > self.machine.time_left() - RESERVE:
                    self.machine.skip(case.name, "all", f"only {len(entry['rounds'])} rounds fitted into --minutes")
                    break
                self._measure_round(entry, runs)
        torch.compiler.reset()  # the compiled U-Nets are gone

    def _build(self, case: Case) -> None:
        if self._built == (case.layout, case.dtype):
            return
        self.unet = None  # free the last one before building the next
        if self.clock.cuda:
            torch.cuda.empty_cache()
        self.unet = build(LAYOUTS[case.layout], self.machine.device, DTYPES[case.dtype])
        self._built = case.layout, case.dtype

    def _prepared(
        self, case: Case, entry: dict[str, Any], inputs: dict[str, Any], stack: ExitStack
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield each method that works here, and what to time; costs are measured on the way."""
        methods = on_largest(LAYOUTS[case.layout].downsample)
        for name in case.methods:
            if self.machine.time_left() < RESERVE:
                return
            try:
                run, costs = self._prepare(methods[name], case.mode, inputs, stack)
                # one that has begun is one whose first calls are over
                costs["calls"] = max(1, round(SHORTEST / self.clock.seconds(run)))
            except Exception as error:  # a method that cannot run here is a result too
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.machine.skip(case.name, name, reason)
                continue
            entry["results"][name] = {"label": methods[name].label, **entry["results"].get(name, {}), **costs}
            self.results.write()
            yield name, run

    def _prepare(
        self, method: Method, mode: str, inputs: dict[str, Any], stack: ExitStack
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Install a method, call it for the first time, and return what to time and what it costs besides time."""
        if mode == COMPILED:  # a patch that comes and goes would be compiled anew: each method has a U-Net of its own
            unet = copy.deepcopy(self.unet)
            check = stack.enter_context(method.install(unet))
            compiled = torch.compile(unet)
            return self._begun(lambda: call(compiled, inputs, 500.0), check)
        with method.install(self.unet) as check:
            run, costs = self._begun(lambda: call(self.unet, inputs, 500.0), check)
            if mode == GRAPH:
                return self._captured(run), costs
            costs["kernels"] = kernels(run, self.machine.device)
        return _Installed(method, self.unet, run), costs

    def _begun(self, run: Callable[[], Any], check: Callable[[], None]) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Call it for the first time; what that costs."""
        begun = time.perf_counter()
        peak = self._peak(run)
        check()
        return run, {"first": time.perf_counter() - begun, "peak": peak}

    def _captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first call may set up what no graph can record
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.output = run()
        return graph.replay

    def _peak(self, run: Callable[[], Any]) -> int:
        """Bytes that a call needs beyond what is there before it; 0 where that cannot be told."""
        if not self.clock.cuda:
            run()
            return 0
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _measure_round(self, entry: dict[str, Any], runs: dict[str, Callable[[], Any]]) -> None:
        order = random.Random(len(entry["rounds"])).sample(list(runs), len(runs))
        times = {}
        for name in order:
            calls = entry["results"][name]["calls"]
            with runs[name].inside() if isinstance(runs[name], _Installed) else nothing():
                times[name] = self.clock.seconds(runs[name], calls)
        entry["rounds"].append(times)
        gpu_report.summarise(entry)
        self.results.write()

    def _seconds_of_round(self, entry: dict[str, Any]) -> float:
        if not entry["rounds"]:
            return 0.0
        return sum(s * entry["results"][name]["calls"] for name, s in entry["rounds"][-1].items())

    def attention(self, layout: str, side: int, dtype: str) -> None:
        """Seconds of SDPA in each class of self-attention layers of a U-Net."""
        classes: dict[tuple[int, int, int], int] = {}
        with torch.device("meta"):
            sites = find_sites(LAYOUTS[layout].build())
        for site in sites:
            key = (site.downsample, site.channels, site.heads)
            classes[key] = classes.get(key, 0) + 1
        for (downsample, channels, heads), count in sorted(classes.items()):
            tokens = (side // 8 // downsample) ** 2
            shape = (2, heads, tokens, channels // heads)
            q, k, v = (torch.randn(shape, device=self.machine.device).to(DTYPES[dtype]) for _ in range(3))

            def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            attend()
            seconds = median(self.clock.seconds(attend, 3) for _ in range(3))
            self.results.out.setdefault("attention", []).append(
                {
                    "layout": layout,
                    "side": side,
                    "dtype": dtype,
                    "downsample": downsample,
                    "layers": count,
                    "tokens": tokens,
                    "heads": heads,
                    "width": channels // heads,
                    "seconds": seconds,
                    "flops": 4 * 2 * tokens**2 * channels,
                }
            )
        self.results.write()


class _Installed:
    """A call of a U-Net that a method is installed on only while it is timed."""

    def __init__(self, method: Method, unet: nn.Module, run: Callable[[], Any]) -> None:
        self.method, self.unet, self.run = method, unet, run

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Install the method for the length of a `with` block; the first call there plans, and is not timed."""
        with self.method.install(self.unet) as check:
            self.run()
            yield
            check()

    def __call__(self) -> Any:
        return self.run()


@contextmanager
def nothing() -> Iterator[None]:
    yield


def kernels(run: Callable[[], Any], device: torch.device) -> int:
    """Count the kernels that a call launches: by the profiler on CUDA, elsewhere the operators other than views."""
    if device.type != "cuda":
        with meter.Launches() as seen:
            run()
        return seen.total
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def closeness(machine: Machine, results: GpuResults) -> None:
    """How far each method's forward passes of the embedded model are from unpatched ones, in each half precision.

    Relative: ‖patched − unpatched‖ / ‖unpatched‖ of the prediction, both in that dtype; and what the dtype alone does.
    """
    from agentsd import embedded

    if results.out.get("closeness"):
        return
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            pipe = embedded.load(device=machine.device, dtype=dtype)
            latents = pipe.noise([0, 1], 64, 64).to(machine.device, dtype)
            prompts = [pipe.prompts[0]] * 2
            outputs = {}
            for name, method in on_largest(1).items():
                if name in ("limit", "idle"):
                    continue
                with torch.no_grad(), method.install(pipe.unet) as check:
                    outputs[name] = pipe.predict(latents, 500, prompts).float().cpu()
                    check()
        except Exception as error:
            machine.skip("the embedded model", str(dtype), f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        plain = outputs["sdpa"]
        for name, output in outputs.items():
            error = float((output - plain).norm() / plain.norm())
            finite = bool(output.isfinite().all())
            rows.append({"dtype": str(dtype).removeprefix("torch."), "method": name, "error": error, "finite": finite})
    results.out["closeness"] = rows
    results.write()


def tests(machine: Machine, results: GpuResults) -> None:
    """Run the core's test suite on the device, as far as the time allows."""
    if results.out.get("tests", {}).get("finished") or machine.time_left() < 30:
        return
    log = results.stem.with_name("tests.log")
    environment = {"AGENTSD_DEVICE": machine.device.type, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *core_tests()]
    finished = True
    with log.open("w", encoding="utf-8") as out:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                timeout=machine.time_left() - RESERVE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            finished = False
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    results.out["tests"] = {"finished": finished, "last": lines[-1] if lines else "", "failed": failed[:50]}
    results.write()


def core_tests() -> list[str]:
    """The tests of the core: those of panel, command line, WebUI, ComfyUI and benchmarks are about no device."""
    others = (
        "bench",
        "cli",
        "comfy",
        "imports",
        "javascript",
        "panel",
        "playground",
        "settings",
        "tune",
        "webui",
        "zoo",
    )
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if not f.stem.split("_", 1)[1].startswith(others)]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parser.parse_args(argv)
    machine = Machine(choose_device(options.device))
    machine.deadline = time.monotonic() + 60 * options.minutes
    run = this_run(MODULE, sys.argv[1:] if argv is None else argv, [options.out])
    try:
        results = GpuResults(options.out / "gpu", machine.describe(), run, resume=not options.fresh)
    except ResumeError as error:
        parser.error(f"{error}; --fresh begins anew")
    machine.skipped = results.out["skipped"]
    cases = plan(tuple(options.only or ("sd15", "sdxl")), tuple(options.sizes or ()))
    if options.dtype:
        cases = [Case(**{**vars(case), "dtype": options.dtype}) for case in cases]
    bench = Bench(machine, results, options.rounds)
    with torch.no_grad():
        for case in {(c.layout, c.side, c.dtype): c for c in cases if c.batch == 2}.values():
            known = {(a["layout"], a["side"], a["dtype"]) for a in results.out.get("attention", [])}
            if (case.layout, case.side, case.dtype) not in known:
                bench.attention(case.layout, case.side, case.dtype)
        for i, case in enumerate(tqdm(cases, unit="case")):
            if i == 4 and not options.sizes:  # after the first four, which are the main table
                closeness(machine, results)
            bench.measure(case)
    if not options.sizes:
        bench.unet = None
        tests(machine, results)
    results.write()
    print(results.table())
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="end after this many minutes (default 8)")
    add("--only", nargs="+", choices=sorted(LAYOUTS), metavar="UNET", help="U-Nets to measure (default sd15 sdxl)")
    add("--sizes", nargs="+", type=int, metavar="SIDE", help="only these sides in pixels, few methods, no tests")
    add("--dtype", choices=sorted(DTYPES), help="dtype of all U-Nets")
    add("--rounds", type=int, default=7, help="rounds of each case (default 7)")
    add("--device", default="auto", help="a device, or auto for the first of CUDA, MPS and CPU (default auto)")
    add("--fresh", action="store_true", help="begin anew instead of adding to earlier results")
    add("--out", type=Path, default=Path("out/gpu"), help="folder for the results (default out/gpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
