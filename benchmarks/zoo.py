"""How close ways of self-attention come to full attention, on attentions of many kinds, and what they take.

For each kind, size and width of a head: the relative error of each way's output, its median and its worst over the
heads, and its seconds of processor time on one thread relative to SDPA's, medians of interleaved rounds.

    python -m benchmarks.zoo                   # docs/zoo/: CSV, Markdown and the plot; resumes
    python -m benchmarks.zoo --most 5000       # the same without 16384 tokens
    python -m benchmarks.zoo --quick           # two sizes, one width, into out/zoo
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .attentions import KINDS, Attention
from .rivals import RIVALS, Rival, full

FIELDS = ("kind", "height", "width", "heads", "d", "method", "median", "worst", "relative", "rounds", "neff", "near")
# What the plot and the first table show.
MAIN = ((64, 64), 40)


@dataclass(frozen=True)
class Case:
    """One attention: its kind, size, number of heads and width of a head."""

    kind: str
    size: tuple[int, int]
    heads: int
    d: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(map(str, (self.kind, *self.size, self.heads, self.d)))

    def make(self) -> Attention:
        return KINDS[self.kind](self.heads, self.d, self.size, torch.Generator().manual_seed(0))


def cases(quick: bool, most: int) -> list[Case]:
    """All cases of at most so many tokens; the model's heads have a width of their own, so they come once a size."""
    shapes = [((64, 64), 40), ((32, 32), 40), ((45, 61), 40), ((64, 64), 64), ((64, 64), 80), ((128, 128), 40)]
    if quick:
        shapes = [((64, 64), 40), ((21, 45), 40)]
    heads = 4 if quick else 8
    return [
        Case(kind, size, heads, d)
        for size, d in shapes
        if math.prod(size) <= most
        for kind in KINDS
        if d == MAIN[1] or not kind.startswith("model")
    ]


@torch.inference_mode()
def measure(case: Case, rivals: dict[str, Rival], rounds: int) -> list[dict[str, Any]]:
    """A row for each way that is within reach."""
    at = case.make()
    expected, (neff, near) = full(at), at.concentration()
    seconds: dict[str, list[float]] = {name: [] for name in rivals if math.prod(case.size) <= rivals[name].most}
    errors = {}
    for number in range(rounds):
        for name in seconds:
            if number and not rivals[name].timed:
                continue
            start = time.process_time()
            out = rivals[name].attend(at)
            seconds[name].append(time.process_time() - start)
            errors[name] = error(out, expected)
    about = dict(zip(FIELDS[:5], case.key, strict=True))
    return [
        about
        | {"method": name, "neff": f"{neff:.0f}", "near": f"{near:.2f}", "rounds": len(seconds[name])}
        | {"median": f"{statistics.median(errors[name]):.5f}", "worst": f"{max(errors[name]):.5f}"}
        | {"relative": f"{relative(seconds[name], seconds['full']):.3f}" if rivals[name].timed else ""}
        for name in seconds
    ]


