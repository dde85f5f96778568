"""Settings: what is accepted, what an error says, and what holds at which moment."""

import dataclasses
import fractions
import math

import numpy as np
import pytest
import torch
from blocks import as_model, flat_unet, inputs, run, tree
from torch import nn

import agentsd
from agentsd import AgentConfig, Rule, SettingError, Stage, UnsupportedModelError, early, paper_stages
from agentsd.checks import shown
from agentsd.config import FIELDS, SETTINGS, TOKEN_MERGING

nan, inf = math.nan, math.inf

# Bad values of each setting, and the range that the message must give
BAD = {
    "ratio": ((-1, 1, nan, inf, "0.4", None, True, 10**400, 0.4j, {}, torch.tensor([0.1, 0.2])), "from 0.0 to 0.99"),
    "agent_ratio": ((-1, 1.2, -inf, [0.4]), "from 0.0 to 0.99"),
    "sx": ((0, 17, -1, 2.5, nan, inf, "abc", [4], None), "from 1 to 16"),
    "sy": ((0, 17), "from 1 to 16"),
    "k_scale2": ((-0.1, 2.1), "from 0.0 to 2.0"),
    "k_shortcut": ((-0.1, 1.1), "from 0.0 to 1.0"),
    "exact_ratio": ((-0.1, 1.1), "from 0.0 to 1.0"),
    "max_downsample": ((0, 3, 16, "1", None, [1], True, nan, 1.5, "Auto", "", ["auto"]), "'auto', 1, 2, 4, 8"),
    "attn_precision": (("fp16", "FP32", 32, True, ["fp32"]), "None, 'fp32'"),
    "use_rand": ((1, 0, "True", None, []), "True or False"),
    "merge_attn": ((1,), "True or False"),
    "merge_crossattn": ((1,), "True or False"),
    "merge_mlp": ((1,), "True or False"),
    "agent_source": (("Grid", "", None, 0, ["grid"]), "'similarity', 'grid'"),
    "method": (("x", "untouched"), "'agent'"),
    "min_tokens": ((-1, 2**24 + 1, 0.5, None), "from 0 to 16777216"),
    "max_agents": ((0, -1, 0.5, nan, "abc", []), "from 1 to 16777216, or None"),
    "seed": ((-1, 2**63, 0.5, None, "abc"), "from 0 to 9223372036854775807"),
    "stages": (("abc", Stage(1), [0.4], None, {"until": 1}, [Stage(0.5)] * 2, [Rule(downsample=2)]), "agentsd.Stage"),
    "rules": (("full", Rule(), 3, [0.4], None, {"settings": {}}, ["full"]), "agentsd.Rule"),
}


@pytest.fixture(scope="module")
def unet():
    return flat_unet()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_with_its_setting_and_its_range(name):
    values, allowed = BAD[name]
    for value in values:
        with pytest.raises(SettingError) as error:
            AgentConfig(**{name: value})
        assert all(part in str(error.value) for part in (name, allowed, shown(value))), error.value


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("rules", "full", "rules"), ("ratoi", 1, "ratoi.*did you mean ratio"), ("zzz", 1, "zzz=1")],
)
def test_a_bad_value_touches_nothing(unet, name, value, said, patched_before):
    example = inputs(1, 8, 8)
    if patched_before:
        agentsd.apply_patch(unet, ratio=0.0, agent_ratio=0.8)
    before, patch, out = tree(unet), agentsd.get_patch(unet), run(unet, example)
    with pytest.raises(SettingError, match=said):
        agentsd.apply_patch(as_model(unet), **{name: value})
    with pytest.raises(SettingError, match=said), agentsd.patched(unet, **{name: value}):
        pytest.fail("must not be entered")
    assert tree(unet) == before
    assert agentsd.get_patch(unet) is patch
    assert torch.equal(run(unet, example), out)
    agentsd.remove_patch(unet)


