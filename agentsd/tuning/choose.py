"""Choose the settings of each block: the least time under a limit on the deviation. Imports no torch.

Errors of single blocks add in quadrature (docs/design.md), so a plan keeps a tolerance if the squares of the deviations
that its blocks cause sum to at most the tolerance's square, under every constraint: one for each recorded call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

# Bisections of the price of deviation; more change nothing.
_BISECTIONS = 50
# Pairs of options above which exchanges take too long: with many blocks, they also gain little.
_MAX_PAIRS = 20_000
# Seconds that a switch must save: rounding errors are no gain.
_MIN_SAVING = 1e-9


@dataclass(frozen=True)
class Option:
    """One way to run a block."""

    candidate: int  # its number, from 1; 0 is full attention
    seconds: float  # of the block's self-attention
    squares: tuple[float, ...]  # squared deviation of the U-Net's output that it causes, one for each constraint


def choose(blocks: Sequence[Sequence[Option]], tolerances: Sequence[float], worth: float = 0.0) -> list[Option]:
    """Choose an option for each block, so that the blocks take the least time and every constraint holds.

    By a price for deviation: each block takes the option with the least seconds + price · squares, and the price is
    the lowest at which all constraints hold. What is left over is then given to single blocks, and to pairs of them.

    Args:
        blocks: options of each block; each has one without deviation.
        tolerances: largest deviation allowed under each constraint.
        worth: seconds that using up a tolerance has to save. Deviation that saves less in proportion is not chosen.
    """
    limits = [tolerance**2 for tolerance in tolerances]
    priced = [[_Priced(option, limits, worth) for option in _undominated(options)] for options in blocks]
    return [each.option for each in _chosen(priced, limits)]


def deviation(chosen: Sequence[Option], constraint: int) -> float:
    """Predict the deviation of the U-Net's output under one constraint."""
    return math.sqrt(sum(option.squares[constraint] for option in chosen))


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Leave out options beside which another takes no more time and deviates no more under any constraint."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.seconds, o.squares)):
        if not any(all(a <= b for a, b in zip(one.squares, option.squares, strict=True)) for one in kept):
            kept.append(option)
    return kept


class _Priced:
    """An option, and its cost: its seconds, and what its deviation is worth."""

    def __init__(self, option: Option, limits: Sequence[float], worth: float) -> None:
        self.option, self.squares = option, option.squares
        self.weight = max(map(_share, option.squares, limits), default=0.0)
        self.cost = option.seconds + (worth * self.weight if worth else 0.0)


def _share(square: float, limit: float) -> float:
    return square / limit if limit else (math.inf if square else 0.0)


def _chosen(blocks: Sequence[Sequence[_Priced]], limits: Sequence[float]) -> list[_Priced]:
    def at(price: float) -> list[_Priced]:
        return [min(options, key=lambda o: o.cost + (price * o.weight if price else 0.0)) for options in blocks]

    if _holds(cheapest := at(0.0), limits):
        return cheapest
    low, high = 0.0, 1e-9
    while not _holds(at(high), limits):
        low, high = high, 10 * high
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (low, middle) if _holds(at(middle), limits) else (middle, high)
    chosen = at(high)
    while better := _improved(chosen, blocks, limits):
        chosen = better
    return chosen


def _holds(chosen: Sequence[_Priced], limits: Sequence[float]) -> bool:
    """Whether the squares of all blocks sum to at most the limit, under every constraint."""
    return all(sum(option.squares[k] for option in chosen) <= limit for k, limit in enumerate(limits))


def _improved(chosen: list[_Priced], blocks: Sequence[Sequence[_Priced]], limits: Sequence[float]) -> Any:
    """Switch a block, or two of them if they are few, where that saves most; None if nothing does."""
    numbers, best, found = range(len(blocks)), _MIN_SAVING, None
    few = sum(map(len, blocks)) ** 2 <= _MAX_PAIRS
    for a, b in combinations_with_replacement(numbers, 2) if few else zip(numbers, numbers, strict=True):
        for one, other in product(blocks[a], blocks[b]):
            switched = [*chosen]
            switched[a], switched[b] = one, other
            saved = sum(chosen[k].cost - switched[k].cost for k in {a, b})
            if saved > best and _holds(switched, limits):
                best, found = saved, switched
    return found
