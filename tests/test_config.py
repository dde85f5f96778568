"""Settings: what is accepted, what an error says, and what holds at which moment."""

from __future__ import annotations

import dataclasses
import fractions
import math

import numpy as np
import pytest
import torch
from blocks import as_model, inputs, run, tree
from patching import FLAT
from torch import nn

import agentsd
from agentsd import AgentConfig, Rule, SettingError, Stage, UnsupportedModelError, early, paper_stages, plan_layer
from agentsd.checks import shown
from agentsd.config import FIELDS, SETTINGS, TOKEN_MERGING

nan, inf = math.nan, math.inf

# (setting, bad value, the range that the message must give)
BAD = [
    *[(name, value, "from 0.0 to 0.99") for name in ("ratio", "agent_ratio") for value in (-1, 1.2, 1, nan, inf, -inf)],
    *[(name, value, "from 0.0 to 0.99") for name in ("ratio", "agent_ratio") for value in ("abc", [0.4], None, True)],
    *[("ratio", value, "from 0.0 to 0.99") for value in (10**400, 0.4j, {}, torch.tensor([0.1, 0.2]), "0.4")],
    *[(name, value, "from 1 to 16") for name in ("sx", "sy") for value in (0, 17, -1, 2.5, nan, inf, "abc", [4], None)],
    *[("k_scale2", value, "from 0.0 to 2.0") for value in (-0.1, 2.1, nan, "abc")],
    *[("k_shortcut", value, "from 0.0 to 1.0") for value in (-0.1, 1.1, nan, [0])],
    *[
        ("max_downsample", value, "'auto', 1, 2, 4, 8")
        for value in (0, 3, 16, "1", None, [1], True, nan, 1.5, "Auto", "", ["auto"])
    ],
    *[("attn_precision", value, "None, 'fp32'") for value in ("fp16", "FP32", 32, True, ["fp32"])],
    *[("use_rand", value, "True or False") for value in (1, 0, "True", None, [])],
    *[(name, value, "True or False") for name in ("merge_attn", "merge_crossattn", "merge_mlp") for value in (1, "no")],
    *[("agent_source", value, "'similarity', 'grid'") for value in ("Grid", "", None, 0, ["grid"])],
    *[("min_tokens", value, "from 0 to 16777216") for value in (-1, 2**24 + 1, 0.5, None, "abc")],
    *[("max_agents", value, "from 1 to 16777216, or None") for value in (0, -1, 0.5, nan, "abc", [])],
    *[("seed", value, "from 0 to 9223372036854775807") for value in (-1, 2**63, 0.5, None, "abc")],
    *[("stages", value, "Stage") for value in ("abc", Stage(1.0), 3, [0.4], None, {"until": 1}, [Stage(0.5)] * 2)],
    ("stages", [Rule(downsample=2)], "Stage"),
    *[("rules", value, "Rule") for value in ("full", Rule(), 3, [0.4], None, {"settings": {}}, ["full"])],
]


@pytest.fixture
def unet():
    yield FLAT
    agentsd.remove_patch(FLAT)


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda x: repr(x)[:30])
def test_a_bad_value_is_named_with_its_setting_and_its_range(name, value, allowed):
    with pytest.raises(SettingError) as error:
        AgentConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert allowed in message
    assert shown(value) in message


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize(("name", "value", "allowed"), [*BAD[::5], ("method", "x", "'agent'"), ("ratoi", 1, "ratio")])
def test_a_bad_value_touches_nothing(unet, name, value, allowed, patched_before):
    example = inputs(1, 8, 8)
    if patched_before:
        agentsd.apply_patch(unet, ratio=0.0, agent_ratio=0.8)
    before, patch, out = tree(unet), agentsd.get_patch(unet), run(unet, example)
    with pytest.raises(SettingError, match=name):
        agentsd.apply_patch(as_model(unet), **{name: value})
    with pytest.raises(SettingError, match=name), agentsd.patched(unet, **{name: value}):
        pytest.fail("must not be entered")
    assert tree(unet) == before
    assert agentsd.get_patch(unet) is patch
    assert torch.equal(run(unet, example), out)


def test_settings_may_be_positional_in_the_reference_s_order(unet):
    agentsd.apply_patch(unet, 0.3, 2, 3, 5, 0.9, 0.4, 0.1, "fp32", False, False, True, True)
    config = agentsd.get_patch(unet).config
    agentsd.remove_patch(unet)
    cells = {"ratio": 0.3, "max_downsample": 2, "sx": 3, "sy": 5, "agent_ratio": 0.9}
    scales = {"k_scale2": 0.4, "k_shortcut": 0.1, "attn_precision": "fp32"}
    switches = {"use_rand": False, "merge_attn": False, "merge_crossattn": True, "merge_mlp": True}
    assert config == AgentConfig(**cells, **scales, **switches)
    with pytest.raises(TypeError):
        agentsd.apply_patch(unet, *dataclasses.astuple(config))
    assert agentsd.get_patch(unet) is None


def test_apply_patch_takes_every_setting_and_shares_the_config_s_defaults(unet):
    agentsd.apply_patch(unet)
    assert agentsd.get_patch(unet).config == AgentConfig()
    other = {"stages": paper_stages(), "rules": (Rule(None, downsample=8),)}
    for name, field in FIELDS.items():
        values = {
            "number": field.high,
            "whole": field.low + 1,
            "choice": next((c for c in field.choices if c != field.default), 0),
        }
        other[name] = values.get(field.kind, not field.default)
    agentsd.apply_patch(unet, **other)
    assert agentsd.get_patch(unet).config == AgentConfig(**other)
    assert all(other[name] != getattr(AgentConfig(), name) for name in SETTINGS)


