"""Recording calls of a U-Net: which are kept, and that they are copies; comparing settings on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from blocks import as_model, flat_unet, inputs, tree
from torch import nn

import agentsd
from agentsd import SettingError
from agentsd.schedule import Timesteps
from agentsd.tuning.record import _Recorder, progress_of
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
    ("steps", "first", "moments"), [(20, 999, 6), (20, 999, 1), (3, 999, 6), (50, 999, 8), (1, 999, 6), (20, 500, 3)]
)
def test_calls_are_spread_over_the_diffusion(unet, steps, first, moments):
    at = [first - i * first / steps for i in range(steps)]
    with agentsd.record_calls(unet, moments) as calls:
        for t in at:
            call(unet, t)
        assert calls == []
    found = timesteps(calls)
    assert len(found) == min(moments, steps)
    assert found == sorted(found, reverse=True)
    if len(found) > 1:
        assert (found[0], found[-1]) == (pytest.approx(at[0]), pytest.approx(at[-1]))
        gaps = [a - b for a, b in pairwise(found)]
        assert max(gaps) < 2.5 * (at[0] - at[-1]) / (len(found) - 1)


def test_never_more_than_twice_as_many_are_held(unet):
    recorder = _Recorder(3, Timesteps())
    for t in range(999, 0, -10):
        recorder.see(unet, (torch.zeros(1, 4, 4, 4), torch.tensor([t])), {})
        assert len(recorder.seen[4, 4]) <= 6
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


def test_two_calls_of_a_timestep_are_kept_and_none_of_another_size_than_most_have(unet):
    with agentsd.record_calls(unet, 3) as calls:
        for t in (900, 500, 100):
            call(unet, t, side=8)
            for seed in range(3):
                call(unet, t, seed=seed)
        call(unet, 300, side=8)
    assert timesteps(calls) == [900, 900, 500, 500, 100, 100]
    assert not torch.equal(calls[0][0][0], calls[1][0][0])


def test_calls_are_there_after_an_error_and_the_hook_is_gone(unet):
    before = tree(unet)
    with pytest.raises(KeyboardInterrupt), agentsd.record_calls(unet) as calls:  # noqa: PT012
        call(unet, 900)
        raise KeyboardInterrupt
    assert timesteps(calls) == [900]
    for moments in (0, 101, 2.5, True, None):
        with pytest.raises(SettingError, match="moments"), agentsd.record_calls(unet, moments):
            pass
    assert tree(unet) == before


def test_what_inference_mode_made_can_be_compared_and_the_model_stays_as_it_was(unet):
    with torch.inference_mode(), agentsd.record_calls(unet) as calls:
        x, t, context = inputs(1, 8, 8)
        unet(x, t, context=context)
    before, config = tree(unet), agentsd.AgentConfig(method="pool", ratio=0.0, sx=2, sy=2)
    found = compare(unet, calls, {"pool": config})
    assert found["pool"].deviation > 0
    assert found["pool"].time > 0
    with pytest.raises(agentsd.TuningCancelled):
        compare(unet, calls, {"pool": config}, progress=lambda done, total, text: done < 1)
    assert tree(unet) == before
