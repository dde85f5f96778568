"""Is it faster here? A patch times its layers on their real tensors, by a clock that the test holds."""

import pytest
import torch
from blocks import actions, inputs, run
from kinds import CORRECTED, MERGING, SIMILARITY
from patching import EXAMPLE, GOLDEN

from agentsd import get_patch, patched


class FakeClock:
    """Tells the seconds that it was given in turn, and counts."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.timed_calls = seconds, 0

    def timed(self, run, device):
        second = self.seconds[self.timed_calls % len(self.seconds)]
        self.timed_calls += 1
        return run(), second


def test_the_second_call_counts_and_the_outputs_are_the_patch_s():
    with patched(GOLDEN, **CORRECTED):
        patch = get_patch(GOLDEN)
        expected = run(GOLDEN, EXAMPLE)
        layers = sum(action != "untouched" for action in actions(patch))
        clock = FakeClock(*[9.0, 9.0] * layers, *[1.0, 3.0] * layers)
        patch.measure(clock)
        assert torch.equal(run(GOLDEN, EXAMPLE), expected)
        assert patch.measured is None
        assert torch.equal(run(GOLDEN, EXAMPLE), expected)
        assert patch.measured == (layers, 3 * layers)
        run(GOLDEN, EXAMPLE)
        assert clock.timed_calls == 4 * layers  # nothing is timed any more
        assert not patch.notes


@pytest.mark.parametrize("kw", [SIMILARITY, MERGING])
def test_making_clusters_counts_as_ours(kw):
    with patched(GOLDEN, **kw):
        patch = get_patch(GOLDEN)
        patch.measure(FakeClock(2.0, 1.0, 1.0))  # clusters, ours, the host's
        for _ in range(2):
            run(GOLDEN, EXAMPLE)
        layers = sum(action != "untouched" for action in actions(patch))
    assert patch.measured == (3 * layers, layers)


def test_calls_that_nothing_is_changed_in_are_not_counted():
    with patched(GOLDEN, **CORRECTED, min_tokens=256):
        patch = get_patch(GOLDEN)
        patch.measure(FakeClock(1.0, 2.0))
        for side in (8, 8, 16, 16):
            assert patch.measured is None
            run(GOLDEN, inputs(2, side, side))
        assert patch.measured.with_seconds > 0
