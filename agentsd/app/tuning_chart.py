"""Tunings as HTML: a table of what was asked for and reached, and a chart of speed over deviation.

The chart is an SVG in the page's own colours; `standalone` gives it colours of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from ..attention.grid import Grid
from ..settings import tunings
from ..tuning.result import Tuning
from ..words import mebibytes, percent

if TYPE_CHECKING:
    from ..tuning.replay import Compared
    from .kept_tunings import Kept

HEAD = ("Pass", "Size", "Made with", "U-Net call", "Speed", "Peak memory", "Asked", "Deviation")
NAMES = {tunings.FIRST: "First pass", tunings.HIRES: "Hires pass", tunings.IMG2IMG: "img2img"}
_WIDTH, _HEIGHT, _LINE = 500, 250, 13
_LEFT, _RIGHT, _TOP, _BOTTOM, _LABELS = 52, 340, 26, 210, 362  # of the area between the axes, and left of the labels
_TICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf)
_STYLE = (
    "text{font:11px sans-serif}.agent-attention-grid{stroke:#ddd}.agent-attention-frontier{fill:none;stroke:#2563eb;"
    "stroke-width:2}.agent-attention-leader{fill:none;stroke:#999;stroke-width:.7}.agent-attention-plan{fill:#2563eb}"
    ".agent-attention-chosen{fill:#dc2626}.agent-attention-preset{fill:#78716c}"
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
    return f'<div class="agent-attention-scroll">{tabled(HEAD, map(row, kept))}</div>'


def tabled(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table of texts."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in each)}</tr>" for each in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table>"


def row(kept: Kept) -> list[str]:
    """Format a tuning as a row under `HEAD`."""
    tuning, plan = kept.tuning, kept.tuning.plan
    made_with = ", ".join(f"{name} {value}" for name, value in tuning.conditions.items() if value and name != "pass")
    times = [tuning.seconds_full, tuning.seconds] if plan.acts and plan.timed else []
    seconds = " → ".join(f"{1000 * each:.0f}" for each in times if each) + ("\u00a0ms" if times else "")
    memory, asked = mebibytes(tuning.peak_full, plan.peak), percent(tuning.tolerance)
    cells = (made_with, seconds, plan.gain, memory, asked, plan.reached)
    return [NAMES[kept.of], str(Grid(*tuning.size).pixels), *(cell or "–" for cell in cells)]


class _Mark(NamedTuple):
    """A point of the chart; `kind` is that of its dot: preset, plan, or chosen, the plan in force."""

    deviation: float
    speed_up: float
    label: str
    kind: str = "preset"


def chart(tuning: Tuning, presets: Mapping[str, Compared]) -> str:
    """Draw speed over deviation: the plans of a tuning as a line, presets beside them."""
    marks = [_Mark(each.deviation, 1 / each.time, name) for name, each in presets.items()]
    for plan in tuning.frontier:
        if plan.acts and plan.deviation is not None and plan.speed_up:
            label = f"{percent(plan.tolerance)}: {plan.gain}"
            marks.append(_Mark(plan.deviation, plan.speed_up, label, "chosen" if plan == tuning.plan else "plan"))
    if not marks:
        return ""
    axes = _Axes(marks)
    points = [(m, axes.x(m.deviation), axes.y(m.speed_up)) for m in marks]
    line = " ".join(f"{x:.1f},{y:.1f}" for m, x, y in points if m.kind != "preset")
    dots = (_tag("circle", m.kind, cx=x, cy=y, r=6 if m.kind == "chosen" else 4) for m, x, y in points)
    told = ", ".join(f"{m.label} at {percent(m.deviation)}" for m in marks)
    drawn = "".join([*axes.drawn(), *_labels(points), _tag("polyline", "frontier", points=line), *dots])
    about = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": f"Speed-up over deviation. {told}"}
    return _tag("svg", "chart", drawn, **about)


def standalone(svg: str) -> str:
    """Make a file of its own of a chart."""
    styled = svg.replace(">", f"><style>{_STYLE}</style>", 1)
    return styled.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _tag(name: str, kind: str = "", inside: str = "", **attributes: Any) -> str:
    """Make an element of a class of ours; numbers have one decimal."""
    given = {"class": f"agent-attention-{kind}"} if kind else {}
    given |= {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in attributes.items()}
    written = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    return f"<{name}{written}>{inside}</{name}>"


def _text(x: float, y: float, text: str, anchor: str, strong: bool = False) -> str:
    style = {"text-anchor": anchor, "font-weight": 700 if strong else 400}
    return _tag("text", "", escape(text), x=x, y=y, **style)


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
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(self, speed_up: float) -> float:
        return _BOTTOM - (speed_up - self.slowest) / (self.fastest - self.slowest) * (_BOTTOM - _TOP)

    def drawn(self) -> Iterator[str]:
        yield _text(_LEFT - 6, _TOP - 12, "speed, without = 1×", "start")
        for x, value in ((self.x(tick), tick) for tick in _TICKS if self.low <= tick <= self.high):
            yield _tag("line", "grid", x1=x, x2=x, y1=_TOP, y2=_BOTTOM)
            yield _text(x, _BOTTOM + 14, percent(value), "middle")
        step = next(step for step in _STEPS if (self.fastest - self.slowest) / step <= 6)  # three to six lines
        for i in range(math.ceil(self.slowest / step), int(self.fastest / step) + 1) if step < math.inf else ():
            y = self.y(step * i)
            yield _tag("line", "grid", x1=_LEFT, x2=_RIGHT, y1=y, y2=y)
            yield _text(_LEFT - 6, y + 4, f"{round(step * i, 4):g}×", "end")
        yield _text((_LEFT + _RIGHT) / 2, _HEIGHT - 8, "deviation of the U-Net's output", "middle")


def _labels(points: Iterable[tuple[_Mark, float, float]]) -> Iterator[str]:
    """Write the labels as a column, in the order of their dots from the top, each with a line from its dot."""
    at, ordered = -math.inf, sorted(points, key=lambda point: (point[2], -point[1]))
    for i, (mark, x, y) in enumerate(ordered, 1):
        # beside the dot, unless those above or below need the room
        at = max(at + _LINE, min(y, _BOTTOM - _LINE * (len(ordered) - i)))
        yield _tag("polyline", "leader", points=f"{x:.1f},{y:.1f} {_RIGHT},{at:.1f} {_LABELS - 4},{at:.1f}")
        yield _text(_LABELS, at + 4, mark.label, "start", mark.kind == "chosen")
