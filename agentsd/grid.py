"""Cells of a grid of tokens: how many there are, how large, and which token of each is sampled. No torch."""

from __future__ import annotations

import math


def cells(length: int, side: int) -> int:
    """Number of cells of `side` tokens along `length` tokens; the last one may be cut short."""
    return -(-length // side)


def cell_side(agent_ratio: float, height: int, width: int, max_agents: int | None = None) -> int:
    """Side s of the square cell, in tokens, that one agent stands for.

    The power of two nearest, in log, to 1/√(1 − agent_ratio); raised until there are at most `max_agents` cells.
    """
    s = 2 ** math.floor(0.5 - 0.5 * math.log2(1 - agent_ratio))
    while max_agents is not None and cells(height, s) * cells(width, s) > max_agents:
        s *= 2
    return s


def sampled(length: int, side: int) -> range:
    """Positions along one axis that are sampled: the middle of each cell, where the cell reaches it."""
    return range((min(side, length) - 1) // 2, length, side)


def destinations(sx: int, sy: int, height: int, width: int) -> int:
    """Number of destination tokens of the partition: one for each whole sx × sy cell."""
    return (height // sy) * (width // sx)