def test_settings_may_be_positional_in_the_reference_s_order(unet):
    values = (0.3, 2, 3, 5, 0.9, 0.4, 0.1, "fp32", False, False, True, True)
    agentsd.apply_patch(unet, *values)
    config = agentsd.get_patch(unet).config
    agentsd.remove_patch(unet)
    names = ["ratio", "max_downsample", "sx", "sy", "agent_ratio", "k_scale2", "k_shortcut", "attn_precision"]
    names += ["use_rand", "merge_attn", "merge_crossattn", "merge_mlp"]
    assert config == AgentConfig(**dict(zip(names, values, strict=True)))
    with pytest.raises(TypeError):
        agentsd.apply_patch(unet, *dataclasses.astuple(config))
    with pytest.raises(TypeError):
        agentsd.apply_patch(unet, 0.3, ratio=0.3)
    assert agentsd.get_patch(unet) is None


def test_apply_patch_takes_every_setting_and_shares_the_config_s_defaults(unet):
    assert AgentConfig() == AgentConfig(0.4, 1, 4, 4, 0.95, 0.3, 0.075, None, True, True, False, False)
    other = {"stages": paper_stages(), "rules": (Rule(None, downsample=8),)}
    for name, field in FIELDS.items():
        values = {"number": field.high, "whole": field.low + 1, "flag": not field.default}
        other[name] = values.get(field.kind, next((c for c in field.choices if c != field.default), None))
    for settings in ({}, other):
        agentsd.apply_patch(unet, **settings)
        assert agentsd.get_patch(unet).config == AgentConfig(**settings)
        agentsd.remove_patch(unet)
    assert all(other[name] != getattr(AgentConfig(), name) for name in SETTINGS)


def test_limits_are_inclusive_and_numbers_of_any_type_are_taken():
    for name, field in FIELDS.items():
        for bound in (field.low, field.high) if field.numeric else ():
            assert getattr(AgentConfig(**{name: bound}), name) == bound
    c = AgentConfig(np.float32(0.5), np.int64(2), np.int64(3), 2.0, fractions.Fraction(1, 2))
    found = [(type(value), value) for value in (c.ratio, c.max_downsample, c.sx, c.sy, c.agent_ratio)]
    assert found == [(float, 0.5), (int, 2), (int, 3), (int, 2), (float, 0.5)]


@pytest.mark.parametrize("model", [None, 3, "abc", [], nn.Linear(2, 2), nn.Sequential(), as_model(nn.Linear(2, 2))])
def test_a_model_without_transformer_blocks_is_an_error(model):
    with pytest.raises(UnsupportedModelError, match=rf"U-Net with transformer blocks, .*got {type(model).__name__}"):
        agentsd.apply_patch(model)
    assert agentsd.get_patch(model) is None
    assert agentsd.remove_patch(model) is model


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (early(0.6), [0.1, 0.1, None, None]),
        (early(0.6, since=0.5), [None, 0.1, None, None]),
        (early(0.6, since=0.5, after=TOKEN_MERGING), [None, 0.1, 0.4, 0.4]),
        ([Stage(0.6)], [0.1, 0.1, None, None]),
        (paper_stages(), [0.1, 0.4, 0.4, 0.4]),
        ([Stage(0.4, None), Stage(0.6, {"ratio": 0.2}), Stage(1.0)], [None, 0.2, 0.1, 0.1]),
    ],
)
def test_stages_hold_from_where_to_where_they_say(stages, expected):
    config = AgentConfig(ratio=0.1, stages=stages)
    found = [config.at(progress) for progress in (0, 0.5, 0.6, 1)]
    assert [part and part.ratio for part in found] == expected
    assert all(config.at(progress) is None for progress in (None, -0.001, 1.001, nan, inf))


def test_a_bad_end_or_beginning_is_an_error():
    for bad in (0, -1, 1.01, nan, "abc", None, True, [1]):
        with pytest.raises(SettingError, match="until"):
            early(bad)
    for bad in (-1, 1.01, nan, "abc", None, [1], 0.5, 0.7):
        with pytest.raises(SettingError, match="since"):
            early(0.5, since=bad)