def error(out: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """‖out − expected‖ / ‖expected‖ of each head; infinite where it is not finite."""
    found = (out - expected).flatten(2).norm(dim=-1) / expected.flatten(2).norm(dim=-1)
    return found.flatten().nan_to_num(math.inf, math.inf).tolist()


def relative(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median of each round's own ratio, the first round left out as warm-up where there are others."""
    ratios = [a / max(b, 1e-9) for a, b in zip(seconds, base, strict=True)]
    return statistics.median(ratios[1:] or ratios)


class Results:
    """The file of rows: a case is written when it is done, and not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, case: Case) -> bool:
        return any(tuple(row[name] for name in FIELDS[:5]) == case.key for row in self.rows)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows += [{name: str(row[name]) for name in FIELDS} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)

    def shapes(self) -> dict[tuple[tuple[int, int], int], list[dict[str, str]]]:
        """Rows by ((height, width), width of a head), in their order."""
        found: dict[tuple[tuple[int, int], int], list[dict[str, str]]] = {}
        for row in self.rows:
            found.setdefault(((int(row["height"]), int(row["width"])), int(row["d"])), []).append(row)
        return found


def tables(results: Results) -> str:
    """A table for each shape: kinds down, ways across."""
    text = ["Median of the heads, and the worst of them in brackets; ∞: not finite. Ways as in docs/zoo.md.", ""]
    for ((height, width), d), rows in results.shapes().items():
        ways = [name for name in RIVALS if name != "full" and any(row["method"] == name for row in rows)]
        text += [f"**{width}×{height} = {width * height} tokens, heads of {d}**", ""]
        text += ["| | neff | near | " + " | ".join(RIVALS[name].label for name in ways) + " |"]
        text += ["|---|---:|---:|" + "---:|" * len(ways)]
        for kind in dict.fromkeys(row["kind"] for row in rows):
            of = {row["method"]: row for row in rows if row["kind"] == kind}
            marks = [f"{short(of[name]['median'])} ({short(of[name]['worst'])})" for name in ways]
            text.append(f"| {kind} | {of['full']['neff']} | {of['full']['near']} | " + " | ".join(marks) + " |")
        text += ["| **time, SDPA = 1** | | | " + " | ".join(of_time(rows, name) for name in ways) + " |", ""]
    return "\n".join(text)


def of_time(rows: Sequence[dict[str, str]], method: str) -> str:
    times = [float(row["relative"]) for row in rows if row["method"] == method and row["relative"]]
    return f"{statistics.median(times):.2f}" if times else ""


def short(value: str) -> str:
    x = float(value)
    if math.isinf(x):
        return "∞"
    return ">10" if x > 10 else f"{x:.3f}" if x < 1 else f"{x:.1f}"


def draw(results: Results, path: Path) -> None:
    """Error over seconds, one panel a kind, of the main shape or else of the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = results.shapes()
    ((height, width), d), rows = next(((s, r) for s, r in shapes.items() if s == MAIN), next(iter(shapes.items())))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, panels = plt.subplots(-(-(len(kinds) + 1) // 4), 4, figsize=(13, 9), sharex=True, sharey=True)
    marks = {"local": "*"}
    colours = dict(zip(RIVALS, plt.get_cmap("tab20").colors, strict=False))
    for panel, kind in zip(panels.flat, kinds, strict=False):
        of = [row for row in rows if row["kind"] == kind and row["relative"] and row["method"] != "full"]
        for row in of:
            y = min(max(float(row["median"]), 1e-3), 10)
            mark = marks.get(row["method"], "o")
            panel.plot(float(row["relative"]), y, mark, color=colours[row["method"]], ms=7 if mark == "o" else 11)
        panel.set(xscale="log", yscale="log", ylim=(8e-4, 13), title=f"{kind} (neff {of[0]['neff']})")
        panel.title.set_fontsize(9)
        panel.grid(True, alpha=0.3)
    for panel in panels.flat[len(kinds) :]:
        panel.axis("off")
    names = [n for n, rival in RIVALS.items() if rival.timed and n != "full" and any(r["method"] == n for r in rows)]
    handles = [
        plt.Line2D([], [], marker=marks.get(n, "o"), ls="", color=colours[n], label=RIVALS[n].label) for n in names
    ]
    panels.flat[len(kinds)].legend(handles=handles, fontsize="small", loc="center", frameon=False)
    figure.suptitle(f"{width}×{height} tokens, heads of {d}; errors are cut off at 0.001 and 10")
    figure.supxlabel("seconds of processor time, SDPA = 1")
    figure.supylabel("relative error, median of the heads")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, one width of a head, two rounds")
    parser.add_argument("--out", type=Path, help="folder of the results (docs/zoo; out/zoo with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds of each case, the first a warm-up (5; 2 with --quick)")
    parser.add_argument("--most", type=int, default=2**20, help="leave out cases of more tokens than this")
    args = parser.parse_args(arguments)
    out = args.out or Path("out/zoo" if args.quick else "docs/zoo")
    rounds = args.rounds or (2 if args.quick else 5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is that of all threads
    try:
        run(out, cases(args.quick, args.most), rounds)
    finally:
        torch.set_num_threads(before)


def run(out: Path, wanted: Sequence[Case], rounds: int, rivals: dict[str, Rival] = RIVALS) -> None:
    """Measure the cases that are missing, and write table and plot."""
    results = Results(out / "zoo.csv")
    bar = tqdm([case for case in wanted if not results.has(case)])
    for case in bar:
        bar.set_postfix_str(f"{case.kind}, {case.size[1]}×{case.size[0]}, heads of {case.d}")
        results.add(measure(case, rivals, rounds))
    (out / "table.md").write_text(tables(results) + "\n", encoding="utf-8")
    draw(results, out / "zoo.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
