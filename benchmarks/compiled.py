"""torch.compile of a patched U-Net: what it costs, what it gains, and how far the output moves.

    python -m benchmarks.compiled                       # a U-Net of 32 channels, 512 × 512, Inductor
    python -m benchmarks.compiled --layout sd15 --dtype bfloat16

The graph is broken at the hooks of each block; with Inductor the parts in between are fused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cases import DTYPES
from .machine import choose_device
from .methods import METHODS
from .models import LAYOUTS, build, call, inputs


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, unet: Any, given: dict[str, Any], backend: str, rounds: int) -> tuple[float, ...]:
    """Seconds of a call, of the first compiled call and of the others, and the largest relative deviation."""
    torch._dynamo.reset()
    with METHODS[name].install(unet) as check:
        compiled = torch.compile(unet, backend=backend)
        plain: Tensor = call(unet, given, 500.0)
        begin = time.perf_counter()
        out = call(compiled, given, 500.0)
        first = time.perf_counter() - begin
        call(compiled, given, 450.0)  # another timestep must not compile again
        times = [
            (seconds(lambda: call(unet, given, 400.0)), seconds(lambda: call(compiled, given, 400.0)))
            for _ in range(rounds)
        ]
        check()
    eager, fast = (median(column) for column in zip(*times, strict=True))
    return eager, first, fast, float((out - plain).float().norm() / plain.float().norm())


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
    add("--methods", nargs="+", choices=sorted(METHODS), metavar="METHOD", default=["sdpa", "grid4", "grid8", "paper"])
    add("--rounds", type=int, default=10, help="timed rounds (default 10)")
    options = parser.parse_args(argv)
    device, dtype, layout = choose_device("auto"), DTYPES[options.dtype], LAYOUTS[options.layout]
    unet, given = build(layout, device, dtype), inputs(layout, (options.size, options.size), 2, device, dtype)
    about = f"{layout.label}, {options.size} × {options.size}, {options.dtype}, {options.backend}"
    print(f"{about}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    print("| method | s a call | compiled | speed-up by compiling | first compiled call, s | relative deviation |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in tqdm(options.methods):
            eager, first, fast, off = measure(name, unet, given, options.backend, options.rounds)
            label = METHODS[name].label
            print(f"| {label} | {eager:.3g} | {fast:.3g} | {eager / fast:.2f}× | {first:.0f} | {off:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
