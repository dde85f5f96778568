"""Speed of agent attention and its peers: one U-Net forward, interleaved rounds, medians.

    python -m benchmarks.bench                        # the table of docs/measurements.md; hours on two cores
    python -m benchmarks.bench --preset 512 --resume  # a part of it
    python -m benchmarks.bench --publish              # write what is in --out into docs/measurements.md

Each round calls every method once, in a different order each time, so that a slow moment of the machine hits all of
them. `speed-up` is the median over the rounds of t_sdpa / t; `of the limit` that of (t_sdpa − t) / (t_sdpa − t_limit).
The limit keeps the four projections of the patched self-attentions and removes everything between them. Results are
written after each round; --resume adds the missing rounds, on the same machine and with the same code only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .machine import DTYPES, ROOT, Machine, choose_device, this_run
from .measure import Bench, Case
from .methods import methods
from .models import LAYOUTS
from .pages import fill
from .results import Results, ResumeError, machine_line, measured, table, times

MODULE = "benchmarks.bench"
PAGE, FRONT, DATA = ROOT / "docs/measurements.md", ROOT / "README.md", ROOT / "docs/measurements"
# Rows of the README's table
SHOWN = ("limit", "corrected8", "corrected4", "opened4", "tomesd.4", "tomesd.5")
GRID = ("sdpa", "limit", "grid8", "grid4")
MAIN = (*GRID, "corrected8", "corrected4", "opened4", "pool2", "paper", "tomesd.4")
ALL = tuple(name for name in methods() if name not in ("idle", "panel", "tiles", "merge.5"))


def _square(side: int, names: tuple[str, ...], rounds: int, layout: str = "sd15", **more: Any) -> Case:
    return Case(layout, (side, side), names, rounds=rounds, **more)


# What tells most in the least time comes first
PRESETS: dict[str, list[Case]] = {
    "512": [_square(512, ALL, 4), _square(512, MAIN, 10)],
    "768": [_square(768, (*MAIN, "tomesd.5"), 5)],
    "1024": [_square(1024, (*MAIN, "tomesd.5"), 3)],
    "small": [_square(side, ("sdpa", "limit", "panel", "grid4"), 10) for side in (64, 128, 256, 384, 640)],
    "idle": [_square(512, ("sdpa", "idle"), 20)],
    "float32": [_square(512, MAIN, 3, dtype="float32")],
    "sdxl": [_square(1024, GRID, 3, "sdxl")],
    "quick": [_square(512, (*GRID, "paper", "tomesd.5"), 2)],
}
README = [name for name in PRESETS if name != "quick"]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.publish:
        publish(json.loads((options.out / "bench.json").read_text(encoding="utf-8")), options.out / "bench.csv")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(choose_device(options.device), deadline=time.monotonic() + 60 * options.minutes)
    run = this_run(MODULE, sys.argv[1:] if argv is None else argv, [options.out])
    try:
        results = Results(options.out / "bench", machine.describe(), run, options.resume)
    except ResumeError as error:
        parser.error(f"--resume: {error}")
    machine.skipped = results.out["skipped"]
    bench = Bench(machine, results)
    with torch.inference_mode():
        for case in tqdm(choose_cases(options), unit="case"):
            bench.measure(case)
    results.write()
    print((options.out / "bench.md").read_text(encoding="utf-8"))
    return 0


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the presets, or the ones described by the options."""
    if not options.sizes and not options.methods:
        names = ["quick"] if options.quick else options.preset or README
        return [case for name in names for case in PRESETS[name]]
    shared = {"dtype": options.dtype, "batch": options.batch, "rounds": options.rounds}
    names = tuple(dict.fromkeys(("sdpa", *(options.methods or MAIN))))
    sizes = options.sizes or [(512, 512)]
    return [Case(layout, size, names, **shared) for layout in options.layouts for size in sizes]


def publish(out: dict[str, Any], data: Path) -> None:
    """Write the CSV, the section "speed" of the page (SD 1.5's methods by size), and a few rows into the README."""
    DATA.mkdir(exist_ok=True)
    (DATA / "speed.csv").write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    cases = [c for c in out["cases"] if c["layout"] == "sd15" and c["dtype"] == "bfloat16" and "limit" in measured(c)]
    cases = sorted((c for c in cases if c["size"][0] >= 512 and "tomesd.4" in measured(c)), key=lambda c: c["size"])
    names = {name: r["label"] for c in cases for name, r in measured(c).items()}
    head = ["one forward of the U-Net", *(t for c in cases for t in (f"{c['size'][0]}×{c['size'][1]}, s", "speed-up"))]
    rows = []
    for name, label in names.items():
        found = [measured(c).get(name) for c in cases]
        cells = [(f"{r['seconds']:.3g}", times(r["speedup"])) if r else ("–", "–") for r in found]
        rows.append([label, *(text for pair in cells for text in pair)])
    rounds = sorted({r["rounds"] for c in cases for r in measured(c).values()})
    text = f"SD 1.5, bfloat16, batch 2, {rounds[0]} to {rounds[-1]} rounds. {machine_line(out)}"
    fill(PAGE, MODULE, {"speed": "\n".join([text, "", *table(head, rows)])})
    few = [[names[n], *(times(measured(c).get(n, {}).get("speedup")) for c in cases)] for n in SHOWN if n in names]
    text = f"One forward of SD 1.5's U-Net over PyTorch's fused attention, bfloat16. {machine_line(out)}"
    sides = [f"{c['size'][0]}×{c['size'][1]}" for c in cases]
    fill(FRONT, MODULE, {"readme": "\n".join([text, "", *table(("", *sides), few)])})


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    listed = "\n".join(f"  {m.name:<12} {m.label}" for m in methods().values())
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"methods:\n{listed}",
    )
    add = parser.add_argument
    add("--preset", nargs="+", choices=list(PRESETS), help="sets of cases (default: all but quick)")
    add("--quick", action="store_true", help="short for --preset quick; takes under two minutes")
    add("--layouts", nargs="+", choices=sorted(LAYOUTS), default=["sd15"], help="U-Nets to measure (default sd15)")
    add("--sizes", nargs="+", type=_size, metavar="SIZE", help="image sizes in pixels: 512, or WIDTHxHEIGHT")
    add("--methods", nargs="+", choices=sorted(methods()), metavar="METHOD", help="methods to compare; listed below")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the U-Net (default bfloat16)")
    add("--batch", type=_positive, default=2, help="rows of the batch (default 2: cond and uncond)")
    add("--rounds", type=_positive, default=10, help="number of rounds (default 10); presets have their own")
    add("--resume", action="store_true", help="add the missing rounds to the existing results")
    add("--publish", action="store_true", help="measure nothing; write the results into docs/")
    add("--minutes", type=float, default=1e6, help="start no round that would end after this many minutes")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    add("--device", default="auto", help="a device, or auto for the first of CUDA, MPS and CPU (default auto)")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the results (default out/bench)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    """(height, width) of a size that is written width first."""
    sides = [int(side) for side in text.lower().replace("×", "x").split("x")]
    width, height = sides if len(sides) == 2 else sides * 2
    if min(height, width) < 64 or height % 64 or width % 64 or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be multiples of 64 pixels, from 64, got {text}")
    return height, width


if __name__ == "__main__":
    sys.exit(main())
