"""How close methods of self-attention come to full attention, on attentions of many kinds, and what they cost.

Errors and seconds are measured apart. Errors depend on the kind, the size and the width of a head, and on nothing that
else runs on the machine. Seconds depend on the size and the width only; they are interleaved with SDPA's and want a
machine that does nothing else.

    python -m benchmarks.zoo                        # all that is missing in docs/zoo, then tables and plot
    python -m benchmarks.zoo errors                 # errors only; `seconds` and `report` likewise
    python -m benchmarks.zoo seconds --minutes 5    # stop after five minutes; the next call goes on
    python -m benchmarks.zoo --quick                # small sizes, a minute and a half, into out/zoo
    python -m benchmarks.zoo --again corrected4-0.14# measure a method anew
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .attentions import KINDS, Attention
from .candidates import CANDIDATES, FULL, Candidate, asked

PARTS = ("errors", "seconds", "report")
# A method that leaves layers of a shape alone has rows without values.
ERRORS = ("kind", "height", "width", "heads", "d", "method", "median", "worst", "token", "neff", "near")
SECONDS = ("height", "width", "heads", "d", "method", "relative", "seconds", "rounds", "threads")


@dataclass(frozen=True)
class Shape:
    """A grid of height × width tokens, with `heads` heads of width `d`."""

    height: int
    width: int
    heads: int
    d: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(map(str, (self.height, self.width, self.heads, self.d)))

    def __str__(self) -> str:
        return f"{self.width}×{self.height}, heads of {self.d}"


# What plots and the first table show.
MAIN = Shape(64, 64, 8, 40)
SHAPES = (
    MAIN,
    Shape(32, 32, 8, 40),
    Shape(45, 61, 8, 40),
    Shape(64, 64, 8, 64),
    Shape(64, 64, 8, 80),
    Shape(97, 75, 4, 40),
    Shape(128, 128, 4, 40),
)
QUICK = (Shape(48, 48, 4, 40), Shape(21, 45, 4, 40))


@dataclass(frozen=True)
class Case:
    """One attention: its kind and its shape."""

    kind: str
    shape: Shape

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, *self.shape.key

    def make(self) -> Attention:
        return KINDS[self.kind](self.shape.heads, self.shape.d, self.shape.size, torch.Generator().manual_seed(0))


def cases(shapes: Sequence[Shape]) -> list[Case]:
    """All kinds in all shapes; the model's heads have a width of their own, so its kinds come once a size."""
    return [Case(kind, s) for s in shapes for kind in KINDS if s.d == MAIN.d or not kind.startswith("model")]


