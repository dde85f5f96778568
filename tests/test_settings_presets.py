"""Presets and the older extension's infotext: no WebUI needed."""

from __future__ import annotations

import pytest

from agentsd import AgentConfig, paper_stages
from agentsd.settings import infotext, schema
from agentsd.settings.presets import CUSTOM, KEPT, PRESETS, preset_of

OWN = {"enabled": True, "fp32": True, "min_tokens": 4096, "seed": 5, "how_close": "5%", "tune": 0.01}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_told_from_the_others_and_leaves_the_users_own_affairs_alone(name):
    values = {**schema.DEFAULTS, **PRESETS[name], **OWN}
    assert set(OWN) == set(KEPT) == schema.DEFAULTS.keys() - PRESETS[name].keys()
    assert preset_of(schema.check(values)) == name
    assert preset_of({**values, "k_scale2": 0.31}) == CUSTOM
    for hires in (False, True):
        assert schema.to_config({**values, "passes": "both"}, hires=hires) is not None


def test_the_papers_preset_is_the_papers_config():
    values = schema.check({**PRESETS["Paper"], "enabled": True, "min_tokens": 0})
    assert schema.to_config(values) == AgentConfig(stages=paper_stages(), max_downsample="auto")


# The older extension's image, with its keys as the host's parser reads them
OLD = {"Steps": "30", "AgAt Active": "True", "AgAt Use Second Pass": "True", "AgAt Second Pass Step": "12"}
OLD |= {"AgAt First Pass sx": "3", "AgAt First Pass sy": "2", "AgAt First Pass Ratio": "0.35", "Fix Only": "False"}
OLD |= {"AgAt First Pass Agent Ratio": "0.9", "AgAt Use FP32 Precision": "True", "AgAt Max Downsample": "2"}
OURS = {
    "enabled": True,
    "agent_source": "similarity",
    "ratio": 0.35,
    "agent_ratio": 0.9,
    "sx": 3,
    "sy": 2,
    "fp32": True,
}
OURS |= {"max_downsample": "2", "until": 0.4, "after": "token merging", "passes": "first"}
HIRES = {"passes": "hires", "hires_until": 0.8, "until": schema.IMPLIED["until"]}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {}),
        ({"Fix Only": "True", "Hires steps": "20", "Denoising strength": "0.5"}, HIRES),
        # its second step may never come
        ({"AgAt Second Pass Step": "40"}, {"until": 1.0}),
        ({"AgAt Second Pass Step": "0"}, {"until": schema.BY_NAME["until"].low}),
        ({"AgAt Use Second Pass": "False"}, {"after": "nothing"}),
        # what can't be read is at our default
        ({"AgAt First Pass sx": "0"}, {"sx": schema.IMPLIED["sx"]}),
        ({"AgAt First Pass Ratio": "1.0"}, {"ratio": schema.IMPLIED["ratio"]}),
        ({"Steps": "many"}, {"until": schema.IMPLIED["until"]}),
    ],
    ids=str,
)
def test_an_image_of_the_older_extension_fills_our_controls(changes, found):
    values = {row.name: infotext.reader(row.name)({**OLD, **changes}) for row in schema.SETTINGS}
    local = {row.name: None for row in schema.SETTINGS if row.local}
    assert values == {**schema.IMPLIED, **OURS, **found, **local}
    assert schema.to_config(schema.check(values), hires=values["passes"] == "hires") is not None


def test_our_own_entry_counts_more_and_other_images_are_not_its():
    assert infotext.reader("ratio")({**OLD, infotext.KEY: "ratio=0.2"}) == 0.2
    for params in ({"Steps": "20", "Fix Only": "True"}, {**OLD, "AgAt Active": "False"}):
        assert [infotext.reader(name)(params) for name in ("enabled", "ratio")] == [False, None]
