"""Write files atomically, and pictures that carry their settings."""

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
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException as error:  # Ctrl-C included
        os.unlink(unfinished)
        if isinstance(error, OSError):
            raise CommandError(f"cannot write {path}: {error.strerror}") from error
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
        return json.loads(picture.text["agentsd"])


def save_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Save a CSV file, UTF-8."""

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text).writerows([header, *rows])
        text.flush()
        text.detach()

    return write_whole(path, write)


def fresh(stem: str, suffix: str = ".png") -> Path:
    """Return an unused path in the output folder."""
    path = OUTPUTS / f"{stem}{suffix}"
    number = 2
    while path.exists():
        path = OUTPUTS / f"{stem}-{number}{suffix}"
        number += 1
    return path


def slug(text: str) -> str:
    """Make a short file name from a text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "picture"
