"""A call of a patched U-Net is an object of its own: threads and nested calls do not meet."""

import sys
import threading

import pytest
import torch
from blocks import blocks_of
from kinds import EVERYWHERE, GRID, SIMILARITY, kinds
from patching import answer

from agentsd import apply_patch, early, get_patch, patched, remove_patch
from agentsd.patching.call import current_call

SIZES = ((16, 8), (8, 16), (8, 8), (16, 16))
PROGRESS = (0.1, 0.6)
by_kind = kinds(
    {
        "stages": {**GRID, "stages": early(0.5, after={"agent_ratio": 0.75})},
        "similarity agents": SIMILARITY,
        "merging everywhere": EVERYWHERE,
    }
)
ROUNDS = 3


@pytest.fixture
def restless():
    """Let threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@by_kind
def test_four_threads_of_four_sizes(any_unet, kw, restless):
    unet = any_unet
    with patched(unet, **kw):
        patch, alone = get_patch(unet), {}
        for size in SIZES:
            for progress in PROGRESS:
                alone[size, progress] = answer(unet, *size, progress, rows=1)
        before = sum(sum(layer.calls.values()) for layer in patch.report())
        wrong = []

        def work(size):
            for _ in range(ROUNDS):
                for progress in PROGRESS:
                    if not torch.equal(answer(unet, *size, progress, rows=1), alone[size, progress]):
                        wrong.append((size, progress))

        threads = [threading.Thread(target=work, args=(size,)) for size in SIZES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert not patch.notes
        after = sum(sum(layer.calls.values()) for layer in patch.report())
        assert after == (1 + ROUNDS) * before  # no count is lost


@by_kind
def test_a_call_inside_of_a_call(any_unet, kw):
    """As of guidance that asks the model again in the middle."""
    unet = any_unet
    with patched(unet, **kw):
        outer, inner, found = answer(unet, 16, 8, 0.1), answer(unet, 8, 16, 0.6), []

        def again(module, args):
            if not found:
                found.append(None)
                found[0] = answer(unet, 8, 16, 0.6)

        handle = blocks_of(unet)[0].attn2.register_forward_pre_hook(again)
        assert torch.equal(answer(unet, 16, 8, 0.1), outer)
        handle.remove()
        assert torch.equal(found[0], inner)
        assert not get_patch(unet).notes
        assert current_call() is None


def test_a_call_that_another_thread_left_behind_is_over(unet):
    thread = threading.Thread(target=remove_patch, args=[unet])
    apply_patch(unet, **GRID)
    get_patch(unet).begin_call(unet, (torch.zeros(1, 4, 8, 8), torch.tensor([500])), {})
    assert current_call() is not None
    thread.start()
    thread.join()
    assert current_call() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_nothing_behind(any_unet, error):
    unet = any_unet

    def fail(*args):
        raise error

    with patched(unet, **SIMILARITY):
        expected = answer(unet, 8, 8, 0.5)
        handle = blocks_of(unet)[0].attn2.register_forward_pre_hook(fail)
        with pytest.raises(error):
            answer(unet, 16, 16, 0.5)
        handle.remove()
        assert torch.equal(answer(unet, 8, 8, 0.5), expected)
        assert not get_patch(unet).notes
    assert current_call() is None


def test_what_belongs_to_a_call_is_seen_from_inside_only(unet):
    seen = []
    with patched(unet, **GRID):
        get_patch(unet).observer = lambda answer: seen.append(answer.call is current_call())
        answer(unet, 8, 8, 0.5)
        assert seen
        assert all(seen)
        assert current_call() is None
        assert get_patch(unet).last_call.latent == (8, 8)
