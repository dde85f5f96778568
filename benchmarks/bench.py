"""Speed of agent attention and its peers: one U-Net forward, interleaved rounds, medians.

    python -m benchmarks.bench --quick
    python -m benchmarks.bench --preset 512 768 --minutes 20 --resume
    python -m benchmarks.bench --layouts sd15 --sizes 512 768 1024 --dtype bfloat16 --methods sdpa limit grid8 tomesd.5

Each round calls every method once, in a different order each time, so that a slow moment of the machine hits all of
them. `speed-up` is the median over the rounds of t_sdpa / t; `captured` that of (t_sdpa − t) / (t_sdpa − t_limit). The
limit keeps the four projections of the patched self-attentions and removes everything between them.

Results are written after each round. --resume adds the missing rounds to an existing file, on the same machine and with
the same code only.
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

from .cases import ALL, DTYPES, PRESETS, Case, preset
from .layer import TOKENS, measure_layer
from .machine import Machine, choose_device, this_run
from .measure import Run
from .methods import METHODS, peer
from .models import LAYOUTS, build
from .results import Results, ResumeError

MODULE = "benchmarks.bench"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parse(parser, argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(choose_device(options.device))
    if options.minutes:
        machine.deadline = time.monotonic() + 60 * options.minutes
    run = this_run(MODULE, sys.argv[1:] if argv is None else argv, [options.out, *options.peer])
    try:
        results = Results(options.out / options.name, machine.describe(), run, options.resume)
    except ResumeError as error:
        parser.error(f"--resume: {error}")
    machine.skipped = results.out["skipped"]
    cases = choose_cases(options)
    if options.layer:
        results.out["layer"] = measure_layer(machine, DTYPES[cases[0].dtype], options.tokens, options.patience)
        results.write()
    measure(cases, machine, results, options)
    results.write()
    if not options.no_plots:
        results.draw()
    print(results.table())
    return 0


def measure(cases: list[Case], machine: Machine, results: Results, options: Any) -> None:
    """Measure the cases in turn. Keep cases of the same U-Net together: it is then built once."""
    methods = {**METHODS, **{method.name: method for method in options.peers}}
    unet, built = None, None
    with torch.inference_mode(), tqdm(total=sum(len(c.methods) * c.rounds for c in cases), unit="call") as bar:
        for case in cases:
            layout, dtype = LAYOUTS[case.layout], DTYPES[case.dtype]
            key = (case.layout, case.dtype, case.channels_last)
            if built != key:
                unet = None  # free the last U-Net before building the next
                bar.set_postfix_str(f"building {layout.label}")
                machine.probe(dtype)
                unet, built = build(layout, machine.device, dtype, case.channels_last), key
            Run(
                case, results.case(case), unet, machine, methods, results.write, bar, patience=options.patience
            ).measure()


def choose_cases(options: Any) -> list[Case]:
    """The cases of the presets, or the ones described by the options."""
    peers = tuple(method.name for method in options.peers)
    if options.preset:
        return [case for name in options.preset for case in preset(name, options.dtype, options.rounds, peers)]
    methods = tuple(dict.fromkeys((*(options.methods or ALL), *peers)))
    return [
        Case(
            layout,
            size,
            methods,
            options.batch,
            options.dtype or "bfloat16",
            options.rounds or 10,
            options.channels_last,
        )
        for layout in options.layouts
        for size in options.sizes or [(512, 512)]
    ]


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {m.name:<12} {m.label}" for m in METHODS.values()),
    )
    add = parser.add_argument
    add("--preset", nargs="+", choices=list(PRESETS), help="sets of cases (default: readme, which runs all of them)")
    add("--quick", action="store_true", help="short for --preset quick; takes under two minutes")
    add("--layouts", nargs="+", choices=sorted(LAYOUTS), default=["sd15"], help="U-Nets to measure (default sd15)")
    add("--sizes", nargs="+", type=_size, metavar="SIZE", help="image sizes in pixels: 512, or WIDTHxHEIGHT")
    add("--methods", nargs="+", choices=sorted(METHODS), metavar="METHOD", help="methods to compare; listed below")
    add("--dtype", choices=sorted(DTYPES), help="dtype of the U-Net (default bfloat16)")
    add("--batch", type=_positive, default=2, help="rows of the batch (default 2: cond and uncond)")
    add("--channels-last", action="store_true", help="use the channels-last layout for weights and latents")
    add("--rounds", type=_positive, help="number of rounds (default 10); with a preset, an upper limit")
    add("--resume", action="store_true", help="add the missing rounds to the existing results")
    add("--patience", type=float, default=120.0, help="skip methods that take more seconds a call (default 120)")
    add("--minutes", type=float, help="start no round that would end after this many minutes")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    add("--device", default="auto", help="a device, or auto for the first of CUDA, MPS and CPU (default auto)")
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
    add("--tokens", nargs="+", type=_positive, default=list(TOKENS), metavar="N", help="token counts for --layer")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the results (default out/bench)")
    add("--name", default="bench", help="stem of the file names (default bench)")
    add("--no-plots", action="store_true", help="draw no plots")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; exit with a message if they contradict one another."""
    options = parser.parse_args(argv)
    chosen = [name for name in ("sizes", "methods") if getattr(options, name)]
    if options.quick:
        options.preset = ["quick"]
    if options.preset and chosen:
        parser.error(f"--preset and --{chosen[0]} exclude each other")
    if not options.preset and not chosen:
        options.preset = ["readme"]
    if options.layer is None:
        options.layer = options.preset == ["readme"]
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
    """(height, width) of a size that is written width first."""
    sides = [int(side) for side in text.lower().replace("×", "x").split("x")]
    width, height = sides if len(sides) == 2 else sides * 2
    if min(height, width) < 64 or height % 64 or width % 64 or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be multiples of 64 pixels, from 64, got {text}")
    return height, width


if __name__ == "__main__":
    sys.exit(main())
