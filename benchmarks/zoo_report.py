"""The zoo's tables and plot, and what they say: where a method that needs no training is closer than ours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .candidates import CANDIDATES, FULL, Candidate
from .machine import PAGE, ROOT
from .results import fill, table
from .zoo import MAIN, Case, Shape

# Columns of the page's table.
SHOWN = ("corrected4-0", "corrected4-0.04", "corrected4-0.14", "pool2", "todo2", "tomesd0.5", "agentsd")
SHOWN += ("sol-rows", "sol1", "sol-salient", "pisa0.15", "drop", "monarch3", "top")
# Prices that differ by less are taken for the same: seconds vary by as much from run to run.
NOISE = 0.03
# Errors below this are taken for this one, which nobody sees.
LEAST = 0.001
DATA, PICTURE = ROOT / "docs/zoo", "zoo.png"


@dataclass(frozen=True)
class Point:
    """A method in one case: its errors, and its price relative to SDPA's, which is NaN where it means nothing.

    `price` is in seconds if the method is timed, `ideal` in products alone; `neff` and `near` are of the case.
    """

    method: str
    median: float
    worst: float
    price: float
    ideal: float
    neff: str = ""
    near: str = ""

    @property
    def of(self) -> Candidate:
        return CANDIDATES[self.method]


Points = Mapping[Case, Sequence[Point]]


def join(errors: Iterable[Mapping[str, str]], seconds: Iterable[Mapping[str, str]]) -> dict[Case, list[Point]]:
    """The points of every case, in the order of `CANDIDATES`."""
    relative = {(_shape(row), row["method"]): row["relative"] for row in seconds}
    points: dict[Case, list[Point]] = defaultdict(list)
    order = list(CANDIDATES)
    known = [row for row in errors if row["method"] in order and row["median"]]
    for row in sorted(known, key=lambda row: order.index(row["method"])):
        shape, method = _shape(row), row["method"]
        price = float(row["price"] or relative.get((shape, method)) or math.nan)
        attend, figures = CANDIDATES[method].attend, (float(row[name]) for name in ("median", "worst"))
        ideal = attend.ideal(shape.size, shape.heads * shape.d) if CANDIDATES[method].ours else price
        points[Case(row["kind"], shape)].append(Point(method, *figures, price, ideal, row["neff"], row["near"]))
    return {case: points[case] for case in dict.fromkeys(Case(row["kind"], _shape(row)) for row in known)}


def _shape(row: Mapping[str, str]) -> Shape:
    return Shape(*(int(row[name]) for name in ("height", "width", "heads", "d")))


class Loss(NamedTuple):
    """Another method is closer, by so many times, than every method of ours that costs no more."""

    factor: float
    case: Case
    other: Point
    ours: Point


def compare(
    points: Points, measure: str = "median", timed: bool = True, basis: str = "price"
) -> tuple[list[Case], list[Loss]]:
    """(the case of each other that costs at least as much as the cheapest of ours, those of them that are closer).

    Others are the published methods that are `timed`, or those that are not, with a price below SDPA's; a method of
    ours counts at its price and above.
    """
    rivals, losses = [], []
    for case, found in points.items():
        ours = [point for point in found if point.of.ours and not math.isnan(getattr(point, basis))]
        for other in found:
            price = getattr(other, basis)
            reach = [point for point in ours if getattr(point, basis) <= price * (1 + NOISE)]
            if reach and not other.of.ours and other.of.timed == timed and price < 1 and other.method != FULL:
                rivals.append(case)
                best = min(reach, key=lambda point: getattr(point, measure))
                factor = max(getattr(best, measure), LEAST) / max(getattr(other, measure), LEAST)
                losses += [Loss(factor, case, other, best)] if factor > 1 else []
    return rivals, losses


# Who is compared, and how the page says it
BASES = {
    (True, "price"): "methods that run here, all by their seconds",
    (False, "price"): "block-sparse and Monarch attention at ideal prices, ours by seconds",
    (False, "ideal"): "the same, ours by its products alone too",
}


def verdict(points: Points) -> str:
    """What the comparisons say: a sentence each, and a table by kind."""
    found = {basis: {m: compare(points, m, *basis) for m in ("median", "worst")} for basis in BASES}
    lines = [f"{len(points)} cases (a kind in a shape); a comparison is a published method at a price that ours reach."]
    for basis, which in BASES.items():
        (rivals, median), (_, worst) = found[basis].values()
        lines.append(
            f"- {which[0].upper()}{which[1:]}: {len(rivals)} comparisons, **ours is the closest in "
            f"{len(rivals) - len(median)} by the median head and in {len(rivals) - len(worst)} by the worst**."
        )
    lines += ["", "Where ours is not, by kind: comparisons, lost by the median and by the worst head.", ""]
    head = ("kind", "by seconds", "ideal, ours by seconds", "ideal, ours too", "closer at some price (ideal: ours too)")
    rows = []
    for kind in dict.fromkeys(case.kind for case in points):
        row, closer = [kind], {}
        for basis, by_measure in found.items():
            (rivals, median), (_, worst) = by_measure.values()
            lost = [sum(loss.case.kind == kind for loss in losses) for losses in (median, worst)]
            row.append(f"{sum(case.kind == kind for case in rivals)}: {lost[0]}, {lost[1]}")
            if basis != (False, "price"):
                closer |= {loss.other.of.family: None for loss in median if loss.case.kind == kind}
        rows.append([*row, ", ".join(closer)])
    lines += table(head, rows)
    if leads := found[False, "ideal"]["median"][1]:
        lead = max(leads, key=lambda loss: loss.factor)
        other, ours = (f"{p.of.label} has {short(p.median)} at {p.ideal:.2f}" for p in (lead.other, lead.ours))
        lines.append(
            f"\nThe largest lead at ideal prices: {other}, {ours}: {lead.factor:.1f} times ({lead.case.shape})."
        )
    return "\n".join(lines)


def closeness(points: Points, shape: Shape, shown: Sequence[str]) -> str:
    """Median, and in brackets the worst, of one shape: kinds down, methods across."""
    here = {case: {p.method: p for p in found} for case, found in points.items() if case.shape == shape}
    ways = [name for name in shown if any(name in found for found in here.values())]
    rows = []
    for case, found in here.items():
        marks = [f"{short(found[n].median)} ({short(found[n].worst)})" if n in found else "" for n in ways]
        first = points[case][0]
        rows.append((case.kind, first.neff, first.near, *marks))
    prices = [[found[name].price for found in here.values() if name in found] for name in ways]
    spans = (dict.fromkeys((f"{min(price):.2f}", f"{max(price):.2f}")) for price in prices)
    cells = ["" if "nan" in span else "–".join(span) for span in spans]
    rows.append(("**price, SDPA = 1**", "", "", *cells))
    return "\n".join(table(["", "neff", "near", *(CANDIDATES[name].label for name in ways)], rows))


def short(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return ">10" if value > 10 else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def write(out: Path, errors: Sequence[Mapping[str, str]], seconds: Sequence[Mapping[str, str]]) -> None:
    """Write zoo.png into `out`, and what it says into the page if these are the page's results, else into table.md."""
    points = join(errors, seconds)
    shapes = list(dict.fromkeys(case.shape for case in points))
    main = MAIN if MAIN in shapes else shapes[0]
    draw({case: found for case, found in points.items() if case.shape == main}, out / PICTURE)
    if out.resolve() == DATA:
        picture = f"![Error over price, one panel a kind](zoo/{PICTURE})"
        shown = closeness(points, main, SHOWN)
        fill(PAGE, "benchmarks.zoo", {"verdict": f"{verdict(points)}\n\n{picture}", "closeness": shown})
        return
    ways = [name for name in CANDIDATES if name != FULL]
    text = ["Median error of the heads, and the worst head's in brackets; ∞: not finite.", ""]
    for shape in shapes:
        text += [f"## {shape}: {math.prod(shape.size)} tokens", "", closeness(points, shape, ways), ""]
    text += ["## Where another method is closer", "", verdict(points), ""]
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")


