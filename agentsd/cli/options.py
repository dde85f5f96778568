"""Values of command-line options. Those of the settings are built from the table of settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import Setting, SettingError
from ..settings import SETTINGS

ROWS: Mapping[str, Setting] = {row.name: row for row in SETTINGS if row.option}
# What a sweep with a tuning may vary instead
TOLERANCE = Setting("tolerance", "number", 0.02)
AXES: Mapping[str, Setting] = {**ROWS, TOLERANCE.name: TOLERANCE}
LARGEST = 8192


def option_name(row: Setting) -> str:
    # --seed is the seed of the picture
    return "partition-seed" if row.name == "seed" else row.name.replace("_", "-")


def reader(row: Setting) -> Callable[[str], Any]:
    """Make argparse's type of a setting."""

    def read(text: str) -> Any:
        spaced = text.replace("-", " ")
        try:
            return row.parse(spaced if spaced in row.choices else text)
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def whole(name: str, low: int, high: int) -> Callable[[str], Any]:
    return reader(Setting(name, "whole", low, low=low, high=high))


def real(name: str, low: float, high: float) -> Callable[[str], Any]:
    return reader(Setting(name, "number", low, low=low, high=high))


def axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Parse SETTING=VALUES to the setting's name in the table and its values."""
    option, equals, values = text.partition("=")
    by_option = {option_name(row): row for row in AXES.values()}
    row = by_option.get(option.strip().lstrip("-").replace("_", "-"))
    if row is None or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not SETTING=VALUES with one of {', '.join(by_option)}")
    return row.name, tuple(map(reader(row), _spread(values)))


def _spread(values: str) -> list[str]:
    """Expand "1,2,3" or "0.2:0.8:0.2" (both ends included) to values as text."""
    result = []
    for part in map(str.strip, values.split(",")):
        ends = part.split(":")
        if len(ends) != 3:
            result.append(part)
            continue
        try:
            first, last, step = map(float, ends)
            count = int((last - first) / step + 1e-9) + 1
        except (ValueError, ZeroDivisionError, OverflowError):
            count = 0
        if not 1 <= count <= 1000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range FIRST:LAST:STEP of 1 to 1000 values")
        result += [f"{first + i * step:.10g}" for i in range(count)]
    return result


def size(text: str) -> tuple[int, int]:
    """Parse "512" or "768x512" (width × height) to (height, width)."""
    match = re.fullmatch(r"(\d+)(?:\s*[x×*]\s*(\d+))?", text.strip())
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or not all(16 <= side <= LARGEST and side % 8 == 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"a size must be WIDTHxHEIGHT in pixels, multiples of 8 from 16 to {LARGEST}, got {text!r}"
        )
    return sides[-1], sides[0]
