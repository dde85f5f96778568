"""Which settings are chosen under a tolerance, compared with all choices there are."""

from __future__ import annotations

import random
from itertools import product

import pytest

from agentsd.tuning.choose import Option, choose, deviation


def blocks_of(seed: int, blocks: int = 5, candidates: int = 3, constraints: int = 2) -> list[list[Option]]:
    """Full attention takes 1 second; what is faster deviates more, more or less."""
    draw = random.Random(seed)
    made = []
    for _ in range(blocks):
        options = [Option(0, 1.0, (0.0,) * constraints)]
        for k in range(1, candidates + 1):
            seconds = draw.uniform(0.1, 0.95)
            options.append(Option(k, seconds, tuple(draw.uniform(0, 0.1) * (1 - seconds) for _ in range(constraints))))
        made.append(options)
    return made


def seconds(chosen):
    return sum(option.seconds for option in chosen)


def keeps(chosen, tolerances):
    return all(deviation(chosen, k) <= tolerance * (1 + 1e-9) for k, tolerance in enumerate(tolerances))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.4])
def test_it_keeps_the_tolerances_and_is_nearly_the_fastest(seed, tolerance):
    blocks, tolerances = blocks_of(seed), (tolerance, 1.2 * tolerance)
    chosen = choose(blocks, tolerances)
    assert keeps(chosen, tolerances)
    best = min(seconds(every) for every in product(*blocks) if keeps(every, tolerances))
    assert seconds(chosen) <= best + 0.15 * (len(blocks) - best)  # of what can be saved at all


def test_without_a_limit_each_block_is_the_fastest_and_with_none_allowed_it_has_full_attention():
    blocks = blocks_of(1)
    assert choose(blocks, (10.0, 10.0)) == [min(options, key=lambda o: o.seconds) for options in blocks]
    assert [option.candidate for option in choose(blocks, (0.0, 0.0))] == [0] * 5
    assert choose([], (0.1,)) == []


def test_what_deviates_by_nothing_is_free():
    blocks = [[Option(0, 1.0, (0.0,)), Option(1, 0.5, (0.0,)), Option(2, 0.2, (1.0,))]]
    assert choose(blocks, (0.0,))[0].candidate == 1
    assert choose(blocks, (0.5,))[0].candidate == 1
    assert choose(blocks, (1.0,))[0].candidate == 2


def test_deviations_of_blocks_add_in_quadrature():
    blocks = [[Option(0, 1.0, (0.0,)), Option(1, 0.5, (0.01,))] for _ in range(3)]
    assert deviation(choose(blocks, (1.0,)), 0) == pytest.approx(0.03**0.5)
    assert sum(option.candidate for option in choose(blocks, (0.15,))) == 2


def test_deviation_that_saves_next_to_nothing_is_not_chosen():
    blocks = [[Option(0, 1.0, (0.0,)), Option(1, 0.3, (0.0001,)), Option(2, 0.29, (0.009,))]]
    assert choose(blocks, (0.1,))[0].candidate == 2
    assert choose(blocks, (0.1,), worth=0.02)[0].candidate == 1
    assert choose(blocks, (0.1,), worth=0.001)[0].candidate == 2
    assert choose(blocks, (0.0,), worth=0.02)[0].candidate == 0
