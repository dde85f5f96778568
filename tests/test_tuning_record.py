"""Recording calls of a U-Net: which are kept, and that they are copies; comparing settings on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from blocks import as_model, flat_unet, inputs, tree
from torch import nn

import agentsd
from agentsd import SettingError
from agentsd.tuning.record import progress_of
from agentsd.tuning.replay import compare


@pytest.fixture(scope="module")
def unet():
    return flat_unet()


def call(unet: nn.Module, t: float, side: int = 4, seed: int = 0):
    x, _, context = inputs(1, side, side, seed=seed)
    with torch.no_grad():
        return unet(x, torch.tensor([t]), context=context)


def timesteps(calls) -> list[float]:
    return [round(1000 * (1 - progress_of(c)), 6) for c in calls]


@pytest.mark.parametrize(
    ("steps", "moments", "kept"),
    [
        (20, 6, 6),
        (20, 1, 1),
        (3, 6, 3),
        (50, 8, 8),
        (1, 6, 1),
    ],
)
def test_calls_are_spread_over_the_diffusion(unet, steps, moments, kept):
    at = [999 - i * 999 / steps for i in range(steps)]
    with agentsd.record_calls(unet, moments) as calls:
        for t in at:
            call(unet, t)
        assert calls == []
    found = timesteps(calls)
    assert len(found) == kept
    assert found == sorted(found, reverse=True)
    if kept > 1:
        assert (found[0], found[-1]) == (pytest.approx(at[0]), pytest.approx(at[-1]))
        gaps = [a - b for a, b in pairwise(found)]
        assert max(gaps) < 2.5 * (at[0] - at[-1]) / (kept - 1)


def test_part_of_a_diffusion_is_spread_too(unet):
    with agentsd.record_calls(unet, 3) as calls:
        for t in range(500, 0, -25):
            call(unet, t)
    assert timesteps(calls)[0] == 500
    assert timesteps(calls)[-1] == 25
    assert 150 < timesteps(calls)[1] < 400


def test_never_more_than_twice_as_many_are_held(unet):
    from agentsd.tuning.record import _Recorder

    recorder = _Recorder(3)
    for t in range(999, 0, -10):
        recorder.see(unet, (torch.zeros(1, 4, 4, 4), torch.tensor([t])), {})
        assert len(recorder.seen) <= 6
    assert len(recorder.spread()) == 3


def test_arguments_are_copies(unet):
    x, t, context = inputs(1, 4, 4)
    residuals = [torch.ones(2), {"more": torch.ones(2)}]
    with agentsd.record_calls(as_model(unet)) as calls, torch.no_grad():
        handle = unet.register_forward_pre_hook(lambda m, a, k: (a, {"context": k["context"]}), with_kwargs=True)
        unet(x, t, context=context, control=residuals)
        handle.remove()
    (args, kwargs), before = calls[0], x.clone()
    x.zero_()
    residuals[0].zero_()
    residuals.pop()
    assert torch.equal(args[0], before)
    assert torch.equal(kwargs["control"][0], torch.ones(2))
    assert len(kwargs["control"]) == 2


def test_cond_and_uncond_may_come_in_two_calls(unet):
    with agentsd.record_calls(unet, 3) as calls:
        for t in (900, 500, 100):
            call(unet, t, seed=1)
            call(unet, t, seed=2)
            call(unet, t, seed=3)
    assert timesteps(calls) == [900, 900, 500, 500, 100, 100]
    assert not torch.equal(calls[0][0][0], calls[1][0][0])


def test_calls_of_another_size_are_left_out(unet):
    with agentsd.record_calls(unet) as calls:
        call(unet, 900)
        call(unet, 500, side=8)
        call(unet, 100)
    assert timesteps(calls) == [900, 100]


def test_calls_are_there_after_an_error_and_the_hook_is_gone(unet):
    before = tree(unet)
    calls = []

    def interrupted():
        with agentsd.record_calls(unet) as recorded:
            calls.append(recorded)
            call(unet, 900)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (calls,) = calls
    assert timesteps(calls) == [900]
    assert tree(unet) == before


@pytest.mark.parametrize("moments", [0, 101, 2.5, True, None])
def test_bad_moments_are_named(unet, moments):
    before = tree(unet)
    with pytest.raises(SettingError, match="moments"), agentsd.record_calls(unet, moments):
        pass
    assert tree(unet) == before


def test_what_inference_mode_made_can_be_replayed(unet):
    with torch.inference_mode(), agentsd.record_calls(unet) as calls:
        x, t, context = inputs(1, 8, 8)
        unet(x, t, context=context)
    found = compare(unet, calls, {"pool": agentsd.AgentConfig(method="pool", ratio=0.0, sx=2, sy=2)})
    assert found["pool"].deviation > 0
    assert found["pool"].time > 0


def test_comparing_leaves_the_model_as_it_was(unet):
    with agentsd.record_calls(unet) as calls:
        call(unet, 500, side=8)
    before = tree(unet)
    with pytest.raises(agentsd.TuningCancelled):
        compare(unet, calls, {"pool": agentsd.AgentConfig(method="pool")}, progress=lambda done, total, text: done < 1)
    assert tree(unet) == before
