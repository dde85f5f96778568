"""The chart of a tuning: speed over deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from ..tuning.replay import Compared
from ..tuning.result import Tuning
from ..tuning.table import headline, percent
from .sheets import FONT_SIZE, INK, PAPER

SIZE, FRAME = (760, 460), (70, 60, 740, 400)  # left, top, right, bottom
GRID, LINE, OTHERS, CHOSEN = (225, 225, 228), (37, 99, 235), (120, 113, 108), (220, 38, 38)


def chart(tuning: Tuning, others: Mapping[str, Compared]) -> Image.Image:
    """Draw a tuning's frontier as a line, the tuning on it, and other settings as points.

    Args:
        tuning: the tuning.
        others: what other settings do, by name; their seconds are relative to those without.
    """
    full = tuning.seconds_full or 1.0
    line = [(max(p.predicted, 1e-4), full / p.seconds) for p in tuning.frontier if p.seconds]
    points = {name: (max(c.deviation, 1e-4), 1 / c.seconds) for name, c in others.items() if c.seconds}
    reached = tuning.measured if tuning.measured is not None else tuning.predicted
    chosen = [(max(reached, 1e-4), tuning.speed_up)] if reached is not None and tuning.speed_up else []
    axes = _Axes([*line, *points.values(), *chosen])
    image = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    axes.draw(draw, font)
    at = [axes.at(*point) for point in sorted(line)]
    draw.line(at, fill=LINE, width=2)
    for x, y in at:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=LINE)
    for name, point in points.items():
        x, y = axes.at(*point)
        draw.rectangle((x - 4, y - 4, x + 4, y + 4), fill=OTHERS)
        draw.text((min(x + 8, SIZE[0] - 10 - font.getlength(name)), y + 2), name, OTHERS, font)
    for x, y in (axes.at(*point) for point in chosen):
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=CHOSEN, width=3)
    # the font that comes with Pillow has neither of these signs
    draw.text((20, 16), headline(tuning).replace("×", "x").replace("→", "to"), INK, font)
    return image


class _Axes:
    """Deviation to the right, in log; speed upwards."""

    def __init__(self, points: list[tuple[float, float]]) -> None:
        deviations, speeds = zip(*points, strict=True) if points else ((0.01,), (1.0,))
        self.low, self.high = math.floor(math.log10(min(deviations))), math.ceil(math.log10(max(deviations)) + 1e-9)
        self.top = max(1.25, 1.08 * max(speeds))
        self.bottom = min(1.0, min(speeds)) - 0.05

    def at(self, deviation: float, speed: float) -> tuple[float, float]:
        left, top, right, bottom = FRAME
        x = (math.log10(deviation) - self.low) / (self.high - self.low)
        y = (speed - self.bottom) / (self.top - self.bottom)
        return left + x * (right - left), bottom - y * (bottom - top)

    def draw(self, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont) -> None:
        left, top, right, bottom = FRAME
        for power in range(self.low, self.high + 1):
            x, _ = self.at(10.0**power, 1.0)
            draw.line((x, top, x, bottom), fill=GRID)
            draw.text((x - 16, bottom + 6), percent(10.0**power), INK, font)
        step = 0.1 if self.top < 1.6 else 0.5
        for i in range(math.ceil(self.bottom / step), math.floor(self.top / step) + 1):
            _, y = self.at(10.0**self.low, i * step)
            draw.line((left, y, right, y), fill=GRID)
            draw.text((left - 50, y - 8), f"{i * step:.1f}x", INK, font)
        draw.text((left, bottom + 30), "deviation of the U-Net's output", INK, font)
        draw.text((left - 50, top - 20), "speed of a U-Net call", INK, font)
