"""The results of the speed benchmark as plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(out: dict[str, Any], stem: Path) -> None:
    """Draw STEM-LAYOUT-speedup.png and -seconds.png for each layout with more than one size, and STEM-cost.png."""
    by_layout: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for case in out["cases"]:
        by_layout[case["layout"], case["dtype"], case["batch"], case["channels_last"]].append(case)
    for (layout, *_), cases in by_layout.items():
        if len({tuple(case["size"]) for case in cases}) > 1:
            _speedup(cases, stem.with_name(f"{stem.name}-{layout}-speedup.png"))
            _seconds(cases, stem.with_name(f"{stem.name}-{layout}-seconds.png"))
    if out["layer"]:
        _cost(out["layer"], stem.with_name(f"{stem.name}-cost.png"))


def _axes(title: str, x: str, y: str) -> Any:
    _, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # the default has only ten colours
    return axes


def _save(axes: Any, path: Path) -> None:
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.figure.savefig(path, dpi=120)
    plt.close(axes.figure)


def _lines(cases: list[dict[str, Any]], value: str) -> dict[str, list[tuple[float, float]]]:
    """A line of (pixels, value) for each method; a method that was measured at one size only has none."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        for result in case["results"].values():
            if result[value] is not None:
                lines[result["label"]].append((case["size"][0] * case["size"][1], result[value]))
    return {label: sorted(points) for label, points in lines.items() if len(points) > 1}


def _line(axes: Any, label: str, xs: list[float], ys: list[float]) -> None:
    limit = label.startswith("limit")
    axes.plot(xs, ys, "k--" if limit else "o-", label=label, linewidth=1.5 if limit else 1.2, markersize=4)


def _speedup(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up over the side of the image, with the limit as a dashed line."""
    axes = _axes("One U-Net forward against unpatched SDPA", "side of the image, pixels", "speed-up")
    for label, points in _lines(cases, "speedup").items():
        _line(axes, label, [pixels**0.5 for pixels, _ in points], [y for _, y in points])
    _save(axes, path)


def _seconds(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds of a forward over the pixels of the image, both logarithmic."""
    axes = _axes("One U-Net forward", "pixels of the image", "seconds")
    axes.set(xscale="log", yscale="log")
    for label, points in _lines(cases, "seconds").items():
        _line(axes, label, *zip(*points, strict=True))
    _save(axes, path)


def _cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of one layer over its tokens, both logarithmic."""
    axes = _axes("One self-attention layer, projections included", "tokens", "milliseconds")
    axes.set(xscale="log", yscale="log")
    for label in dict.fromkeys(row["label"] for row in rows):
        points = sorted((row["tokens"], 1e3 * row["seconds"]) for row in rows if row["label"] == label)
        axes.plot(*zip(*points, strict=True), "k--" if label == "limit" else "o-", label=label, markersize=4)
    _save(axes, path)
