"""Tunings as HTML: a table of what was asked for and reached, and a chart of speed over deviation.

The chart is an SVG in the page's own colours; `standalone` gives it colours of its own. Imports neither torch, gradio
nor a WebUI.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from ..attention.grid import Grid
from ..settings import tunings
from ..tuning.result import Tuning
from ..words import mebibytes, percent

if TYPE_CHECKING:
    from .kept_tunings import Kept, PresetPoint

HEAD = ("Pass", "Size", "Made with", "U-Net call", "Speed", "Peak memory", "Asked", "Deviation")
NAMES = {tunings.FIRST: "First pass", tunings.HIRES: "Hires pass", tunings.IMG2IMG: "img2img"}
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 26, 40
_TICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_LINE, _LETTER = 13, 6.2  # height of a label, and width of its letters
_STYLE = (
    "text{font:11px sans-serif}.agent-attention-grid{stroke:#ddd}.agent-attention-frontier{fill:none;stroke:#2563eb;"
    "stroke-width:2}.agent-attention-plan{fill:#2563eb}.agent-attention-chosen{fill:#dc2626}.agent-attention-preset"
    "{fill:#78716c}"
)


def html(kept: Sequence[Kept]) -> str:
    """Show a checkpoint's tunings, newest first: all of them as a table, and a chart of each.

    The page unfolds the chart of the size that is set; before it does, the newest is unfolded.
    """
    if not kept:
        return "<p>Nothing is tuned yet for this checkpoint.</p>"
    charts = (
        f'<details data-pass="{one.of}" data-size="{Grid(*one.tuning.size).pixels}"{"" if number else " open"}>'
        f"<summary>{escape(title(one))}</summary>{chart(one.tuning, one.presets)}"
        f"{''.join(f'<p>{escape(note)}</p>' for note in one.tuning.notes)}</details>"
        for number, one in enumerate(kept)
    )
    return f"<p>{escape(kept[0].checkpoint)}</p>{table(kept)}{''.join(charts)}"


def title(kept: Kept) -> str:
    """Name a tuning, such as "First pass, 512×512"."""
    return f"{NAMES[kept.of]}, {Grid(*kept.tuning.size).pixels}"


def table(kept: Iterable[Kept]) -> str:
    """Make the table of tunings; times are those of a U-Net call."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row(one)) + "</tr>" for one in kept)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="agent-attention-scroll">{whole}</div>'


def row(kept: Kept) -> list[str]:
    """Format a tuning as a row under `HEAD`."""
    tuning, plan = kept.tuning, kept.tuning.plan
    made_with = ", ".join(f"{name} {value}" for name, value in tuning.conditions.items() if value and name != "pass")
    times = (tuning.seconds_full, tuning.seconds) if plan.acts and plan.timed else ()
    cells = [
        made_with,
        " → ".join(f"{1000 * seconds:.0f}" for seconds in times if seconds) + ("\u00a0ms" if times else ""),
        plan.gain,
        mebibytes(tuning.peak_full, plan.peak),
        percent(tuning.tolerance),
        plan.reached,
    ]
    return [NAMES[kept.of], str(Grid(*tuning.size).pixels), *(cell or "–" for cell in cells)]


class _Mark(NamedTuple):
    """A point of the chart; `kind` is that of its dot: preset, plan, or chosen, the plan in force."""

    deviation: float
    speed_up: float
    label: str
    kind: str = "preset"


