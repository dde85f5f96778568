"""The zoo's tables and plot, and what they say: where a method that needs no training is closer than ours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .candidates import CANDIDATES, FULL
from .pages import fill
from .zoo import MAIN, Case, Shape

# Columns of the page's table.
SHOWN = (
    *("corrected4-0", "corrected4-0.04", "corrected4-0.14", "pool2", "todo2"),
    *("tomesd0.5", "agentsd", "tiles32", "nystra4", "nystrom", "top"),
)
# Prices that differ by less are taken for the same: seconds vary by as much from run to run.
NOISE = 0.03
PAGE, DATA, PICTURE = Path("docs/measurements.md"), Path("docs/zoo"), "zoo.png"


@dataclass(frozen=True)
class Point:
    """A method in one case: its errors, and its seconds relative to SDPA's, which are NaN where they mean nothing."""

    method: str
    median: float
    worst: float
    token: float
    price: float

    @property
    def label(self) -> str:
        return CANDIDATES[self.method].label

    @property
    def ours(self) -> bool:
        return CANDIDATES[self.method].ours


@dataclass(frozen=True)
class Loss:
    """Another method is closer than every method of ours that costs no more."""

    case: Case
    other: Point
    ours: Point
    measure: str

    @property
    def factor(self) -> float:
        """How many times as far off ours is."""
        mine, theirs = (getattr(point, self.measure) for point in (self.ours, self.other))
        return mine / theirs if theirs else math.inf

    def __str__(self) -> str:
        other, ours = (
            f"{point.label} has {short(getattr(point, self.measure))} at {point.price:.2f}"
            for point in (self.other, self.ours)
        )
        return f"{other}, {ours}: {self.factor:.1f} times ({self.case.shape})"


Points = Mapping[Case, Sequence[Point]]


def join(errors: Iterable[Mapping[str, str]], seconds: Iterable[Mapping[str, str]]) -> dict[Case, list[Point]]:
    """The points of every case, in the order of `CANDIDATES`."""
    price = {(_shape(row), row["method"]): _number(row["relative"]) for row in seconds}
    points: dict[Case, list[Point]] = defaultdict(list)
    for row in errors:
        if row["method"] in CANDIDATES and row["median"]:
            shape, found = _shape(row), (float(row[name]) for name in ("median", "worst", "token"))
            method = row["method"]
            points[Case(row["kind"], shape)].append(Point(method, *found, price.get((shape, method), math.nan)))
    order = list(CANDIDATES)
    return {case: sorted(found, key=lambda point: order.index(point.method)) for case, found in points.items()}


def _shape(row: Mapping[str, str]) -> Shape:
    return Shape(*(int(row[name]) for name in ("height", "width", "heads", "d")))


def _number(text: str) -> float:
    return float(text) if text else math.nan


def compare(points: Points, measure: str = "median") -> tuple[dict[Case, int], list[Loss]]:
    """(number of others that cost at least as much as the cheapest of ours, those of them that are closer).

    Others are all published methods with a price below SDPA's; a method of ours counts at its price and above.
    """
    counts, losses = {}, []
    for case, found in points.items():
        ours = [point for point in found if point.ours and not math.isnan(point.price)]
        others = [point for point in found if not point.ours and point.price < 1 and point.method != FULL]
        counts[case] = 0
        for other in others:
            reach = [point for point in ours if point.price <= other.price * (1 + NOISE)]
            if not reach:
                continue
            counts[case] += 1
            best = min(reach, key=lambda point: getattr(point, measure))
            if getattr(other, measure) < getattr(best, measure):
                losses.append(Loss(case, other, best, measure))
    return counts, losses


def verdict(points: Points) -> str:
    """What the comparison says, by kind of attention: a sentence and a table."""
    counts, losses = compare(points)
    worst = compare(points, "worst")[1]
    total = sum(counts.values())
    lines = [
        f"{len(points)} cases (a kind in a shape), {total} comparisons with a published method at a price that ours "
        f"reach. **Ours is the closest in {total - len(losses)} by the median head and in {total - len(worst)} by the "
        "worst.** The rest, by kind:",
        "",
        "| kind | comparisons | closer than ours: by the median | by the worst | largest lead over ours, median |",
        "|---|---:|---:|---:|---|",
    ]
    for kind in dict.fromkeys(case.kind for case in points):
        here = [loss for loss in losses if loss.case.kind == kind]
        lead = str(max(here, key=lambda loss: loss.factor)) if here else ""
        cells = [sum(count for case, count in counts.items() if case.kind == kind), len(here)]
        cells += [sum(loss.case.kind == kind for loss in worst), lead]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def all_losses(points: Points) -> str:
    """Every comparison in which another method is closer."""
    lines = ["| kind | shape | measure | closer | its error | its price | ours | its error | its price | times |"]
    lines += ["|---|---|---|---|---:|---:|---|---:|---:|---:|"]
    for measure in ("median", "worst"):
        for loss in compare(points, measure)[1]:
            cells = [loss.case.kind, str(loss.case.shape), measure]
            for point in (loss.other, loss.ours):
                cells += [point.label, short(getattr(point, measure)), f"{point.price:.2f}"]
            lines.append("| " + " | ".join((*cells, f"{loss.factor:.1f}")) + " |")
    return "\n".join(lines)


