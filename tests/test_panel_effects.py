"""Settings that have no effect beside the others are known, with the reason: found by running the methods."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from blocks import inputs, one_block_unet, run

from agentsd import AgentConfig, patched
from agentsd.config import FIELDS
from agentsd.methods import selectable
from agentsd.plan import settings_read
from agentsd.settings import check
from agentsd.settings.idle import idle

UNET, GIVEN = one_block_unet(), inputs(1, 32, 32)
BASE = {"max_downsample": 1, "max_agents": 1000, "sx": 8, "sy": 8, "agent_source": "grid"}
# Another value for each setting, which has an effect wherever it is read
OTHER = {"ratio": 0.2, "max_downsample": 8, "sx": 4, "sy": 4, "agent_ratio": 0.8, "k_scale2": 0.9, "k_shortcut": 0.5}
OTHER |= {"attn_precision": "fp32", "min_tokens": 5000, "max_agents": 33, "seed": 7, "exact_ratio": 0.2}
# They change nothing where nothing is done in any case
VETOES = {"max_downsample", "min_tokens", "merge_attn"}
CASES = [
    *[{"method": method.name, "ratio": ratio} for method, ratio in product(selectable(), (0.0, 0.4))],
    {"method": "agent", "agent_source": "similarity", "ratio": 0.0},
    {"method": "agent", "ratio": 0.4, "use_rand": False},
    {"method": "corrected", "ratio": 0.4, "merge_mlp": True},
    {"method": "pool", "ratio": 0.0, "merge_mlp": True},
    {"merge_attn": False, "ratio": 0.0},
    {"merge_attn": False, "ratio": 0.4, "merge_crossattn": True},
]


def made(settings, half=False):
    with patched(UNET, **settings), torch.autocast("cpu", torch.bfloat16, enabled=half):
        return run(UNET, GIVEN)


def others(name, settings):
    """Other values of a setting."""
    field, value = FIELDS[name], settings.get(name, FIELDS[name].default)
    if field.kind == "flag":
        return [not value]
    return [OTHER[name]] if name in OTHER else [choice for choice in field.choices if choice != value]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_read_changes_the_image_and_nothing_else_does(case):
    settings = {**BASE, **case}
    plain = {half: made(settings, half) for half in (False, True)}
    changing = {
        name
        for name in FIELDS
        for half in [name == "attn_precision"]  # it makes a difference there only
        if any(not torch.equal(made({**settings, name: other}, half), plain[half]) for other in others(name, settings))
    }
    assert changing | VETOES == settings_read(AgentConfig(**settings)) | VETOES


@pytest.mark.parametrize(
    ("values", "reasons"),
    [
        ({}, {"k_scale2": "Method is corrected", "sx": "Method is corrected", "after": "Until is 1.0"}),
        ({}, {"ratio": "Method is corrected", "seed": "Ratio is 0.0 and Method is corrected"}),
        ({"ratio": 0.4}, {"ratio": "Method is corrected", "merge_mlp": None}),
        ({"method": "agent"}, {"sx": "Ratio is 0.0", "merge_mlp": "Ratio is 0.0", "k_scale2": None, "ratio": None}),
        ({"method": "agent", "ratio": 0.4, "use_rand": False}, {"seed": "Random partition is off", "sx": None}),
        ({"method": "merge"}, {"fp32": "Method is merge", "agent_ratio": "Method is merge"}),
        ({"merge_attn": False, "ratio": 0.4}, {"method": "Merge self-attention is off", "fp32": ""}),
        ({"passes": "first"}, {"hires_until": "Passes is first", "until": None}),
        ({"passes": "hires"}, {"until": "Passes is hires", "after": "Until, hires pass is 1.0"}),
        ({"until": 0.5, "after": "token merging"}, {"after": None, "seed": None, "ratio": "Method is corrected"}),
        ({"rules": "downsample=1 method=agent"}, dict.fromkeys(check({}))),
    ],
    ids=str,
)
def test_the_reason_names_what_would_give_a_setting_an_effect(values, reasons):
    found = idle(check({"enabled": True, **values}))
    for name, reason in reasons.items():
        assert (name in found) == (reason is not None), name
        assert found.get(name, "No effect while .").startswith(f"No effect while {reason or ''}")
        assert found.get(name, ".").endswith(".")
