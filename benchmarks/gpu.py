"""Everything that can be measured on a card, in one command; it also runs on a CPU, slowly.

    python -m benchmarks.gpu                # out/gpu/gpu.md after eight minutes at most
    python -m benchmarks.gpu --minutes 30   # go on where it ended, and add what was missing
    python -m benchmarks.gpu --only sd15    # one part; --sizes: few methods
    python -m benchmarks.gpu --publish      # write what is in --out into docs/measurements.md

U-Nets with random weights; each method on the largest self-attention layers, in interleaved rounds in random order:
called as usual, replayed from a CUDA graph, and compiled. Then the share of self-attention in a call by the profiler,
SDPA by class of layers, and the closeness of each method in half precision. What tells most comes first, results are
written after each round, and a later run adds to them. Nothing is downloaded. `make gpu` runs the core's tests as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from agentsd.clock import now
from agentsd.hosts import find_sites

from .fidelity import deviations, noised
from .machine import DATA, DTYPES, PAGE, Machine
from .measure import COMPILED, EAGER, GRAPH, RESERVE, TIMESTEP, Bench, Case, make_parser, opened
from .methods import methods
from .models import LAYOUTS, build, call
from .results import Results, by_size, fill, machine_line, published

MODULE, LAYERS = "benchmarks.gpu", "self-attention"
FEW = ("sdpa", "limit", "grid4", "corrected4", "opened4", "pool2", "tomesd.5")
MAIN = (*FEW, "corrected8", "paper", "merge.5", "tiles")
ALL = (*MAIN, "grid8", "similarity", "idle")


def plan(
    layouts: Sequence[str], sizes: Sequence[tuple[int, int]] = (), dtype: str | None = None, rounds: int = 7
) -> list[Case]:
    """The cases, those that tell most first; cases of one U-Net are together where that costs nothing."""

    def case(layout: str, size: int | tuple[int, int], mode: str, names: tuple[str, ...] = MAIN, **more: Any) -> Case:
        size = (size, size) if isinstance(size, int) else size
        return Case(layout, size, names, mode, **{"dtype": dtype or "float16", "rounds": rounds, **more})

    both = (EAGER, GRAPH)
    if sizes:  # a miniature
        return [case(layout, size, mode, FEW) for layout in layouts for size in sizes for mode in both]
    first = [case("sd15", side, mode, ALL if side == 512 else MAIN) for side in (512, 1024) for mode in both]
    first += [case("sdxl", side, mode) for side in (1024, 2048) for mode in both]
    first += [case("sd15", side, COMPILED, ("sdpa", "grid4", "corrected4", "opened4")) for side in (512, 1024)]
    rest = [case("sd15", side, mode) for side in (2048, 768, 1536, 640) for mode in both]
    rest += [case("sdxl", 1536, mode) for mode in both]
    rest += [case("sdxl", 1024, COMPILED, ("sdpa", "grid4"))]
    for layout, side in (("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("sdxl", 2048)):
        rest += [case(layout, side, mode, FEW, batch=1) for mode in both]
        rest += [case(layout, side, mode, FEW, dtype="bfloat16") for mode in both]
    return [case for case in (*first, *rest) if case.layout in layouts]


def sdpa_seconds(machine: Machine, results: Results, case: Case) -> None:
    """Seconds of SDPA, and FLOPs, of each class of self-attention layers of a U-Net, unless they are known."""
    found, place = results.out.setdefault("attention", []), (case.layout, case.size[0], case.dtype)
    if any((row["layout"], row["side"], row["dtype"]) == place for row in found):
        return
    sites = find_sites(build(LAYOUTS[case.layout], torch.device("meta"), torch.float32))
    classes = Counter((site.downsample, site.channels, site.heads) for site in sites)
    for (downsample, channels, heads), count in sorted(classes.items()):
        tokens, width = case.size[0] * case.size[1] // (8 * downsample) ** 2, channels // heads
        q, k, v = torch.randn(3, 2, heads, tokens, width, device=machine.device).to(DTYPES[case.dtype])
        scaled_dot_product_attention(q, k, v)
        times = [machine.seconds(lambda qkv=(q, k, v): scaled_dot_product_attention(*qkv), 3) for _ in range(3)]
        row = dict(zip(("layout", "side", "dtype"), place, strict=True))
        row |= {"layers": count, "tokens": tokens, "heads": heads, "width": width, "seconds": median(times)}
        found.append({**row, "flops": 4 * 2 * tokens**2 * channels})
    results.write()


def self_attention_share(bench: Bench, case: Case) -> None:
    """Shares of an unpatched call's time by the profiler, of self-attention and of SDPA within it, unless known."""
    machine, shares = bench.machine, bench.results.out.setdefault("shares", {})
    name = f"{LAYOUTS[case.layout].label}, {case.size[0]}×{case.size[1]}, {case.dtype}"
    if name in shares:
        return
    inputs, cuda = bench.build(case), machine.device.type == "cuda"
    open_ranges: list[Any] = []
    with ExitStack() as stack:
        for site in find_sites(bench.unet):
            begin, end = site.block.attn1.register_forward_pre_hook, site.block.attn1.register_forward_hook
            stack.callback(begin(lambda *_: open_ranges.append(record_function(LAYERS).__enter__())).remove)
            stack.callback(end(lambda *_: open_ranges.pop().__exit__(None, None, None)).remove)
        call(bench.unet, inputs, TIMESTEP)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiler, record_function("call"):
            call(bench.unet, inputs, TIMESTEP)
            now(machine.device)

    def inside(event: Any) -> bool:
        return event is not None and (event.name == LAYERS or inside(event.cpu_parent))

    taken: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and (event.name in ("call", LAYERS) or inside(event)):
            taken[event.name] += event.device_time_total if cuda else event.cpu_time_total
    sdpa = taken["aten::scaled_dot_product_attention"]
    shares[name] = {"layers": taken[LAYERS] / taken["call"], "sdpa": sdpa / taken["call"]}
    bench.results.write()


