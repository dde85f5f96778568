"""A tuning as a table to read. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..rules import format_rules
from ..schedule import Rule

if TYPE_CHECKING:
    from .result import Tuning


def describe(tuning: Tuning) -> str:
    """Describe a tuning: what was promised, what was reached, and what its blocks do in each part of the diffusion."""
    lines = [headline(tuning), ""]
    lines += aligned(["part of the diffusion", "deviation", "blocks"], part_rows(tuning))
    if tuning.frontier:
        lines += ["", *aligned(["how close", "deviation, predicted", "seconds a call", "speed"], frontier_rows(tuning))]
    return "\n".join(lines)


def headline(tuning: Tuning) -> str:
    """Describe in a sentence what was asked for and reached."""
    height, width = tuning.size
    asked = f"tuned to {percent(tuning.tolerance)} at a latent of {width}×{height}"
    reached = tuning.measured if tuning.measured is not None else tuning.predicted
    if reached is None:
        return asked
    how = "measured" if tuning.measured is not None else "predicted"
    text = f"{asked}: deviation {percent(reached)} ({how})"
    if tuning.speed_up:
        text += f", {tuning.seconds_full:.3g} → {tuning.seconds:.3g} s a U-Net call, {tuning.speed_up:.2f}×"
    memory = mebibytes(tuning.peak_full, tuning.peak)
    return f"{text}, peak memory {memory}" if memory else text


def part_rows(tuning: Tuning) -> list[list[str]]:
    """Describe each part of the diffusion: where it is, its deviation, and how many blocks do what."""
    return [
        [f"{percent(since)} – {percent(until)}", _deviation_in(tuning, since, until), what_is_done(tuning, choices)]
        for since, until, choices in zip(tuning.since, (*tuning.since[1:], 1.0), tuning.choices, strict=True)
    ]


def _deviation_in(tuning: Tuning, since: float, until: float) -> str:
    inside = [moment for moment in tuning.moments if since <= moment.progress < until or moment.progress == until == 1]
    return percent(max(m.predicted if m.measured is None else m.measured for m in inside)) if inside else ""


def what_is_done(tuning: Tuning, choices: str) -> str:
    """Describe how many blocks use which settings, such as "3 corrected agent_ratio=0.95, 13 full"."""
    words = {letter: label_of(candidate) for letter, candidate in tuning.by_letter.items()}
    counts = Counter(choices).most_common()
    return ", ".join(f"{count} {words.get(letter, 'full')}" for letter, count in counts)


def label_of(candidate: dict) -> str:
    """Name a candidate by its method and its settings."""
    return format_rules([Rule(candidate)]).replace("method=", "")


def frontier_rows(tuning: Tuning) -> list[list[str]]:
    """Describe the plans for other tolerances."""
    return [
        [
            percent(point.tolerance),
            percent(point.predicted),
            f"{point.seconds:.3g}",
            f"{tuning.seconds_full / point.seconds:.2f}×" if tuning.seconds_full and point.seconds else "",
        ]
        for point in tuning.frontier
    ]


def percent(share: float) -> str:
    """Format a share as a percentage of two digits or more, such as "1.4%"."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 or value == int(value) else f"{value:.2g}%"


def mebibytes(full: int | None, ours: int | None) -> str:
    """Format peak memory without and with us, in bytes, such as "3100 → 2900 MiB"; empty if it is unknown."""
    return "" if full is None or ours is None else f"{full / 2**20:.0f} → {ours / 2**20:.0f}\u00a0MiB"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Arrange rows as lines of aligned columns."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in table]
