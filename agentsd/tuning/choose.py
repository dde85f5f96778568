"""Choose the settings of each block: the least time under a limit on the deviation. Imports no torch.

Errors of single blocks add in quadrature (docs/design.md), so a plan keeps a tolerance if the squares of the deviations
that its blocks cause sum to at most the tolerance's square, under every constraint: one for each recorded call.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations_with_replacement, product
from operator import le

# Prices of deviation, in seconds for a whole limit
_PRICES = [0.0, *(10 ** (k / 200) for k in range(-1800, 2400))]
# Pairs of options above which exchanges take too long: with many blocks, they also gain little.
_MAX_PAIRS = 20_000
# Seconds that a switch must save: rounding errors are no gain.
_MIN_SAVING = 1e-9


@dataclass(frozen=True)
class Option:
    """One way to run a block."""

    candidate: int  # its number, from 1; 0 is full attention
    seconds: float  # of the block's self-attention
    squares: tuple[float, ...]  # squared deviation of the model's output that it causes, one for each constraint


def deviation(chosen: Sequence[Option], constraint: int) -> float:
    """Predict the deviation of the model's output under one constraint."""
    return math.sqrt(sum(option.squares[constraint] for option in chosen))


def choose(blocks: Sequence[Sequence[Option]], tolerances: Sequence[float], worth: float = 0.0) -> list[Option]:
    """Choose an option for each block, so that the blocks take the least time and every constraint holds.

    By a price for deviation: each block takes the option with the least seconds + price · squares, and the price is
    the lowest at which all constraints hold. What is left over is then given to single blocks, and to pairs of them.
    `tolerances` are the largest deviations allowed under each constraint; each block has an option without deviation.
    `worth` are the seconds that using up a tolerance has to save: deviation that saves less in proportion isn't chosen.
    """
    limits = [tolerance**2 for tolerance in tolerances]
    kept = [_undominated([o for o in options if all(map(le, o.squares, limits))]) for options in blocks]
    # the largest of a limit that an option takes
    shares = {o: max(s / (m or 1.0) for s, m in zip(o.squares, limits, strict=True)) for o in chain(*kept)}
    costs = {option: option.seconds + worth * share for option, share in shares.items()}

    def at(price: float) -> list[Option]:
        return [min(options, key=lambda o: costs[o] + price * shares[o]) for options in kept]

    def holds(chosen: Sequence[Option]) -> bool:
        return all(sum(option.squares[k] for option in chosen) <= limit for k, limit in enumerate(limits))

    chosen = at(_PRICES[bisect_left(_PRICES, True, key=lambda price: holds(at(price)))])
    places = range(len(kept))
    few = sum(map(len, kept)) ** 2 <= _MAX_PAIRS
    while True:
        best, found = _MIN_SAVING, None
        for a, b in combinations_with_replacement(places, 2) if few else zip(places, places, strict=True):
            for one, other in product(kept[a], kept[b]):
                switched = [*chosen]
                switched[a], switched[b] = one, other
                saved = sum(costs[chosen[k]] - costs[switched[k]] for k in {a, b})
                if saved > best and holds(switched):
                    best, found = saved, switched
        if found is None:
            return chosen
        chosen = found


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Leave out options beside which another takes no more time and deviates no more under any constraint."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.seconds, o.squares)):
        if not any(all(map(le, one.squares, option.squares)) for one in kept):
            kept.append(option)
    return kept
