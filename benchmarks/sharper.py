"""The fidelity run where attention is sharper: tables of what `benchmarks.fidelity --queries` has measured.

Reads docs/fidelity and docs/fidelity/queries1, queries4 and queries8, and writes the sections "sharper" and "levels" of
docs/fidelity.md, and the table of the run itself. Measures nothing.

    python -m benchmarks.fidelity --samples 6 --pictures 12 --sizes 64x64
    python -m benchmarks.fidelity --queries 4 --samples 4 --pictures 2 --only NAME …        # and 8
    python -m benchmarks.fidelity --untimed --out docs/fidelity/queries1 --samples 4 --pictures 0 --only NAME …
    python -m benchmarks.sharper
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .fidelity import mean, worst
from .pages import fill

FOLDER, PAGE = Path("docs/fidelity"), Path("docs/fidelity.md")
PLOT = FOLDER / "frontier-64x64.png"
FACTORS = (1, 4, 8)
DEEPER = ", two levels"
# (height, width) of the latents that the first table is about
SIZE = (64, 64)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The measured rows of a run's folder."""
    found = json.loads((folder / "fidelity.json").read_text(encoding="utf-8"))["rows"].values()
    return [row for row in found if "deviation" in row]


def sharper(runs: Sequence[Iterable[dict[str, Any]]]) -> str:
    """Deviation of forward passes and of final latents, by method and factor; `runs` as in `FACTORS`."""
    by_name = [{row["method"]: row for row in run if row["size"] == list(SIZE)} for run in runs]
    sharp = {name for run in by_name[1:] for name in run if not name.endswith(DEEPER)}
    lines = ["| method | " + " | ".join(f"queries × {factor}" for factor in FACTORS)]
    lines[0] += " | " + " | ".join(f"picture, × {factor}" for factor in FACTORS) + " |"
    lines += ["|---|" + "---:|" * (2 * len(FACTORS))]
    for name in (name for name in by_name[0] if name in sharp):
        of = [run.get(name, {}) for run in by_name]
        cells = [_mean_and_worst(row) for row in of]
        cells += [f"{row['picture_deviation']:.4f}" if "picture_deviation" in row else "" for row in of]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def levels(runs: Sequence[Iterable[dict[str, Any]]]) -> str:
    """Deviation with one level patched and with two, by size and factor; `runs` as in `FACTORS`."""
    by_key = [{(row["method"], *row["size"]): row for row in run} for run in runs]
    names = [key[0].removesuffix(DEEPER) for key in by_key[0] if key[0].endswith(DEEPER)]
    names = list(dict.fromkeys(names))
    lines = [
        "| latent | tokens, levels 0 and 1 | queries | " + " | ".join(f"{name} | + level 1" for name in names) + " |"
    ]
    lines += ["|---|---|---|" + "---:|" * (2 * len(names))]
    for height, width in dict.fromkeys(key[1:] for key in by_key[0] if key[0].endswith(DEEPER)):
        for factor, run in zip(FACTORS, by_key, strict=True):
            if not any((name + DEEPER, height, width) in run for name in names):
                continue
            cells = [f"{width}×{height}", f"{height * width}, {height * width // 4}", f"× {factor}"]
            for name in names:
                cells += [_mean_and_worst(run.get((name + end, height, width))) for end in ("", DEEPER)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_worst(row: dict[str, Any] | None) -> str:
    return f"{mean(row):.4f} ({worst(row):.4f})" if row else ""


def main() -> None:
    """Write the sections."""
    whole = rows(FOLDER)
    small, *sharp = (rows(FOLDER / f"queries{factor}") for factor in FACTORS)
    table = (FOLDER / "table.md").read_text(encoding="utf-8").split("\n\n")[1].strip()
    if PLOT.exists():
        table += f"\n\n![Deviation against seconds]({PLOT.relative_to(PAGE.parent)})"
    sections = {"run": table, "sharper": sharper([whole, *sharp]), "levels": levels([small, *sharp])}
    fill(PAGE, "benchmarks.sharper", sections)


if __name__ == "__main__":
    main()
