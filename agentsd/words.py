"""Formats of figures that people read. Imports nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIGURE = re.compile("[0-9.e+]*x?|–")


def counted(count: int, plural: str) -> str:
    """Format a count with a plural noun, such as "256 agents" or "1 agent"."""
    singular = f"{plural[:-3]}y" if plural.endswith("ies") else plural.removesuffix("s")
    return f"{count} {singular if count == 1 else plural}"


def percent(share: float) -> str:
    """Format a share as a percentage of two digits or more, such as "1.4%"."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 or value == int(value) else f"{value:.2g}%"


def mebibytes(full: int | None, ours: int | None) -> str:
    """Format peak memory without and with us, in bytes, such as "3100 → 2900 MiB"; empty if it is unknown."""
    return "" if full is None or ours is None else f"{full / 2**20:.0f} → {ours / 2**20:.0f}\u00a0MiB"


def duration(seconds: float) -> str:
    """Format seconds, such as "40 s" or "3 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def error_of_ours(error: Exception) -> str:
    """Name an error of our own, which costs nobody an image."""
    return f"an error of ours: {type(error).__name__}: {error}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Arrange rows as lines of aligned columns, those of figures to the right."""
    columns = []
    for head, *texts in zip(header, *rows, strict=True):
        figures, width = all(_FIGURE.fullmatch(text) for text in texts), max(map(len, (head, *texts)))
        columns.append([text.rjust(width) if figures else text.ljust(width) for text in (head, *texts)])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def ascii_of(text: str) -> str:
    """Write a text in ASCII, for consoles that know few other letters."""
    for sign, plain in (("→", "->"), ("×", "x"), ("–", "-"), ("\u00a0", " ")):
        text = text.replace(sign, plain)
    return text.encode("ascii", "replace").decode()