def table(points: Points, concentration: Mapping[Case, tuple[str, str]], shape: Shape, shown: Sequence[str]) -> str:
    """Median, and in brackets the worst, of one shape: kinds down, methods across."""
    here = {case: {p.method: p for p in found} for case, found in points.items() if case.shape == shape}
    ways = [name for name in shown if any(name in found for found in here.values())]
    lines = ["| | neff | near | " + " | ".join(CANDIDATES[name].label for name in ways) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(ways)]
    for case, found in here.items():
        marks = [f"{short(found[n].median)} ({short(found[n].worst)})" if n in found else "" for n in ways]
        lines.append("| " + " | ".join((case.kind, *concentration[case], *marks)) + " |")
    prices = [[found[name].price for found in here.values() if name in found] for name in ways]
    cells = ["" if math.isnan(price[0]) else f"{price[0]:.2f}" for price in prices]
    lines.append("| **seconds, SDPA = 1** | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def token_table(points: Points, shape: Shape) -> str:
    """The worst token of one shape: kinds down, methods across."""
    here = {case: {p.method: p for p in found} for case, found in points.items() if case.shape == shape}
    ways = [name for name in CANDIDATES if name != FULL and any(name in found for found in here.values())]
    lines = ["| | " + " | ".join(CANDIDATES[name].label for name in ways) + " |", "|---|" + "---:|" * len(ways)]
    for case, found in here.items():
        cells = [short(found[n].token) if n in found else "" for n in ways]
        lines.append("| " + " | ".join((case.kind, *cells)) + " |")
    return "\n".join(lines)


def short(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return ">10" if value > 10 else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def write(out: Path, errors: Sequence[Mapping[str, str]], seconds: Sequence[Mapping[str, str]]) -> None:
    """Write zoo.png into `out`, and what it says into the page if these are the page's results, else into table.md."""
    points = join(errors, seconds)
    concentration = {Case(row["kind"], _shape(row)): (row["neff"], row["near"]) for row in errors}
    shapes = list(dict.fromkeys(case.shape for case in points))
    main = MAIN if MAIN in shapes else shapes[0]
    draw({case: found for case, found in points.items() if case.shape == main}, concentration, out / PICTURE)
    if out == DATA:
        picture = f"![Error over price, one panel a kind](zoo/{PICTURE})"
        shown = table(points, concentration, main, SHOWN)
        fill(PAGE, "benchmarks.zoo", {"verdict": f"{verdict(points)}\n\n{picture}", "closeness": shown})
        return
    ways = [name for name in CANDIDATES if name != FULL]
    text = ["Median error of the heads, and the worst head's in brackets; ∞: not finite.", ""]
    for shape in shapes:
        text += [f"## {shape}: {math.prod(shape.size)} tokens", "", table(points, concentration, shape, ways), ""]
        text += ["The worst token:", "", token_table(points, shape), ""]
    text += ["## Where another method is closer", "", all_losses(points), ""]
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")


def draw(points: Points, concentration: Mapping[Case, tuple[str, str]], path: Path) -> None:
    """Error over seconds, one panel a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter

    shades, families = plt.get_cmap("tab20").colors, {}
    for name, candidate in CANDIDATES.items():
        if candidate.timed and name != FULL:
            families[candidate.family] = {"marker": "*", "ms": 10, "lw": 1.5} if candidate.ours else _OTHERS
    families = {
        family: style | {"color": colour}
        for (family, style), colour in zip(families.items(), shades[::2] + shades[1::2], strict=False)
    }
    rows = -(-(len(points) + 1) // 4)
    figure, panels = plt.subplots(rows, 4, figsize=(13, 2.75 * rows), sharex=True, sharey=True, squeeze=False)
    for panel, (case, found) in zip(panels.flat, points.items(), strict=False):
        _draw_case(panel, found, families)
        panel.set(xscale="log", yscale="log", ylim=(8e-4, 13))
        panel.set_title(f"{case.kind} (neff {concentration[case][0]})", fontsize=9)
        panel.grid(True, alpha=0.3)
    panels[0, 0].xaxis.set_major_locator(FixedLocator((0.05, 0.1, 0.2, 0.5, 1)))  # the axes are shared
    panels[0, 0].xaxis.set_major_formatter("{x:g}")
    panels[0, 0].xaxis.set_minor_formatter(NullFormatter())
    for panel in panels.flat[len(points) :]:
        panel.axis("off")
    handles = [plt.Line2D([], [], label=family, **style) for family, style in families.items()]
    panels.flat[len(points)].legend(handles=handles, fontsize="small", loc="center", frameon=False)
    shape = next(iter(points)).shape
    figure.suptitle(f"{shape}; marks: median head, lines: up to the worst; cut off at 0.001 and 10; stars are ours")
    figure.supxlabel("seconds, SDPA = 1")
    figure.supylabel("relative error")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


_OTHERS = {"marker": "o", "ms": 5, "lw": 0.7}


def _draw_case(panel: Any, found: Sequence[Point], families: Mapping[str, Mapping[str, Any]]) -> None:
    """Join the methods of a family; a line above each mark ends at the worst head."""
    by_family: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(found, key=lambda point: point.price):
        if not math.isnan(point.price) and point.method != FULL:
            by_family[CANDIDATES[point.method].family].append(point)
    for family, of in by_family.items():
        x, y, top = [p.price for p in of], [_cut(p.median) for p in of], [_cut(p.worst) for p in of]
        panel.plot(x, y, **families[family])
        panel.vlines(x, y, top, color=families[family]["color"], lw=0.7, alpha=0.5)


def _cut(error: float) -> float:
    return min(max(error, 1e-3), 10)
