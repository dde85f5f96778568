"""What is measured: U-Nets at sizes, and the presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .models import LAYOUTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One U-Net at one size, the methods to compare there, and the rounds that each of them is to have."""

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
        layout = LAYOUTS[self.layout].label
        last = ", channels last" if self.channels_last else ""
        return f"{layout}, {height} × {width}, batch {self.batch}, {self.dtype}{last}"


GRID = ("sdpa", "limit", "grid8", "grid4")
PAIR = ("paper", "tomesd.4")  # at the same ratio
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
# at 512², 768² and 1024² the panel's defaults are grid agents of 4 × 4 cells
SMALL = (64, 128, 256, 384, 640)


def _square(side: int, methods: tuple[str, ...], rounds: int, layout: str = "sd15", **more: object) -> Case:
    return Case(layout, (side, side), methods, rounds=rounds, **more)


# Each by itself; "readme" is all of them, what tells most in the shortest time first.
# What has few rounds comes first, so that its rounds count for the methods that get more of them.
_PARTS: dict[str, Callable[[], list[Case]]] = {
    "512": lambda: [_square(512, ALL, 4), _square(512, (*MAIN, "reuse"), 10)],
    # idle and unpatched alternate alone, and often: their difference is below 1 %
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
    """The preset's cases, with at most so many rounds; peers are measured in the first, which has time for them."""
    first, *rest = PRESETS[name]()
    cases = [replace(first, methods=first.methods + peers), *rest]
    return [replace(c, dtype=dtype or c.dtype, rounds=min(c.rounds, rounds or c.rounds)) for c in cases]
