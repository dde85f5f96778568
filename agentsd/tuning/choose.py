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
_PAIRS = 20_000
# Seconds that an exchange must save: rounding errors are no gain.
_GAIN = 1e-9


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


def choose(blocks: Sequence[Sequence[Option]], tolerances: Sequence[float]) -> list[Option]:
    """Choose an option for each block, so that the blocks take the least time and every constraint holds.

    By a price for deviation: each block takes the option with the least seconds + price · squares, and the price is
    the lowest at which all constraints hold. What is left over is then given to single blocks, and to pairs of them.

    Args:
        blocks: options of each block; each has one without deviation.
        tolerances: largest deviation allowed under each constraint.
    """
    limits = [tolerance**2 for tolerance in tolerances]

    def weight(option: Option) -> float:
        return max((_share(s, limit) for s, limit in zip(option.squares, limits, strict=True)), default=0.0)

    weights = [[weight(option) for option in options] for options in blocks]

    def at(price: float) -> list[Option]:
        return [
            min(zip(options, w, strict=True), key=lambda pair: pair[0].seconds + price * pair[1])[0]
            for options, w in zip(blocks, weights, strict=True)
        ]

    if holds(fastest := at(0.0), limits):
        return fastest
    low, high = 0.0, 1e-9
    while not holds(at(high), limits):
        low, high = high, 10 * high
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (low, middle) if holds(at(middle), limits) else (middle, high)
    chosen = _filled(at(high), blocks, limits)
    while exchanged := _exchanged(chosen, blocks, limits):
        chosen = _filled(exchanged, blocks, limits)
    return chosen


def _share(square: float, limit: float) -> float:
    return square / limit if limit else (math.inf if square else 0.0)


def holds(chosen: Sequence[Option], limits: Sequence[float]) -> bool:
    """Whether the squares of all blocks sum to at most the limit, under every constraint."""
    sums = [sum(option.squares[k] for option in chosen) for k in range(len(limits))]
    return all(total <= limit for total, limit in zip(sums, limits, strict=True))


def _filled(chosen: list[Option], blocks: Sequence[Sequence[Option]], limits: Sequence[float]) -> list[Option]:
    """Switch single blocks to faster options while the constraints hold, those that save most first."""
    while True:
        switches = sorted(
            ((chosen[b].seconds - option.seconds, b, option) for b, options in enumerate(blocks) for option in options),
            key=lambda switch: -switch[0],
        )
        for saved, b, option in switches:
            if saved <= 0:
                return chosen
            switched = [*chosen[:b], option, *chosen[b + 1 :]]
            if holds(switched, limits):
                chosen = switched
                break
        else:
            return chosen


def _exchanged(
    chosen: list[Option], blocks: Sequence[Sequence[Option]], limits: Sequence[float]
) -> list[Option] | None:
    """Switch two blocks at once, one of them to a slower option, where that saves most; None if nothing does."""
    if sum(map(len, blocks)) ** 2 > _PAIRS:
        return None
    best, found = 0.0, None
    for a, b in permutations(range(len(blocks)), 2):
        for slower, faster in product(blocks[a], blocks[b]):
            lost, saved = slower.seconds - chosen[a].seconds, chosen[b].seconds - faster.seconds
            if lost > 0 and saved - lost > best + _GAIN:
                switched = [*chosen]
                switched[a], switched[b] = slower, faster
                if holds(switched, limits):
                    best, found = saved - lost, switched
    return found


def deviation(chosen: Sequence[Option], constraint: int) -> float:
    """Predict the deviation of the U-Net's output under one constraint."""
    return math.sqrt(sum(option.squares[constraint] for option in chosen))
