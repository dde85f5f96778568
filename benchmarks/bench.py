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
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .machine import DATA, PAGE, ROOT
from .measure import Case, make_parser, opened
from .methods import methods
from .results import by_size, fill, machine_line, measured, published, table, times

MODULE, FRONT = "benchmarks.bench", ROOT / "README.md"
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of_bench()
    options = parser.parse_args(argv)
    if options.publish:
        return publish(published(options.out / "bench.json", DATA / "speed.csv"))
    bench = opened(parser, options)
    with torch.inference_mode():
        for case in tqdm(choose_cases(options), unit="case"):
            bench.measure(case)
    bench.results.write()
    return print((options.out / "bench.md").read_text(encoding="utf-8"))


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the presets, or the ones described by the options."""
    if not options.sizes and not options.methods:
        return [case for name in options.preset or README for case in PRESETS[name]]
    shared = {"dtype": options.dtype, "batch": options.batch, "rounds": options.rounds}
    names = tuple(dict.fromkeys(("sdpa", *(options.methods or MAIN))))
    return [Case(layout, size, names, **shared) for layout in options.layouts for size in options.sizes or [(512, 512)]]


def publish(out: dict[str, Any]) -> None:
    """Write the section "speed" of the page, SD 1.5's methods by size, and a few rows into the README."""
    cases = [c for c in out["cases"] if c["layout"] == "sd15" and c["dtype"] == "bfloat16" and c["size"][0] >= 512]
    cases = sorted((c for c in cases if {"limit", "tomesd.4"} <= set(measured(c))), key=lambda c: c["size"])
    rounds = sorted({r["rounds"] for c in cases for r in measured(c).values()})
    text = f"One forward of the U-Net, {rounds[0]} to {rounds[-1]} rounds. {machine_line(out)}"
    fill(PAGE, MODULE, {"speed": "\n".join([text, "", *by_size(cases)]).rstrip()})
    sides, labels = [f"{c['size'][0]}×{c['size'][1]}" for c in cases], methods()
    few = [[labels[n].label, *(times(measured(c).get(n, {}).get("speedup")) for c in cases)] for n in SHOWN]
    text = f"One forward of SD 1.5's U-Net over PyTorch's fused attention, bfloat16. {machine_line(out)}"
    fill(FRONT, MODULE, {"readme": "\n".join([text, "", *table(("", *sides), few)])})


def parser_of_bench() -> argparse.ArgumentParser:
    """The command line's parser."""
    listed = "\n".join(f"  {name:<12} {method.label}" for name, method in methods().items())
    defaults = {"layouts": ["sd15"], "dtype": "bfloat16", "rounds": 10, "minutes": 1e6, "resume": False}
    parser = make_parser(MODULE, __doc__, f"methods:\n{listed}", **defaults)
    add = parser.add_argument
    add("--preset", nargs="+", choices=list(PRESETS), help="sets of cases, with rounds of their own (default: all)")
    add("--methods", nargs="+", choices=sorted(methods()), metavar="METHOD", help="methods to compare; listed below")
    add("--batch", type=int, default=2, help="rows of the batch (default 2: cond and uncond)")
    return parser


if __name__ == "__main__":
    main()