def chart(tuning: Tuning, presets: Sequence[PresetPoint] = ()) -> str:
    """Draw speed over deviation: the plans of a tuning as a line, presets beside them.

    The deviation of a preset is that of the U-Net's output at a few timesteps of the picture that was tuned on.
    """
    marks = [_Mark(each.deviation, each.speed_up, each.name) for each in presets]
    for plan in tuning.frontier:
        if plan.acts and plan.deviation is not None and plan.speed_up:
            label = f"{percent(plan.tolerance)}: {plan.gain}"
            marks.append(_Mark(plan.deviation, plan.speed_up, label, "chosen" if plan == tuning.plan else "plan"))
    if not marks:
        return ""
    axes = _Axes(marks)
    line = " ".join(f"{axes.x(m.deviation):.1f},{axes.y(m.speed_up):.1f}" for m in marks if m.kind != "preset")
    told = ", ".join(f"{m.label} at {percent(m.deviation)}" for m in marks)
    dots = (
        f'<circle class="agent-attention-{m.kind}" cx="{axes.x(m.deviation):.1f}" cy="{axes.y(m.speed_up):.1f}" '
        f'r="{6 if m.kind == "chosen" else 4}"/>'
        for m in marks
    )
    drawn = [*axes.drawn(), f'<polyline class="agent-attention-frontier" points="{line}"/>', *dots]
    return (
        f'<svg class="agent-attention-chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"Speed-up over deviation. {told}", quote=True)}">'
        f"{''.join([*drawn, *_labels(axes, marks)])}</svg>"
    )


def standalone(svg: str) -> str:
    """Make a file of its own of a chart."""
    styled = svg.replace(">", f"><style>{_STYLE}</style>", 1)
    return styled.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


class _Axes:
    """Scales of the chart: the deviation's is logarithmic."""

    def __init__(self, marks: Sequence[_Mark]) -> None:
        deviations = [m.deviation for m in marks if m.deviation > 0] or [0.01]
        self.low, self.high = 0.7 * max(min(deviations), 1e-4), 2 * max(*deviations, 1e-4)
        speeds = [1.0, *(m.speed_up for m in marks)]
        margin = 0.08 * max(max(speeds) - min(speeds), 0.05)
        self.slowest, self.fastest = min(speeds) - margin, max(speeds) + margin

    def x(self, deviation: float) -> float:
        share = math.log(max(deviation, self.low) / self.low) / math.log(self.high / self.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, speed_up: float) -> float:
        share = (speed_up - self.slowest) / (self.fastest - self.slowest)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def drawn(self) -> list[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = [_text(_LEFT - 6, _TOP - 12, "speed, without = 1×", "start")]
        for value in (tick for tick in _TICKS if self.low <= tick <= self.high):
            x = self.x(value)
            parts += [_line(x, x, _TOP, bottom), _text(x, bottom + 14, percent(value), "middle")]
        for value in _steps(self.slowest, self.fastest):
            y = self.y(value)
            parts += [_line(_LEFT, right, y, y), _text(_LEFT - 6, y + 4, f"{value:g}×", "end")]
        return [*parts, _text((_LEFT + right) / 2, _HEIGHT - 8, "deviation of the U-Net's output", "middle")]


def _line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="agent-attention-grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _steps(low: float, high: float) -> list[float]:
    """Choose three to six round values between two speeds."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf) if (high - low) / s <= 6)
    return [] if math.isinf(step) else [round(step * i, 4) for i in range(math.ceil(low / step), int(high / step) + 1)]


def _labels(axes: _Axes, marks: Sequence[_Mark]) -> Iterable[str]:
    """Write each label beside its point where it covers no other, a plan's below it, since the line rises from it."""
    points = [(axes.x(m.deviation), axes.y(m.speed_up)) for m in marks]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for mark, (x, y) in sorted(zip(marks, points, strict=True), key=lambda marked: marked[0].kind == "preset"):
        width = _LETTER * len(mark.label)
        sides = [("start", x + 9, x + 9 + width), ("end", x - 9 - width, x - 9)]
        shifts = range(4, 60, 9) if mark.kind == "preset" else range(_LINE, 60, 9)
        places = [
            (anchor, down, (left, y + down - 9, right, y + down + 2))
            for down in shifts
            for anchor, left, right in sides
            if (anchor == "end" or right < _WIDTH)
            and (mark.kind == "preset" or anchor == "start" or x + width > _WIDTH)
        ]
        free = (place for place in places if not any(map(partial(_overlap, place[2]), taken)))
        anchor, down, box = next(free, places[0])
        taken.append(box)
        yield _text(x + 9 if anchor == "start" else x - 9, y + down, mark.label, anchor, strong=mark.kind == "chosen")


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) have a point in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text(x: float, y: float, text: str, anchor: str, strong: bool = False) -> str:
    weight = ' font-weight="700"' if strong else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
