"""Grids of tokens: their sizes, their cells, and the token sampled from each cell. Imports no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

# Pixels per position of the latent, along one side
FACTOR = 8

# (top, left, bottom, right) in tokens, bottom and right excluded
Span = tuple[int, int, int, int]

# Side of a window of queries in tokens, and the ring of cells around it whose agents take part in its fit and choice.
WINDOW, HALO = 16, 1


def cells(length: int, side: int) -> int:
    """Count the cells of `side` tokens along `length` tokens; the last may be cut short."""
    return -(-length // side)


class Grid(NamedTuple):
    """Size of a grid of tokens, or of the positions of a latent. It compares and unpacks as (height, width)."""

    height: int
    width: int

    @classmethod
    def of_pixels(cls, height: int, width: int) -> Grid:
        """Return the latent of an image of `height` × `width` pixels."""
        return cls(height // FACTOR, width // FACTOR)

    @property
    def pixels(self) -> Grid:
        """The image of a latent of this size."""
        return Grid(FACTOR * self.height, FACTOR * self.width)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.height * self.width

    def at(self, level: int) -> Grid:
        """Return the tokens of a layer at this level of the U-Net (1, 2, 4 …), for a latent of this size."""
        return self.cells((level, level))

    def patches(self, side: int) -> Grid:
        """Return the number of whole patches of `side` × `side` positions along each side."""
        return Grid(self.height // side, self.width // side)

    def level_of(self, layer: tuple[int, int]) -> int:
        """Return the level of a layer of (height, width) tokens: the power of two nearest to the ratio of the sides."""
        return 2 ** max(0, round(0.5 * math.log2(self.tokens / math.prod(layer))))

    def cells(self, cell: tuple[int, int]) -> Grid:
        """Return the number of cells of (height, width) tokens along each side; the last may be cut short."""
        return Grid(cells(self.height, cell[0]), cells(self.width, cell[1]))

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


def cell_side(agent_ratio: float, height: int, width: int, max_agents: int | None = None) -> int:
    """Return the side, in tokens, of the square cell of one agent.

    The power of two nearest, in log, to 1/√(1 − agent_ratio), doubled until there are at most `max_agents` cells.
    """
    s = 2 ** math.floor(0.5 - 0.5 * math.log2(1 - agent_ratio))
    while max_agents is not None and Grid(height, width).cells((s, s)).tokens > max_agents:
        s *= 2
    return s


def landmark_cell(agent_ratio: float, height: int, width: int, fewest: int, most: int) -> tuple[tuple[int, int], int]:
    """Return the (height, width) in tokens of the cell that one sampled token stands for, and the number of samples.

    The cell of `cell_side`, halved while it gives fewer than `fewest` samples; then doubled along one axis after the
    other while it gives more than `most`.
    """
    grid, side = Grid(height, width), cell_side(agent_ratio, height, width)
    while side > 1 and grid.cells((side, side)).tokens < fewest:
        side //= 2
    sy = sx = side
    while grid.cells((sy, sx)).tokens > most:
        sy, sx = (sy, 2 * sx) if sy == sx else (2 * sy, sx)
    return (sy, sx), grid.cells((sy, sx)).tokens


def landmark_places(size: tuple[int, int], cell: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (row, column) of one token of each cell, in row-major order of the cells.

    Its row in the cell moves on from one column of cells to the next, and its column from one row to the next, as in a
    Latin square: each place in a cell is taken equally often, so that a texture cannot hide between them.
    """
    (height, width), (sy, sx) = size, cell
    return [
        (min(top + (left // sx + 1) % sy, height - 1), min(left + (top // sy + 1) % sx, width - 1))
        for top in range(0, height, sy)
        for left in range(0, width, sx)
    ]


def destinations(sx: int, sy: int, height: int, width: int) -> int:
    """Count the destination tokens of the partition: one per whole sx × sy cell."""
    return (height // sy) * (width // sx)
