"""Choose the settings of each block: the least time under a limit on the deviation. Imports no torch.

Errors of single blocks add in quadrature (docs/design.md), so a plan keeps a tolerance if the squares of the deviations
that its blocks cause sum to at most the tolerance's square, under every constraint: one for each recorded call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

# Bisections of the price of deviation; more change nothing.
_BISECTIONS = 50
# Pairs of options above which exchanges take too long: with many blocks, they also gain little.
_MAX_PAIRS = 20_000
# Seconds that a switch must save: rounding errors are no gain.
_MIN_SAVING = 1e-9


@dataclass(frozen=True)
class Option:
    """One way to run a block.

    Attributes:
        candidate: number of the candidate, from 1; 0 is full attention.
        seconds: seconds of the block's self-attention.
        squares: squared deviation of the U-Net's output that it causes, one for each constraint.
    """

    candidate: int
    seconds: float
    squares: tuple[float, ...]


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
    chosen = _filled(at(high), blocks, limits)
    while exchanged := _exchanged(chosen, blocks, limits):
        chosen = _filled(exchanged, blocks, limits)
    return chosen


def _holds(chosen: Sequence[_Priced], limits: Sequence[float]) -> bool:
    """Whether the squares of all blocks sum to at most the limit, under every constraint."""
    return all(sum(option.squares[k] for option in chosen) <= limit for k, limit in enumerate(limits))


def _filled(chosen: list[_Priced], blocks: Sequence[Sequence[_Priced]], limits: Sequence[float]) -> list[_Priced]:
    """Switch single blocks to cheaper options while the constraints hold, those that save most first."""
    while True:
        switches = sorted(
            ((chosen[b].cost - option.cost, b, option) for b, options in enumerate(blocks) for option in options),
            key=lambda switch: -switch[0],
        )
        switched = ([*chosen[:b], option, *chosen[b + 1 :]] for saved, b, option in switches if saved > _MIN_SAVING)
        better = next((each for each in switched if _holds(each, limits)), None)
        if better is None:
            return chosen
        chosen = better


def _exchanged(
    chosen: list[_Priced], blocks: Sequence[Sequence[_Priced]], limits: Sequence[float]
) -> list[_Priced] | None:
    """Switch two blocks at once, one of them to a costlier option, where that saves most; None if nothing does."""
    if sum(map(len, blocks)) ** 2 > _MAX_PAIRS:
        return None
    best, found = _MIN_SAVING, None
    for a, b in permutations(range(len(blocks)), 2):
        for costlier, cheaper in product(blocks[a], blocks[b]):
            lost, saved = costlier.cost - chosen[a].cost, chosen[b].cost - cheaper.cost
            if lost > 0 and saved - lost > best:
                switched = [*chosen]
                switched[a], switched[b] = costlier, cheaper
                if _holds(switched, limits):
                    best, found = saved - lost, switched
    return found
