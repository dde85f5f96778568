"""Choices of the methods with landmarks: which keys and how many, and local attention's windows, halos and penalties.

python -m benchmarks.landmarks                 # docs/zoo/landmarks.md: closeness on kinds of the zoo, seconds of a call
python -m benchmarks.landmarks --rounds 3      # a quick look
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from agentsd.attention.tensors import join_heads, sample_each, split_heads
from agentsd.methods.corrected import by_heavy_hitters, by_superpixels, corrected_attention
from agentsd.methods.local import HALO, WINDOW, local_attention

from .attentions import KINDS
from .candidates import full
from .zoo import errors as errors_of
from .zoo_report import short

SIZE, CELL, HEADS, WIDTH = (64, 64), (4, 4), 8, 40
SHOWN = (
    "model, queries × 1",
    "model, queries × 8",
    "Gaussian, σ 2–4",
    "Gaussian, σ 4–16",
    "segments",
    "sinks, corners",
    "texture",
)
WINDOWS = ((16, 0), (16, 3), (16, 4), (16, 8), (8, 4), (8, 8), (32, 4))
PENALTIES = (0.01, 0.02, 0.05, 0.1)
# How many agents: cells by the side of the grid, and the kinds that they are compared on
AMOUNTS = {64: ((8, 8), (4, 8), (4, 4), (2, 4), (2, 2)), 128: ((8, 8), (4, 8), (4, 4), (2, 4))}
AMOUNT_KINDS = ("model, queries × 1", "model, queries × 8", "Gaussian, σ 4–16", "inverse square")
# (side of the grid, cell) of the timings, the cells as planned
GRIDS = ((64, (4, 4)), (128, (4, 8)))


def closeness(
    steps: Mapping[Any, Callable[..., Tensor]], kinds: Sequence[str], size: tuple[int, int]
) -> dict[Any, list[str]]:
    """Error of each way on each kind: the median of the heads, and the worst."""
    found: dict[Any, list[str]] = {name: [] for name in steps}
    for kind in tqdm(kinds, desc="closeness"):
        at = KINDS[kind](HEADS, WIDTH, size, torch.Generator().manual_seed(0))
        expected = full(at)
        for name, step in steps.items():
            lost = errors_of(step(at.q, at.k, at.v, size=size, cell=CELL), expected)
            found[name].append(f"{short(float(lost['median']))} ({short(float(lost['worst']))})")
    return found


def timed(
    steps: Mapping[Any, Callable[..., Tensor]], side: int, cell: tuple[int, int], dtype: torch.dtype, rounds: int
) -> list[str]:
    """Seconds of processor time against SDPA's, the medians of interleaved rounds after one warm-up."""
    x = [torch.randn(1, side**2, HEADS * WIDTH).to(dtype) for _ in range(3)]
    ratios: dict[Any, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), desc=f"{side}×{side}, {dtype}"):
        base = _seconds(scaled_dot_product_attention, x)
        for name, step in steps.items():
            taken = _seconds(partial(step, size=(side, side), cell=cell), x)
            ratios[name] += [taken / base] if number else []
    return [f"{statistics.median(of):.2f}" for of in ratios.values()]


def _seconds(step: Callable[..., Tensor], x: list[Tensor]) -> float:
    start = time.process_time()
    join_heads(step(*(split_heads(t, HEADS) for t in x)))
    return time.process_time() - start


def _corrected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: tuple[int, int],
    cell: tuple[int, int],
    cells: tuple[int, int] = (4, 4),
    landmarks: str = "sample",
) -> Tensor:
    """Corrected agents with `cells` of their own, whatever the cell of local attention is."""
    if landmarks == "staggered":
        return corrected_attention(q, k, v, *(x[:, :, staggered(size, cells[0])] for x in (q, k, v)))
    few = [split_heads(x, q.shape[1]) for x in sample_each([join_heads(x) for x in (q, k, v)], size, cells)]
    if landmarks == "superpixel":
        return by_superpixels(q, k, v, few[0], size=size, cell=cells)
    if landmarks == "heavy":
        return by_heavy_hitters(q, k, v, *few, size=size, cell=cells)
    return corrected_attention(q, k, v, *few)


