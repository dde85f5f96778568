"""torch.compile of a patched U-Net: its cost, its gain, and how far the output deviates.

    python -m benchmarks.compiled                       # a U-Net of 32 channels, 512×512, Inductor
    python -m benchmarks.compiled --layout sd15 --dtype bfloat16

The hooks are part of the U-Net's one graph, except where clusters are matched (AgentSD's settings).
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cases import DTYPES
from .machine import Machine, choose_device
from .methods import METHODS
from .models import LAYOUTS, build, call, make_inputs


def measure(
    name: str, unet: Any, inputs: dict[str, Any], machine: Machine, backend: str, rounds: int
) -> tuple[float, ...]:
    """Seconds of a call without compiling, of the first compiled call and of later ones, and the relative deviation."""

    def timed(run: Any, timestep: float) -> tuple[float, Tensor]:
        machine.sync()
        start = time.perf_counter()
        out = call(run, inputs, timestep)
        machine.sync()
        return time.perf_counter() - start, out

    torch._dynamo.reset()
    with METHODS[name].install(unet) as check:
        compiled = torch.compile(unet, backend=backend)
        expected = call(unet, inputs, 500.0)
        first, out = timed(compiled, 500.0)
        call(compiled, inputs, 450.0)  # must not compile again for another timestep
        times = [(timed(unet, 400.0)[0], timed(compiled, 400.0)[0]) for _ in range(rounds)]
        check()
    eager, later = (median(column) for column in zip(*times, strict=True))
    return eager, first, later, float((out - expected).float().norm() / expected.float().norm())


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layout", choices=sorted(LAYOUTS), default="mini", help="the U-Net (default mini)")
    add("--size", type=int, default=512, help="side of the image in pixels (default 512)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of the U-Net (default float32)")
    add("--backend", default="inductor", help="torch.compile's backend (default inductor)")
    add(
        "--methods",
        nargs="+",
        choices=sorted(METHODS),
        metavar="METHOD",
        default=["sdpa", "grid4", "corrected4", "pool2", "paper"],
        help="methods to compile, by their names in benchmarks.bench (default sdpa grid4 corrected4 pool2 paper)",
    )
    add("--rounds", type=int, default=10, help="timed rounds (default 10)")
    options = parser.parse_args(argv)
    machine, dtype, layout = Machine(choose_device("auto")), DTYPES[options.dtype], LAYOUTS[options.layout]
    unet, inputs = (
        build(layout, machine.device, dtype),
        make_inputs(layout, (options.size,) * 2, 2, machine.device, dtype),
    )
    case = f"{layout.label}, {options.size}×{options.size}, {options.dtype}, {options.backend}"
    print(f"{case}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    print("| method | s per call | compiled | speed-up by compiling | first compiled call, s | relative deviation |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in tqdm(options.methods):
            eager, first, later, deviation = measure(name, unet, inputs, machine, options.backend, options.rounds)
            cells = f"{eager:.3g} | {later:.3g} | {eager / later:.2f}× | {first:.0f} | {deviation:.1e}"
            print(f"| {METHODS[name].label} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
