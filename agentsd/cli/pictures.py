"""Pictures: the distance between two, sheets of several, and files that carry how a picture was made."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .errors import CommandError

OUTPUTS = Path("outputs")
GAP, FONT_SIZE, LINE = 12, 15, 20
INK, PAPER = (24, 24, 27), (255, 255, 255)
AMPLIFIED = 4


@dataclass(frozen=True)
class Distance:
    """Distance between two pictures of the same size."""

    rmse: float  # root mean square difference of the RGB values, 0–255
    ssim: float | None  # structural similarity (Wang et al., IEEE TIP 2004), 1 for equal pictures; needs scikit-image

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
        return 20 * math.log10(255 / self.rmse) if self.rmse else math.inf

    def __str__(self) -> str:
        if self.rmse == 0:
            return "no difference"
        return f"PSNR {self.psnr:.1f} dB" + ("" if self.ssim is None else f", SSIM {self.ssim:.3f}")

    def record(self) -> dict[str, float | None]:
        """The figures for JSON and CSV, which have no infinity: equal pictures get no PSNR."""
        psnr = round(self.psnr, 3) if self.rmse else None
        return {"rmse": round(self.rmse, 4), "psnr": psnr, "ssim": self.ssim and round(self.ssim, 5)}


def distance(a: Image.Image, b: Image.Image) -> Distance:
    """Measure the distance between two RGB pictures of one size."""
    x, y = _pixels(a), _pixels(b)
    if x.shape != y.shape:
        raise ValueError(f"pictures must have the same size, got {a.size} and {b.size}")
    ssim = None
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        pass
    else:  # the paper's constants: Gaussian windows of σ = 1.5, population covariance
        constants = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = float(structural_similarity(x, y, channel_axis=2, data_range=255, **constants))
    return Distance(float(np.sqrt(np.mean((x - y) ** 2))), ssim)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """Compute |a − b|, amplified 4 times: black where the pictures are equal."""
    return Image.fromarray(np.clip(AMPLIFIED * np.abs(_pixels(a) - _pixels(b)), 0, 255).astype(np.uint8))


def _pixels(picture: Image.Image) -> np.ndarray:
    """Return the RGB values (height, width, 3) as floats, 0–255."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge the picture by a whole factor, so that its longer side is close to `side` pixels; never shrink it."""
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
) -> Image.Image:
    """Arrange pictures of one size, None leaving a cell empty.

    Below the title are the columns' headings; a label stands to the left of each row, a caption below each picture.
    """
    font = ImageFont.load_default(FONT_SIZE)
    lines = [line for row in captions for text in row for line in text.split("\n")]
    width, height = max((p.size for row in rows for p in row if p is not None), default=(1, 1))
    left = GAP + max((int(font.getlength(label)) + GAP for label in labels), default=0)
    below = LINE * max((text.count("\n") + 1 for row in captions for text in row if text), default=0)
    step_x = GAP + max(width, *(int(font.getlength(text)) for text in (*columns, *lines)))
    step_y = height + below + GAP
    top = GAP + LINE * bool(title) + LINE * bool(columns)
    across = max(left + max(map(len, rows)) * step_x, 2 * GAP + int(font.getlength(title)))
    page = Image.new("RGB", (across, top + len(rows) * step_y), PAPER)
    draw = ImageDraw.Draw(page)

    def put(x: int, y: int, text: str) -> None:
        draw.multiline_text((x, y), text, INK, font, spacing=LINE - FONT_SIZE)

    put(GAP, GAP // 2, title)
    for j, heading in enumerate(columns):
        put(left + j * step_x, top - LINE, heading)
    for i, label in enumerate(labels):
        put(GAP, top + i * step_y + height // 2 - LINE // 2, label)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is not None:
                page.paste(picture.convert("RGB"), (left + j * step_x, top + i * step_y))
    for i, texts in enumerate(captions):
        for j, text in enumerate(texts):
            put(left + j * step_x, top + i * step_y + height + 2, text)
    return page


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file that appears under its name only once it is complete; a CommandError says why it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # gone after Ctrl-C, too
            unfinished = Path(folder, path.name)
            unfinished.write_bytes(data)
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
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=info)
    return write_whole(path, data.getvalue())


def save_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Save a CSV file, UTF-8; None is an empty field."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return write_whole(path, text.getvalue().encode())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(text[:1].isdigit() or text in ("", "–") for text in column) for column in zip(*rows, strict=True)]
    for row in (header, *rows):
        cells = zip(row, widths, right, strict=True)
        print("  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in cells).rstrip())


def target(out: str | None, stem: str, suffix: str = ".png") -> Path:
    """Where to write: the command line's --out, or an unused path in the output folder."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    paths = (OUTPUTS / f"{name}{suffix}" for name in names)
    return Path(out) if out else next(path for path in paths if not path.exists())
