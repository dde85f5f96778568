"""The cases to measure, one U-Net at one size each, and the presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .models import LAYOUTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One U-Net at one size, and the methods to compare there.

    Attributes:
        layout: the U-Net, by its key in `LAYOUTS`.
        size: (height, width) of the image in pixels.
        methods: the methods, by their names.
        batch: rows of the batch.
        dtype: dtype of the U-Net.
        rounds: rounds that each method gets.
        channels_last: whether weights and latents have the channels-last layout.
    """

    layout: str
    size: tuple[int, int]
    methods: tuple[str, ...]
    batch: int = 2
    dtype: str = "bfloat16"
    rounds: int = 10
    channels_last: bool = False

    @property
    def name(self) -> str:
        height, width = self.size
        label = LAYOUTS[self.layout].label
        memory_format = ", channels last" if self.channels_last else ""
        return f"{label}, {width}×{height}, batch {self.batch}, {self.dtype}{memory_format}"


GRID = ("sdpa", "limit", "grid8", "grid4")
PAIR = ("paper", "tomesd.4")  # both merge the same share of the tokens
MAIN = (*GRID, *PAIR)
OTHERS = ("corrected8", "corrected4", "pool2", "tomesd.3", "tomesd.5")
ALL = (
    *GRID,
    "naive",
    "panel",
    "similarity",
    "paper",
    "reuse",
    "corrected8",
    "corrected4",
    "pool2",
    "pool4",
    "tomesd.3",
    "tomesd.4",
    "tomesd.5",
)
DEEP = ("sdpa", "limit2", "grid8d2", "limit4", "grid8d4")
LINEAR = ("limit8", "grid64d8")
# Sides of the small images. At 512×512, 768×768 and 1024×1024 the panel's defaults are corrected agents of 4×4 cells.
SMALL = (64, 128, 256, 384, 640)


def _square(side: int, methods: tuple[str, ...], rounds: int, layout: str = "sd15", **settings: object) -> Case:
    return Case(layout, (side, side), methods, rounds=rounds, **settings)


# The parts of "readme"; those that tell most in the least time come first. Within a part the case with few rounds of
# many methods comes first: its rounds also count towards the next case.
_PARTS: dict[str, Callable[[], list[Case]]] = {
    "512": lambda: [_square(512, ALL, 4), _square(512, (*MAIN, "reuse"), 10)],
    # many rounds, and no other method between the two: they differ by less than 1%
    "idle": lambda: [_square(64, ("sdpa", "idle"), 400, "mini"), _square(512, ("sdpa", "idle"), 20)],
    "never-slower": lambda: [_square(side, ("sdpa", "panel"), 20 if side < 256 else 10) for side in SMALL],
    "768": lambda: [_square(768, (*MAIN, *OTHERS), 3), _square(768, MAIN, 10)],
    "1024": lambda: [_square(1024, (*MAIN, *OTHERS), 2), _square(1024, MAIN, 10)],
    "linear": lambda: [_square(512, LINEAR, 3), _square(1024, LINEAR, 2), _square(2048, ("sdpa", "panel", *LINEAR), 1)],
    "sd21": lambda: [_square(512, GRID, 5, "sd21")],
    "dtypes": lambda: [
        _square(512, GRID, 3, channels_last=True),
        _square(512, GRID, 3, dtype="float32"),
        _square(512, GRID, 3, dtype="float16"),
    ],
    "sdxl": lambda: [_square(1024, DEEP, 3, "sdxl")],
}
PRESETS: dict[str, Callable[[], list[Case]]] = {
    **_PARTS,
    "readme": lambda: [case for part in _PARTS.values() for case in part()],
    "quick": lambda: [_square(512, (*GRID, "paper", "tomesd.5"), 2)],
}


def preset(name: str, dtype: str | None, rounds: int | None, peers: tuple[str, ...]) -> list[Case]:
    """The preset's cases, with at most `rounds` rounds each; peers are measured in the first case only."""
    first, *rest = PRESETS[name]()
    cases = [replace(first, methods=first.methods + peers), *rest]
    return [replace(c, dtype=dtype or c.dtype, rounds=min(c.rounds, rounds or c.rounds)) for c in cases]
