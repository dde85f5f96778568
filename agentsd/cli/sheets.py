"""Sheets of labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .distance import pixels

GAP, FONT_SIZE, LINE = 12, 15, 20
INK, PAPER = (24, 24, 27), (255, 255, 255)
AMPLIFIED = 4


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """Compute |a − b|, amplified 4 times: black where the pictures are equal."""
    return Image.fromarray(np.clip(AMPLIFIED * np.abs(pixels(a) - pixels(b)), 0, 255).astype(np.uint8))


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
) -> Image.Image:
    """Arrange pictures in rows and columns.

    Args:
        rows: pictures of the same size, row by row; None leaves a cell empty.
        columns: a heading for each column.
        labels: a label to the left of each row.
        captions: a text below each picture; may contain line breaks.
        title: a line at the top.
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
    for i, row in enumerate(captions):
        for j, text in enumerate(row):
            put(left + j * step_x, top + i * step_y + height + 2, text)
    return page


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge the picture by a whole factor, so that its longer side is close to `side` pixels; never shrink it."""
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