def draw(points: Points, path: Path) -> None:
    """Error over price, one panel a kind: a family's methods are joined, a line above each mark ends at the worst."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullFormatter

    shades = colormaps["tab20"].colors
    styles: dict[str, dict[str, Any]] = {}
    for name, candidate in CANDIDATES.items():
        if name not in (FULL, "top") and candidate.family not in styles:
            marker = "*" if candidate.ours else "o" if candidate.timed else "d"
            size, width = (10, 1.5) if candidate.ours else (5, 0.7)
            colour = (shades[::2] + shades[1::2])[len(styles)]
            styles[candidate.family] = {"marker": marker, "ms": size, "lw": width, "color": colour}
    rows = -(-(len(points) + 1) // 4)
    figure = Figure((13, 2.75 * rows))
    panels = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
    for panel, (case, found) in zip(panels.flat, points.items(), strict=False):
        for family, style in styles.items():
            of = sorted((p for p in found if p.of.family == family and p.price > 0), key=lambda point: point.price)
            prices = [p.price for p in of]
            median, worst = ([min(max(getattr(p, name), LEAST), 10) for p in of] for name in ("median", "worst"))
            panel.plot(prices, median, **style)
            panel.vlines(prices, median, worst, color=style["color"], lw=0.7, alpha=0.5)
        panel.set(xscale="log", yscale="log", ylim=(8e-4, 13))
        panel.set_title(f"{case.kind} (neff {found[0].neff})", fontsize=9)
        panel.grid(True, alpha=0.3)
    panels[0, 0].xaxis.set_major_locator(FixedLocator((0.05, 0.1, 0.2, 0.5, 1)))  # the axes are shared
    panels[0, 0].xaxis.set_major_formatter("{x:g}")
    panels[0, 0].xaxis.set_minor_formatter(NullFormatter())
    for panel in panels.flat[len(points) :]:
        panel.axis("off")
    handles = [Line2D([], [], label=family, **style) for family, style in styles.items()]
    panels.flat[len(points)].legend(handles=handles, fontsize="small", loc="center", frameon=False, ncols=2)
    shape = next(iter(points)).shape
    figure.suptitle(f"{shape}; marks: median head, lines: up to the worst; stars are ours, diamonds have ideal prices")
    figure.supxlabel("price, SDPA = 1")
    figure.supylabel("relative error, cut off at 0.001 and 10")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