class Rows:
    """A CSV file that is written anew whenever rows are added."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, fields
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, key: Sequence[str]) -> dict[str, dict[str, str]]:
        """Rows whose first fields are `key`, by method."""
        return {
            row["method"]: row
            for row in self.rows
            if all(row[name] == value for name, value in zip(self.fields, key, strict=False))
        }

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows += [{name: str(row[name]) for name in self.fields} for row in rows]
        self._write()

    def drop(self, methods: Sequence[str]) -> None:
        if methods:
            self.rows = [row for row in self.rows if row["method"] not in methods]
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


@torch.inference_mode()
def measure_errors(
    rows: Rows, wanted: Sequence[Case], candidates: Mapping[str, Candidate], more: Callable[[], bool]
) -> None:
    """Add the errors that are missing, case by case, while there is `more` time."""
    missing = {case: _missing(rows.of(case.key), candidates) for case in wanted}
    for case in (bar := tqdm([case for case in wanted if missing[case]], desc="errors")):
        if not more():
            return
        bar.set_postfix_str(f"{case.kind}, {case.shape}")
        at = case.make()
        expected, (neff, near) = CANDIDATES[FULL].attend(at), at.concentration()
        about = {"neff": f"{neff:.0f}", "near": f"{near:.2f}"}
        found = ((name, candidates[name].attend(at)) for name in missing[case])
        rows.add(_row(rows, case.key, name, about | errors(out, expected)) for name, out in found)


def _missing(done: Mapping[str, Any], candidates: Mapping[str, Candidate]) -> list[str]:
    return [name for name in candidates if name not in done]


def _row(rows: Rows, key: Sequence[str], method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(rows.fields, key, strict=False)) | {"method": method} | values


def errors(out: Tensor | None, expected: Tensor) -> dict[str, str]:
    """Median and worst relative error of the heads, and the worst of their tokens; infinite where it is not finite.

    A head's is ‖out − expected‖ / ‖expected‖. A token's is divided by the root mean square of its head's tokens.
    """
    if out is None:
        return dict.fromkeys(("median", "worst", "token"), "")
    if out.shape != expected.shape:
        expected = expected[:, :, asked(expected.shape[2])]
    lost, norm = (out - expected).norm(dim=-1), expected.norm(dim=-1).square().mean(-1, keepdim=True).sqrt()
    tokens = (lost / norm).flatten(0, 1).nan_to_num(math.inf, math.inf)
    heads = tokens.square().mean(-1).sqrt().tolist()
    found = {"median": statistics.median(heads), "worst": max(heads), "token": float(tokens.max())}
    return {name: f"{value:.5f}" for name, value in found.items()}


@torch.inference_mode()
def measure_seconds(
    rows: Rows,
    shapes: Sequence[Shape],
    candidates: Mapping[str, Candidate],
    rounds: int,
    more: Callable[[], bool],
) -> None:
    """Add the seconds that are missing, shape by shape, while there is `more` time.

    In each round every method is called once, SDPA first; the first round is a warm-up. `relative` is the median of
    the ratios of a round's own seconds.
    """
    timed = {name: candidate for name, candidate in candidates.items() if candidate.timed}
    missing = {shape: _missing(rows.of(shape.key), timed) for shape in shapes}
    for shape in (bar := tqdm([shape for shape in shapes if missing[shape]], desc="seconds")):
        if not more():
            return
        at = Case("segments", shape).make()
        acting = [name for name in missing[shape] if timed[name].attend(at) is not None]
        seconds: dict[str, list[float]] = {name: [] for name in (FULL, *acting)}
        for number in range(rounds + 1):
            bar.set_postfix_str(f"{shape}, round {number} of {rounds}")
            for name, times in seconds.items():
                start = time.perf_counter()
                CANDIDATES.get(name, candidates.get(name)).attend(at)
                times.append(time.perf_counter() - start)
        rows.add(_timed(rows, shape, name, seconds.get(name, []), seconds[FULL]) for name in missing[shape])


def _timed(rows: Rows, shape: Shape, name: str, times: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    values = dict.fromkeys(("relative", "seconds"), "") | {"rounds": len(base) - 1, "threads": torch.get_num_threads()}
    if times:
        ratios = [a / b for a, b in zip(times[1:], base[1:], strict=True)]
        values |= {"relative": f"{statistics.median(ratios):.4f}", "seconds": f"{statistics.median(times[1:]):.5f}"}
    return _row(rows, shape.key, name, values)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="two small shapes, two rounds, into out/zoo")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/zoo; out/zoo with --quick)")
    parser.add_argument("--rounds", type=int, help="timed rounds of each shape (5; 2 with --quick)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor (1)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    parser.add_argument("--again", nargs="+", default=[], metavar="METHOD", help="measure these anew")
    args = parser.parse_args(arguments)
    for given, known in ((args.parts, PARTS), (args.again, CANDIDATES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    before, end = torch.get_num_threads(), time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    try:
        run(
            args.out or Path("out/zoo" if args.quick else "docs/zoo"),
            QUICK if args.quick else SHAPES,
            args.rounds or (2 if args.quick else 5),
            parts=args.parts or PARTS,
            again=args.again,
            more=lambda: time.monotonic() < end,
        )
    finally:
        torch.set_num_threads(before)


def run(
    out: Path,
    shapes: Sequence[Shape],
    rounds: int,
    *,
    parts: Sequence[str] = PARTS,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    kinds: Sequence[str] = tuple(KINDS),
    again: Sequence[str] = (),
    more: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing in the folder `out`, and write what is known.

    Args:
        out: the folder of the results.
        shapes: the shapes.
        rounds: timed rounds of each shape.
        parts: what to do, of `PARTS`.
        candidates: the methods.
        kinds: names of the kinds of attention.
        again: methods whose results of these parts are dropped first.
        more: whether there is time to begin anything.
    """
    from .zoo_report import write

    error_rows, second_rows = Rows(out / "errors.csv", ERRORS), Rows(out / "seconds.csv", SECONDS)
    if "errors" in parts:
        error_rows.drop(again)
        wanted = [case for case in cases(shapes) if case.kind in kinds]
        measure_errors(error_rows, wanted, candidates, more)
    if "seconds" in parts:
        second_rows.drop(again)
        measure_seconds(second_rows, shapes, candidates, rounds, more)
    if "report" in parts:
        write(out, error_rows.rows, second_rows.rows)
        print(f"written to {out}")


if __name__ == "__main__":
    main()