def closeness(machine: Machine, results: Results) -> None:
    """How far each method's forward passes of the embedded model are from unpatched ones, in each precision."""
    from agentsd import embedded

    if results.out.get("closeness"):
        return
    rows = []
    for dtype in DTYPES:
        try:
            pipe = embedded.load(device=machine.device, dtype=DTYPES[dtype])
            case = noised(pipe, [0, 1], (64, 64), 500, torch.Generator().manual_seed(0))
            for name, method in methods().items():
                if name not in ("limit", "idle", "panel"):
                    error = float(deviations(pipe, method.install, [case])[0].mean())
                    rows.append({"dtype": dtype, "method": name, "error": error, "finite": math.isfinite(error)})
        except Exception as error:
            machine.skip("the embedded model", dtype, f"{type(error).__name__}: {error}".splitlines()[0])
    results.out["closeness"] = rows
    results.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = make_parser(MODULE, __doc__, layouts=["sd15", "sdxl"], rounds=7, minutes=8.0, resume=True)
    options = parser.parse_args(argv)
    if options.publish:
        return publish(published(options.out / "gpu.json", DATA / "gpu.csv"))
    bench = opened(parser, options)
    given = bench.machine, bench.results
    with torch.no_grad():
        for i, case in enumerate(tqdm(plan(options.layouts, options.sizes or (), options.dtype, options.rounds))):
            bench.measure(case)
            if case.mode == EAGER and case.batch == 2 and bench.machine.time_left() > RESERVE:
                sdpa_seconds(*given, case)
                self_attention_share(bench, case)
            if i == 3 and not options.sizes:  # after the first four, which are the main table
                closeness(*given)
    bench.results.write()
    return print((options.out / "gpu.md").read_text(encoding="utf-8"))


def publish(out: dict[str, Any]) -> None:
    """Write the section "gpu" of the page: the methods of every case by size, and the shares."""
    text = [machine_line(out), "", *by_size(case for case in out["cases"] if case["rounds"])]
    shares = [f"{name}: {s['layers']:.1%} (SDPA {s['sdpa']:.1%})" for name, s in out.get("shares", {}).items()]
    if shares:
        text += ["Self-attention's share of an unpatched U-Net call, by the profiler: " + "; ".join(shares) + "."]
    fill(PAGE, MODULE, {"gpu": "\n".join(text).rstrip()})


if __name__ == "__main__":
    main()
