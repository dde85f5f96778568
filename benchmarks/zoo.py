"""How close methods of self-attention come to full attention, on attentions of many kinds, and what they cost.

Errors and seconds are measured apart. Errors, and the ideal prices of methods that need kernels of their own, depend on
the kind, the size and the width of a head, and on nothing that else runs on the machine. Seconds depend on the size and
the width only; they are interleaved with SDPA's and want a machine that does nothing else.

    python -m benchmarks.zoo                        # all that is missing in docs/zoo, then tables and plot
    python -m benchmarks.zoo errors                 # errors only; `seconds` and `report` likewise
    python -m benchmarks.zoo seconds --minutes 5    # stop after five minutes; the next call goes on
    python -m benchmarks.zoo --quick                # small sizes, a minute and a half, into out/zoo
    python -m benchmarks.zoo --again corrected4-0.14# measure a method anew
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .attentions import KINDS, Attention
from .candidates import CANDIDATES, FULL, Candidate
from .machine import Machine, in_turn, parser_of_rows, relative
from .peers import asked
from .results import Rows

PARTS = ("errors", "seconds", "report")
# A method that leaves layers of a shape alone has rows without values; `price` is an ideal one.
ERRORS = ("kind", "height", "width", "heads", "d", "method", "median", "worst", "token", "neff", "near", "price")
SECONDS = ("height", "width", "heads", "d", "method", "relative", "seconds", "rounds", "threads")


class Shape(NamedTuple):
    """A grid of height × width tokens, with `heads` heads of width `d`."""

    height: int
    width: int
    heads: int
    d: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.width}×{self.height}, heads of {self.d}"


# What plots and the first table show.
MAIN = Shape(64, 64, 8, 40)
SHAPES = (MAIN, Shape(32, 32, 8, 40), Shape(45, 61, 8, 40), Shape(64, 64, 8, 64), Shape(64, 64, 8, 80))
SHAPES += (Shape(97, 75, 4, 40), Shape(128, 128, 4, 40))
QUICK = (Shape(48, 48, 4, 40), Shape(21, 45, 4, 40))


class Case(NamedTuple):
    """One attention: its kind and its shape."""

    kind: str
    shape: Shape

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.shape._asdict()}

    def make(self) -> Attention:
        return KINDS[self.kind](self.shape.heads, self.shape.d, self.shape.size, torch.Generator().manual_seed(0))


def cases(shapes: Sequence[Shape]) -> list[Case]:
    """All kinds in all shapes; the model's heads have a width of their own, so its kinds come once a size."""
    return [Case(kind, s) for s in shapes for kind in KINDS if s.d == MAIN.d or not kind.startswith("model")]


@torch.inference_mode()
def measure_errors(
    rows: Rows, wanted: Sequence[Case], candidates: Mapping[str, Candidate], more: Callable[[], bool]
) -> None:
    """Add the errors that are missing, case by case, while there is `more` time."""
    missing = {case: names for case in wanted if (names := rows.missing(case.key, candidates))}
    for case in (bar := tqdm(missing, desc="errors")):
        if not more():
            return
        bar.set_postfix_str(f"{case.kind}, {case.shape}")
        at, found = case.make(), []
        expected, (neff, near) = CANDIDATES[FULL].attend(at), at.concentration()
        for name in missing[case]:
            answer = candidates[name].attend(at)
            out, price = answer if isinstance(answer, tuple) else (answer, None)
            about = {"neff": f"{neff:.0f}", "near": f"{near:.2f}", "price": "" if price is None else f"{price:.4f}"}
            found.append({**case.key, "method": name, **about, **errors(out, expected)})
        rows.add(found)


def errors(out: Tensor | None, expected: Tensor) -> dict[str, str]:
    """Median and worst relative error of the heads, and the worst of their tokens; infinite where it is not finite.

    A head's is ‖out − expected‖ / ‖expected‖. A token's is divided by the root mean square of its head's tokens.
    """
    if out is None:
        return {}
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

    SDPA is measured again in each of their rounds. `relative` is the median of the ratios of a round's own seconds.
    """
    timed = [name for name, candidate in candidates.items() if candidate.timed]
    missing = {shape: names for shape in shapes if (names := rows.missing(shape._asdict(), timed))}
    for shape in (bar := tqdm(missing, desc="seconds")):
        if not more():
            return
        bar.set_postfix_str(f"{shape}")
        at = Case("segments", shape).make()
        runs = {name: partial(candidates[name].attend, at) for name in missing[shape]}
        acting = {name: run for name, run in runs.items() if run() is not None}
        seconds = in_turn({FULL: partial(CANDIDATES[FULL].attend, at), **acting}, rounds, Machine(torch.device("cpu")))
        ratios = relative(seconds, FULL)
        about, found = {**shape._asdict(), "rounds": rounds, "threads": torch.get_num_threads()}, []
        for name in missing[shape]:
            found.append({**about, "method": name})
            if name in acting:
                found[-1] |= {"relative": f"{ratios[name]:.4f}", "seconds": f"{statistics.median(seconds[name]):.5f}"}
        rows.add(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = parser_of_rows("benchmarks.zoo", __doc__, "docs/zoo")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all of them)")
    args = parser.parse_args(arguments)
    for given, known in ((args.parts, PARTS), (args.again, CANDIDATES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    torch.set_num_threads(1)
    out, *size = ("out/zoo", QUICK, 2) if args.quick else ("docs/zoo", SHAPES, 5)
    run(args.out or Path(out), *size, parts=args.parts or PARTS, again=args.again, more=args.more)


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
    """Measure what is missing in the folder `out`, or asked for `again`, while there is `more` time; write `parts`."""
    from .zoo_report import write

    error_rows, second_rows = Rows(out / "errors.csv", ERRORS), Rows(out / "seconds.csv", SECONDS)
    if "errors" in parts:
        error_rows.drop(again.__contains__)
        measure_errors(error_rows, [case for case in cases(shapes) if case.kind in kinds], candidates, more)
    if "seconds" in parts:
        second_rows.drop(again.__contains__)
        measure_seconds(second_rows, shapes, candidates, rounds, more)
    if "report" in parts:
        write(out, error_rows.rows, second_rows.rows)
        print(f"written to {out}")


if __name__ == "__main__":
    main()
