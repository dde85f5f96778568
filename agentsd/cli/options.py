"""Values of command-line options. Those of the settings are built from the table of settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import Setting, SettingError
from ..config import AgentConfig
from ..settings import SETTINGS, check, to_config

ROWS: Mapping[str, Setting] = {row.name: row for row in SETTINGS if row.option}
# What a sweep with a tuning may vary instead
TOLERANCE = Setting("tolerance", "number", 0.02, help="Limit on the deviation.")
AXES: Mapping[str, Setting] = {**ROWS, TOLERANCE.name: TOLERANCE}
_OPTION = {"seed": "partition-seed"}  # --seed is the seed of the picture
LARGEST = 8192


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the given settings with the defaults of the others."""
    return check({"enabled": True, **given})


def config_of(values: Mapping[str, Any]) -> AgentConfig:
    """Make the config from the settings."""
    config = to_config(values)
    assert config is not None  # the panel's switch is on
    return config


def option_name(row: Setting) -> str:
    return _OPTION.get(row.name, row.name.replace("_", "-"))


def reader(row: Setting) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        spaced = text.replace("-", " ")
        try:
            return row.parse(spaced if spaced in row.choices else text)
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Parse SETTING=VALUES to the setting's name in the table and its values."""
    option, equals, values = text.partition("=")
    by_option = {option_name(row): row for row in AXES.values()}
    row = by_option.get(option.strip().lstrip("-").replace("_", "-"))
    if row is None or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not SETTING=VALUES with one of {', '.join(by_option)}")
    read = reader(row)
    return row.name, tuple(read(value) for value in _spread(values))


def _spread(values: str) -> list[str]:
    """Expand "1,2,3" or "0.2:0.8:0.2" (both ends included) to values as text."""
    result = []
    for part in values.split(","):
        ends = part.strip().split(":")
        if len(ends) != 3:
            result.append(part.strip())
            continue
        try:
            first, last, step = (float(end) for end in ends)
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


def whole(name: str, low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{name} must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def real(name: str, low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{name} must be a number from {low} to {high}, got {text!r}")
        return value

    return read