def test_the_reference_s_settings_have_the_documented_defaults():
    assert AgentConfig() == AgentConfig(0.4, 1, 4, 4, 0.95, 0.3, 0.075, None, True, True, False, False)
    c = AgentConfig()
    assert (c.agent_source, c.min_tokens, c.max_agents, c.stages, c.rules) == ("similarity", 0, None, (), ())


def test_limits_are_inclusive_and_numbers_of_any_type_are_taken():
    for name, field in FIELDS.items():
        for bound in (field.low, field.high) if field.numeric else ():
            assert getattr(AgentConfig(**{name: bound}), name) == bound
    c = AgentConfig(
        ratio=np.float32(0.5), agent_ratio=fractions.Fraction(1, 2), sx=np.int64(3), sy=2.0, max_downsample=np.int64(2)
    )
    assert c == AgentConfig(ratio=0.5, agent_ratio=0.5, sx=3, sy=2, max_downsample=2)
    assert [type(v) for v in (c.ratio, c.agent_ratio, c.sx, c.sy, c.max_downsample)] == [float, float, int, int, int]


def test_an_unknown_setting_names_its_like():
    with pytest.raises(SettingError, match=r"ratoi.*did you mean ratio"):
        agentsd.apply_patch(FLAT, ratoi=0.4)
    with pytest.raises(SettingError, match=r"zzz=1.*k_shortcut"):
        agentsd.apply_patch(FLAT, zzz=1)


@pytest.mark.parametrize("model", [None, 3, "abc", [], nn.Linear(2, 2), nn.Sequential(), as_model(nn.Linear(2, 2))])
def test_a_model_without_transformer_blocks_is_an_error(model):
    with pytest.raises(UnsupportedModelError, match=rf"U-Net with transformer blocks, got {type(model).__name__}"):
        agentsd.apply_patch(model)
    assert agentsd.get_patch(model) is None
    assert agentsd.remove_patch(model) is model


def test_a_config_is_frozen_and_hashable():
    config = AgentConfig(stages=paper_stages())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.5
    assert hash(config) == hash(AgentConfig(stages=paper_stages()))
    assert config != AgentConfig()
    assert dataclasses.replace(config, ratio=0.1).ratio == 0.1
    with pytest.raises(SettingError):
        dataclasses.replace(config, ratio=1)


class TestStages:
    def test_without_stages_one_config_holds_always(self):
        config = AgentConfig()
        assert all(config.at(progress) is config for progress in (None, nan, -1, 0, 0.5, 1, 2))

    def test_the_paper_s_schedule(self):
        config = AgentConfig(stages=paper_stages())
        for progress in (0, 0.2, 0.399):
            assert config.at(progress) == AgentConfig()
        for progress in (0.4, 0.7, 1):
            later = config.at(progress)
            assert (later.ratio, later.sx, later.sy) == (0.4, 2, 2)
            assert plan_layer(later, 64, 64, 1).action == "merge"

    @pytest.mark.parametrize(
        ("stages", "ratios"),
        [
            (early(0.6), {0.59: 0.1, 0.6: None, 1.0: None}),
            ([Stage(0.5)], {0.49: 0.1, 0.5: None}),
            (early(0.9, since=0.5, after=TOKEN_MERGING), {0: None, 0.49: None, 0.5: 0.1, 0.89: 0.1, 0.9: 0.4, 1: 0.4}),
        ],
    )
    def test_what_they_leave_out_is_untouched(self, stages, ratios):
        config = AgentConfig(ratio=0.1, stages=stages)
        assert {progress: getattr(config.at(progress), "ratio", None) for progress in ratios} == ratios

    @pytest.mark.parametrize("progress", [None, -0.001, 1.001, nan, inf])
    def test_outside_the_diffusion_stages_stand_down(self, progress):
        assert AgentConfig(stages=[Stage(1.0)]).at(progress) is None

    @pytest.mark.parametrize("until", [0, -1, 1.01, nan, "abc", None, True, [1]])
    def test_a_bad_end_is_an_error(self, until):
        with pytest.raises(SettingError, match="until"):
            Stage(until)
        with pytest.raises(SettingError, match="until"):
            early(until)

    @pytest.mark.parametrize("since", [-1, 1.01, nan, "abc", None, [1], 0.5, 0.7])
    def test_a_bad_beginning_is_an_error(self, since):
        with pytest.raises(SettingError, match="since"):
            early(0.5, since=since)

    @pytest.mark.parametrize("settings", ["abc", 3, [("ratio", 0.1)]])
    def test_a_stage_s_settings_are_a_mapping(self, settings):
        with pytest.raises(SettingError, match="settings"):
            Stage(1.0, settings)

    def test_a_switch_is_ever_on_if_any_stage_says_so(self):
        config = AgentConfig(stages=[Stage(0.3, None), Stage(0.6, {"merge_mlp": True}), Stage(1.0)])
        assert any(config.values("merge_mlp"))
        assert any(config.values("merge_attn"))
        assert not any(config.values("merge_crossattn"))

    def test_parts_are_where_nothing_changes(self):
        assert AgentConfig().parts() == ((0.0, 1.0),)
        assert AgentConfig(stages=early(0.9, since=0.5)).parts() == ((0.0, 0.5), (0.5, 0.9), (0.9, 1.0))
        assert AgentConfig(stages=[Stage(0.5)]).parts() == ((0.0, 0.5), (0.5, 1.0))
