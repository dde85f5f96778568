"""Speed of agent attention and of its peers: one U-Net forward, interleaved rounds, medians.

    python -m benchmarks.bench --quick
    python -m benchmarks.bench --layouts sd15 --sizes 512 768 1024 --dtype bfloat16 --methods sdpa limit grid8 tomesd.5

Every round calls each method once, beginning at another one each time, so that a slow moment of the machine hits all
of them. `speed-up` is the median over the rounds of t_sdpa / t; `captured` that of (t_sdpa − t) / (t_sdpa − t_limit),
where the limit keeps the four projections of the patched self-attentions and removes everything between them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from . import meter, plots, report
from .layer import TOKENS, measure_layer
from .methods import METHODS, Method, peer
from .models import LAYOUTS, Layout, build, call, inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAIN = (
    "sdpa",
    "limit",
    "idle",
    "grid8",
    "grid4",
    "similarity",
    "paper",
    "reuse",
    "pool2",
    "tomesd.3",
    "tomesd.4",
    "tomesd.5",
)
FEW = ("sdpa", "limit", "grid8", "grid4", "paper", "tomesd.4")
DEEP = ("sdpa", "limit2", "grid8d2")
# Timesteps of consecutive calls, as in 20 steps.
STEP = 50
# A limit that saves less than this share of the time is lost in the noise, and so is what is captured of it.
NOISE = 0.02


@dataclass(frozen=True)
class Case:
    """One U-Net at one size."""

    layout: str
    size: tuple[int, int]
    methods: tuple[str, ...]
    batch: int = 2
    dtype: str = "bfloat16"
    rounds: int = 10  # 0: the call that warms up and counts is the only one, which is enough where it takes a minute

    @property
    def name(self) -> str:
        height, width = self.size
        return f"{LAYOUTS[self.layout].label}, {height} × {width}, batch {self.batch}, {self.dtype}"


def _preset_readme() -> list[Case]:
    return [
        Case("sd15", (512, 512), MAIN, rounds=2),
        Case("sd15", (1024, 1024), FEW, rounds=0),
        Case("sd15", (768, 768), FEW, rounds=0),
        Case("sdxl", (1024, 1024), DEEP, rounds=0),
    ]


def _preset_quick() -> list[Case]:
    return [Case("sd15", (512, 512), ("sdpa", "limit", "grid8", "grid4", "paper", "tomesd.5"), rounds=2)]


PRESETS = {"readme": _preset_readme, "quick": _preset_quick}


@dataclass
class Machine:
    """Where it runs, and how fast that was so far."""

    device: torch.device
    flops_per_second: float = 0.0
    skipped: list[dict[str, str]] = field(default_factory=list)
    deadline: float = math.inf

    def time_left(self) -> float:
        """Seconds until the program has to end."""
        return self.deadline - time.monotonic()

    def skip(self, case: str, method: str, reason: str) -> None:
        """Remember, and say, what is left out."""
        self.skipped.append({"case": case, "method": method, "reason": reason})
        tqdm.write(f"skipped: {method} at {case}: {reason}")

    def sync(self) -> None:
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def available_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def probe(self, dtype: torch.dtype) -> None:
        """A first idea of the machine's speed, from one matrix product."""
        a = torch.randn(1024, 1024).to(self.device, dtype)
        a @ a
        self.sync()
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        self.sync()
        self.flops_per_second = 0.3 * 4 * 2 * 1024**3 / (time.perf_counter() - start)

    def describe(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.system(),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "revision": _revision(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _revision() -> str:
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return told.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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


def out_of_reach(method: Method, layout: Layout, case: Case, machine: Machine, patience: float) -> str:
    """Why a method can't be measured here; empty if it can."""
    itemsize = DTYPES[case.dtype].itemsize
    need, have = naive_bytes(layout, case, itemsize) if method.naive else 0, machine.available_memory()
    if need > 0.8 * have:
        return f"needs {need / 2**30:.0f} GiB for its scores, {have / 2**30:.0f} GiB are free"
    unpatched = method.name in ("sdpa", "naive") or method.naive or method.name.startswith("tomesd")
    seconds = estimate_flops(layout, case.size, case.batch) / machine.flops_per_second
    if unpatched and seconds > patience:
        return f"would take about {seconds:.0f} s a call, more than --patience {patience:.0f}"
    if seconds / 2 > machine.time_left():
        return f"{machine.time_left():.0f} s are left of --minutes"
    return ""


def out_of_time(case: Case, machine: Machine) -> bool:
    """Whether even one call of each method would not fit in what is left of --minutes; says so."""
    flops = estimate_flops(LAYOUTS[case.layout], case.size, case.batch)
    seconds = len(case.methods) * flops / machine.flops_per_second
    if seconds < machine.time_left():
        return False
    machine.skip(
        case.name, "all", f"would take about {seconds:.0f} s, {machine.time_left():.0f} s are left of --minutes"
    )
    return True


def measure_case(case: Case, unet: Any, machine: Machine, methods: dict[str, Method], options: Any, bar: tqdm) -> dict:
    """Warm up and count each method once, then time them in interleaved rounds."""
    layout, dtype = LAYOUTS[case.layout], DTYPES[case.dtype]
    given = inputs(layout, case.size, case.batch, machine.device, dtype)
    results: dict[str, dict[str, Any]] = {}
    for name in case.methods:
        reason = out_of_reach(methods[name], layout, case, machine, options.patience)
        if not reason:
            reason, results[name] = _warm_up(methods[name], unet, given, machine, bar)
        if reason:
            results.pop(name, None)
            machine.skip(case.name, name, reason)
    once = sum(r["warm_up"] * methods[name].calls for name, r in results.items())
    affordable = int(min(options.budget, machine.time_left()) / max(1e-9, once))
    rounds = min(case.rounds, affordable) or 1
    if min(case.rounds, affordable) < 1:
        for result in results.values():
            result["times"] = [result["warm_up"]]
    else:
        _rounds(case, unet, given, machine, methods, results, rounds, bar)
    summarise(results, methods)
    about = {"layout": case.layout, "size": case.size, "batch": case.batch, "dtype": case.dtype, "rounds": rounds}
    return {"case": case.name, **about, "results": results}


def _rounds(
    case: Case,
    unet: Any,
    given: dict,
    machine: Machine,
    methods: dict[str, Method],
    results: dict[str, dict[str, Any]],
    rounds: int,
    bar: tqdm,
) -> None:
    names = list(results)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            bar.set_postfix_str(f"{case.name}: round {i + 1}/{rounds}, {name}")
            results[name]["times"].append(_time(methods[name], unet, given, machine))
            bar.update()


def _warm_up(method: Method, unet: Any, given: dict, machine: Machine, bar: tqdm) -> tuple[str, dict[str, Any]]:
    bar.set_postfix_str(f"warm-up, {method.name}")
    try:
        bar.update()
        with method.install(unet):
            start = time.perf_counter()
            counted = meter.count(lambda: call(unet, given, 500.0))
            machine.sync()
            seconds = time.perf_counter() - start
    except Exception as error:  # a peer that can't run this model is a result too
        return f"{type(error).__name__}: {error}".splitlines()[0], {}
    if method.name == "sdpa":
        machine.flops_per_second = counted["flops"] / seconds
    return "", {"label": method.label, "warm_up": seconds, **counted, "times": []}


def _time(method: Method, unet: Any, given: dict, machine: Machine) -> float:
    """Seconds per call, the mean of as many calls as the method's cost takes to repeat."""
    with method.install(unet):
        machine.sync()
        start = time.perf_counter()
        for i in range(method.calls):
            call(unet, given, 999.0 - STEP * i)
        machine.sync()
        return (time.perf_counter() - start) / method.calls


def summarise(results: dict[str, dict[str, Any]], methods: dict[str, Method]) -> None:
    """Medians, and the medians of each round's own ratios."""
    base = results.get("sdpa", {}).get("times")
    for name, result in results.items():
        times = result["times"]
        result["seconds"] = median(times)
        result["speedup"] = median(b / t for b, t in zip(base, times, strict=True)) if base else None
        limit = results.get(methods[name].limit, {})
        result["captured"] = None
        if base and limit:
            saved = zip(base, times, limit["times"], strict=True)
            shares = [(b - t) / (b - least) for b, t, least in saved if b - least > NOISE * b]
            result["captured"] = median(shares) if shares else None
        if limit:
            result["bytes_over_limit"] = result["bytes"] - limit["bytes"]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(choose_device(options.device))
    if options.minutes:
        machine.deadline = time.monotonic() + 60 * options.minutes
    methods = dict(METHODS)
    for method in options.peers:
        methods[method.name] = method
    cases = choose_cases(options, methods)
    machine.probe(DTYPES[cases[0].dtype])
    out = {
        "machine": machine.describe(),
        "preset": options.preset,
        "cases": [],
        "layer": [],
        "skipped": machine.skipped,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    total = sum(len(c.methods) * (1 + c.rounds) for c in cases)
    loaded: tuple[Any, Any] = (None, None)
    if options.layer:
        out["layer"] = measure_layer(machine, DTYPES[cases[0].dtype], options.tokens, options.patience)
        write(out, options)
    with torch.inference_mode(), tqdm(total=total, unit="call") as bar:
        for case in cases:
            if out_of_time(case, machine):
                continue
            key = (case.layout, case.dtype)
            if loaded[0] != key:
                loaded = (None, None)  # let go of the last U-Net before the next is made
                bar.set_postfix_str(f"building {LAYOUTS[case.layout].label}")
                loaded = (key, build(LAYOUTS[case.layout], machine.device, DTYPES[case.dtype]))
            before = bar.n
            out["cases"].append(measure_case(case, loaded[1], machine, methods, options, bar))
            bar.update(before + len(case.methods) * (1 + case.rounds) - bar.n)
            write(out, options)
    print(report.markdown(out))
    return 0


def write(out: dict[str, Any], options: Any) -> None:
    """The results so far, as JSON, a table and plots."""
    stem = options.out / options.name
    stem.with_suffix(".json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(report.markdown(out), encoding="utf-8")
    if not options.no_plots:
        plots.draw(out, stem)


def choose_cases(options: Any, methods: dict[str, Method]) -> list[Case]:
    """The preset's cases, or those that the arguments name."""
    if options.preset and not options.sizes:
        cases = PRESETS[options.preset]()
        # the first case is the one that has time for peers
        cases[0] = replace(cases[0], methods=cases[0].methods + tuple(m.name for m in options.peers))
        if options.dtype:
            cases = [replace(c, dtype=options.dtype) for c in cases]
        return cases
    chosen = options.methods or list(MAIN)
    chosen += [m.name for m in options.peers if m.name not in chosen]
    return [
        Case(layout, size, tuple(chosen), options.batch, options.dtype or "bfloat16", options.rounds)
        for layout in options.layouts
        for size in options.sizes or [(512, 512)]
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {m.name:<12} {m.label}" for m in METHODS.values()),
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="a set of cases; the default without --sizes is readme")
    add("--quick", action="store_true", help="the same as --preset quick: under two minutes")
    add("--layouts", nargs="+", choices=sorted(LAYOUTS), default=["sd15"], help="U-Nets to measure (default sd15)")
    add("--sizes", nargs="+", type=_size, metavar="SIZE", help="image sizes in pixels: 512, or HEIGHTxWIDTH")
    add("--methods", nargs="+", choices=sorted(METHODS), metavar="METHOD", help="what to compare, from the list below")
    add("--dtype", choices=sorted(DTYPES), help="dtype of the U-Net (default bfloat16)")
    add("--batch", type=_positive, default=2, help="rows of the batch (default 2: cond and uncond)")
    add("--rounds", type=_positive, default=10, help="rounds at most (default 10); presets have their own")
    add("--budget", type=float, default=170.0, help="seconds to spend on one case's rounds (default 170); cuts rounds")
    add("--patience", type=float, default=120.0, help="skip what would take more seconds a call (default 120)")
    add("--minutes", type=float, help="end after about so many minutes, leaving out what does not fit")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    add("--device", default="auto", help="auto (CUDA, MPS or CPU, whichever is there), or a device (default auto)")
    add(
        "--peer",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="also measure the package in this folder (apply_patch, remove_patch); may be repeated",
    )
    add(
        "--peer-settings",
        type=json.loads,
        default={},
        metavar="JSON",
        help="keyword arguments of the peers' apply_patch, such as '{\"ratio\": 0.4}'",
    )
    add(
        "--layer",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also time one self-attention layer over the number of tokens (default: with --preset readme)",
    )
    add("--tokens", nargs="+", type=_positive, default=list(TOKENS), metavar="N", help="numbers of tokens for --layer")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the results (default out/bench)")
    add("--name", default="bench", help="stem of the files' names (default bench)")
    add("--no-plots", action="store_true", help="draw no plots")
    options = parser.parse_args(argv)
    if options.quick:
        options.preset = "quick"
    if not options.preset and not options.sizes and not options.methods:
        options.preset = "readme"
    if options.layer is None:
        options.layer = options.preset == "readme"
    try:
        options.peers = [peer(f, options.peer_settings, f"peer_{i}") for i, f in enumerate(options.peer)]
    except ValueError as error:
        parser.error(str(error))
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    parts = [int(part) for part in text.lower().split("x")]
    height, width = parts if len(parts) == 2 else parts * 2
    if min(height, width) < 64 or height % 64 or width % 64 or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"must be multiples of 64 pixels, from 64, got {text}")
    return height, width


if __name__ == "__main__":
    sys.exit(main())
