"""Calibration: what it runs, what it proposes, and that it leaves the model as it was. No timing is asserted."""

from __future__ import annotations

import pytest
import torch
from blocks import golden_unet, sdxl_like_unet, tree

import agentsd
from agentsd import calibration
from agentsd.calibration import Timing, calibrate

QUICK = {"seconds": 0.2}


@pytest.fixture(scope="module")
def unet():
    return golden_unet()


def test_layers_of_each_size_are_timed_both_ways(unet):
    found = calibrate(unet, (64, (128, 64)), config=agentsd.AgentConfig(ratio=0.0, agent_source="grid"), **QUICK)
    assert found.timings[0].tokens == 64
    assert {t.channels for t in found.timings} == {32}
    assert all(t.unpatched > 0 and t.patched > 0 for t in found.timings)
    assert 0 < found.min_tokens <= max(t.tokens for t in found.timings) + 1


def test_deeper_levels_have_fewer_tokens(unet):
    config = agentsd.AgentConfig(ratio=0.0, agent_source="grid", max_downsample=2)
    found = calibrate(unet, (128,), config=config, **QUICK)
    assert [(t.tokens, t.channels) for t in found.timings] == [(64, 64), (256, 32)]


def test_a_model_whose_attention_begins_further_down_is_timed_there():
    found = calibrate(sdxl_like_unet(), (128,), **QUICK)
    assert [t.tokens for t in found.timings] == [64]


@pytest.mark.parametrize(("make", "tokens"), [(golden_unet, 256), (sdxl_like_unet, 64)])
def test_auto_is_timed_where_attention_begins(make, tokens):
    config = agentsd.AgentConfig(ratio=0.0, agent_source="grid", max_downsample="auto")
    found = calibrate(make(), (128,), config=config, **QUICK)
    assert [t.tokens for t in found.timings] == [tokens]


def test_the_patched_call_uses_agents(unet, monkeypatch):
    calls = []
    real = calibration.patch_unet

    def spied(alone, config):
        patch = real(alone, config)
        remove = patch.remove

        def spied_remove():
            calls.append(patch.report()[0].calls)
            remove()

        patch.remove = spied_remove
        return patch

    monkeypatch.setattr(calibration, "patch_unet", spied)
    settings = agentsd.AgentConfig(ratio=0.0, agent_source="grid", min_tokens=10**6, stages=agentsd.early(0.1))
    calibrate(unet, (128,), config=settings, **QUICK)
    assert len(calls) >= 2
    assert all(call == {"agents": 1} for call in calls)


def test_the_model_is_as_it_was(unet):
    before = tree(unet)
    calibrate(unet, (64,), **QUICK)
    assert tree(unet) == before


def test_a_patch_that_is_on_the_model_stays(unet):
    with agentsd.patched(unet):
        patch, before = agentsd.get_patch(unet), tree(unet)
        calibrate(unet, (64,), **QUICK)
        assert agentsd.get_patch(unet) is patch
        assert tree(unet) == before


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({64: 2.0, 256: 0.9, 1024: 0.5}, 256),
        ({64: 0.9, 256: 1.2, 1024: 0.5}, 1024),
        ({64: 0.5, 256: 0.5}, 64),
        ({64: 1.1, 256: 1.0}, 257),
    ],
)
def test_the_proposal_is_where_nothing_above_is_slower(ratios, expected):
    timings = [Timing(tokens, 320, 1.0, ratio) for tokens, ratio in ratios.items()]
    assert calibration._threshold(timings) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (63,)}, "63"),
        ({"sizes": (8193,)}, "8193"),
        ({"sizes": ("512",)}, "'512'"),
        ({"sizes": ((512, 512, 3),)}, r"\(512, 512, 3\)"),
        ({"sizes": (True,)}, "True"),
        ({"batch": 0}, "batch .* 0"),
        ({"seconds": 0}, "seconds .* 0"),
    ],
)
def test_bad_arguments_are_named(unet, arguments, said):
    with pytest.raises(agentsd.SettingError, match=said):
        calibrate(unet, **arguments)


def test_a_model_without_attention_is_refused():
    with pytest.raises(agentsd.UnsupportedModelError):
        calibrate(torch.nn.Linear(2, 2))
