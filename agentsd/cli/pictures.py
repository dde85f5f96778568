"""Pictures: the distance between two, sheets of several, and files that carry how a picture was made."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..settings import infotext
from ..words import aligned
from .errors import told

OUTPUTS = Path("outputs")
GAP, FONT_SIZE, LINE = 12, 15, 20
INK, PAPER = (24, 24, 27), (255, 255, 255)
AMPLIFIED = 4


@dataclass(frozen=True)
class Distance:
    """Distance between two RGB pictures of one size."""

    rmse: float  # root mean square difference of the RGB values, 0–255
    psnr: float | None  # peak signal-to-noise ratio in dB; None for equal pictures, since JSON knows no infinity
    ssim: float | None  # structural similarity (Wang et al., IEEE TIP 2004), 1 for equal pictures; needs scikit-image

    def __str__(self) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.3f}"
        return "no difference" if self.psnr is None else f"PSNR {self.psnr:.1f} dB{ssim}"


def distance(a: Image.Image, b: Image.Image) -> Distance:
    x, y = _pixels(a), _pixels(b)
    rmse, ssim = float(np.sqrt(np.mean((x - y) ** 2))), None
    with suppress(ImportError):
        from skimage.metrics import structural_similarity

        # the paper's constants: Gaussian windows of σ = 1.5, population covariance
        constants = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = round(float(structural_similarity(x, y, channel_axis=2, data_range=255, **constants)), 5)
    return Distance(round(rmse, 4), round(20 * math.log10(255 / rmse), 3) if rmse else None, ssim)


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
    columns: Sequence[str],
    captions: Sequence[Sequence[str]],
    title: str,
    labels: Sequence[str] = (),
) -> Image.Image:
    """Arrange pictures of one size, None leaving a cell empty.

    Below the title are the columns' headings; a label stands to the left of each row, a caption below each picture.
    """
    font = ImageFont.load_default(FONT_SIZE)
    lines = [*columns, *(line for row in captions for text in row for line in text.split("\n"))]
    width, height = max(picture.size for row in rows for picture in row if picture is not None)
    left = GAP + max((int(font.getlength(label)) + GAP for label in labels), default=0)
    step_x = GAP + max(width, *(int(font.getlength(line)) for line in lines))
    step_y = GAP + height + LINE * max(text.count("\n") + 1 for row in captions for text in row)
    top = GAP + 2 * LINE
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
    for i, (pictures, texts) in enumerate(zip(rows, captions, strict=True)):
        for j, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            if picture is not None:
                page.paste(picture.convert("RGB"), (left + j * step_x, top + i * step_y))
            put(left + j * step_x, top + i * step_y + height + 2, text)
    return page


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file that appears under its name only once it is complete; a CommandError says why it cannot be."""
    with told(f"cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:  # gone after Ctrl-C, too
            unfinished = Path(folder, path.name)
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
    return path


def save_picture(path: Path, picture: Image.Image, made: Mapping[str, Any]) -> Path:
    """Save a PNG with how it was made: as JSON under "agentsd", as the WebUI's infotext under "parameters"."""
    info, data = PngInfo(), io.BytesIO()
    info.add_text("agentsd", json.dumps(made))
    info.add_text("parameters", infotext_of(made))
    picture.save(data, format="PNG", pnginfo=info)
    return write_whole(path, data.getvalue())


def infotext_of(made: Mapping[str, Any]) -> str:
    """Format a record as the WebUI's infotext, for its "PNG Info" tab."""
    negative = [f"Negative prompt: {made['negative_prompt']}"] if made["negative_prompt"] else []
    names = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance", "Seed": "seed"}
    parts = {label: made[name] for label, name in names.items()}
    parts["Size"] = f"{made['width']}x{made['height']}"
    if made["agent_attention"] is not None:
        parts |= infotext.entries(made["agent_attention"])
    return "\n".join([made["prompt"], *negative, ", ".join(f"{key}: {value}" for key, value in parts.items())])


def save_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Save a CSV file, UTF-8; None is an empty field."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return write_whole(path, text.getvalue().encode())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n".join(aligned(header, rows)))


def target(out: str | None, stem: str, suffix: str = ".png") -> Path:
    """Where to write: the command line's --out, or an unused path in the output folder."""
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    paths = (OUTPUTS / f"{name}{suffix}" for name in names)
    return Path(out) if out else next(path for path in paths if not path.exists())