def staggered(size: tuple[int, int], side: int) -> Tensor:
    """One token of each cell of side × side whole ones, at another place in each of side² cells next to each other."""
    y, x = (torch.arange(length // side) for length in size)
    # bits in reverse, so that neighbours are far apart
    place = torch.tensor({2: [0, 1], 4: [0, 2, 1, 3], 8: [0, 4, 2, 6, 1, 5, 3, 7]}[side])
    rows = side * y[:, None] + place[x % side]
    columns = side * x + place[y % side][:, None]
    return (size[1] * rows + columns).flatten()


def table(rounds: int) -> str:
    """Variants down; closeness on each kind, and time at each size and dtype, across."""
    steps: dict[str, Callable[..., Tensor]] = {
        f"corrected, cells of {side}×{side}": partial(_corrected, cells=(side, side)) for side in (8, 4, 2)
    }
    for landmarks in ("superpixel", "heavy"):
        steps[f"corrected, {landmarks}"] = partial(_corrected, landmarks=landmarks)
        steps[f"local, {landmarks}"] = partial(local_attention, landmarks=landmarks)
    steps["corrected, staggered sample"] = partial(_corrected, landmarks="staggered")
    for window, halo in WINDOWS:
        chosen = " (chosen)" if (window, halo) == (WINDOW, HALO) else ""
        steps[f"windows of {window}, halo {halo}{chosen}"] = partial(local_attention, window=window, halo=halo)
    steps_and_penalties = steps | {f"μ {mu}": partial(local_attention, mu=mu) for mu in PENALTIES}
    errors = closeness(steps_and_penalties, SHOWN, SIZE)
    times = {name: [] for name in errors}
    columns = []
    for side, cell in GRIDS:
        for dtype in (torch.float32, torch.bfloat16):
            columns.append(
                f"time, {side * side} tokens, cells of {cell[1]}×{cell[0]}, {str(dtype).removeprefix('torch.')}"
            )
            for name, ratio in zip(steps, timed(steps, side, cell, dtype, rounds if side == 64 else 2), strict=True):
                times[name].append(ratio)
    lines = ["| | " + " | ".join((*SHOWN, *columns)) + " |", "|---|" + "---:|" * (len(SHOWN) + len(columns))]
    for name, row in errors.items():
        lines.append("| " + " | ".join((name, *row, *(times[name] or [""] * len(columns)))) + " |")
    return "\n".join(lines)


def amounts(rounds: int) -> str:
    """Corrected agents by their number: closeness and time, at each size."""
    head = ("tokens", "cells", "agents", *AMOUNT_KINDS, "time, float32", "time, bfloat16")
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * (len(head) - 3) + "|"]
    for side, cells in AMOUNTS.items():
        ways = {cell: partial(_corrected, cells=cell) for cell in cells}
        errors = closeness(ways, AMOUNT_KINDS, (side, side))
        times = [timed(ways, side, (4, 4), dtype, rounds) for dtype in (torch.float32, torch.bfloat16)]
        for cell, *taken in zip(cells, *times, strict=True):
            n = side * side // (cell[0] * cell[1])
            row = (f"{side * side}", f"{cell[1]}×{cell[0]}", f"{n}", *errors[cell], *taken)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/zoo/landmarks.md"), help="file for the table")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timings (9)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # processor time is that of all threads
    text = (
        f"Error: median of the heads (worst), {SIZE[1]}×{SIZE[0]} tokens. Time: SDPA = 1, {HEADS} heads of {WIDTH}.\n\n"
    )
    text += f"{table(args.rounds)}\n\nCorrected agents by their number:\n\n{amounts(min(args.rounds, 4))}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
