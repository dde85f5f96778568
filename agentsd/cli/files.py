"""Write files atomically, pictures that carry their settings, and tables."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import CommandError

OUTPUTS = Path("outputs")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Let `write` fill a file that appears under its name only once it is complete; return the path.

    Raises:
        CommandError: the file cannot be written; the message says why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # gone after Ctrl-C, too
            unfinished = Path(folder, path.name)
            with unfinished.open("wb") as file:
                write(file)
            os.replace(unfinished, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    return path


def save_picture(path: Path, picture: Image.Image, record: Mapping[str, Any], infotext: str = "") -> Path:
    """Save a PNG with its settings: as JSON under "agentsd", as the WebUI's infotext under "parameters"."""
    info = PngInfo()
    info.add_text("agentsd", json.dumps(record))
    if infotext:
        info.add_text("parameters", infotext)
    return write_whole(path, lambda file: picture.save(file, format="PNG", pnginfo=info))


def read_record(path: Path) -> dict[str, Any]:
    """Read the settings that `save_picture` wrote."""
    with Image.open(path) as picture:
        return json.loads(picture.info["agentsd"])


def save_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Save a CSV file, UTF-8; None is an empty field."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return write_whole(path, lambda file: file.write(text.getvalue().encode()))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns, numbers to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [all(text[:1].isdigit() or text in ("", "–") for text in column) for column in zip(*rows, strict=True)]
    for row in table:
        cells = zip(row, widths, right, strict=True)
        print("  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in cells).rstrip())


def fresh(stem: str, suffix: str = ".png") -> Path:
    """Return an unused path in the output folder."""
    path, number = OUTPUTS / f"{stem}{suffix}", 2
    while path.exists():
        path, number = OUTPUTS / f"{stem}-{number}{suffix}", number + 1
    return path


def slug(text: str) -> str:
    """Make a short file name from a text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "picture"
