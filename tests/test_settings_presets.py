"""Presets, the older extension's infotext, and the pace of a run: no WebUI needed."""

from __future__ import annotations

import pytest

from agentsd import AgentConfig, paper_stages
from agentsd.app.timings import Pace, StepClock
from agentsd.settings import infotext, legacy, schema
from agentsd.settings.presets import CUSTOM, KEPT, PRESETS, preset_of


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_is_told_from_the_others(name):
    values = schema.check({**PRESETS[name], "enabled": True, "passes": "both"})
    for hires in (False, True):
        assert schema.to_config(values, hires=hires) is not None
    assert preset_of({**schema.DEFAULTS, **PRESETS[name]}) == name


def test_a_preset_leaves_the_users_own_affairs_alone():
    own = {"enabled": True, "fp32": True, "min_tokens": 4096, "seed": 5, "how_close": "5%", "tune": 0.01}
    assert set(own) == set(KEPT)
    assert preset_of({**schema.DEFAULTS, **own}) == preset_of(schema.DEFAULTS)
    assert not any(name in preset for preset in PRESETS.values() for name in KEPT)


def test_a_touched_control_makes_it_custom():
    for name, value in PRESETS["Paper"].items():
        other = schema.BY_NAME[name]
        text = {"choice": "x", "text": "auto" if name == "tuning" else "ratio=0.2"}
        changed = not value if other.kind == "flag" else text[other.kind] if other.kind in text else value + 1
        assert preset_of({**schema.DEFAULTS, **PRESETS["Paper"], name: changed}) in (CUSTOM, *PRESETS)
        assert preset_of({**schema.DEFAULTS, **PRESETS["Paper"], name: changed}) != "Paper"


def test_the_papers_preset_is_the_papers_config():
    values = schema.check({**PRESETS["Paper"], "enabled": True, "min_tokens": 0})
    assert schema.to_config(values) == AgentConfig(stages=paper_stages(), max_downsample="auto")


# The older extension, with its keys as the host's parser reads them

OLD = {
    "Steps": "30",
    "AgAt Active": "True",
    "AgAt Use Second Pass": "True",
    "AgAt Second Pass Step": "12",
    "AgAt First Pass sx": "3",
    "AgAt First Pass sy": "2",
    "AgAt First Pass Ratio": "0.35",
    "AgAt First Pass Agent Ratio": "0.9",
    "AgAt Second Pass sx": "2",
    "AgAt Second Pass sy": "2",
    "AgAt Second Pass Ratio": "0.4",
    "AgAt Second Pass Agent Ratio": "0.5",
    "AgAt Use FP32 Precision": "True",
    "AgAt Max Downsample": "2",
    "Fix Only": "False",
}


LOCAL = {row.name: row.default for row in schema.SETTINGS if row.local}


def read(params: dict) -> dict:
    return {row.name: infotext.reader(row.name)(params) for row in schema.SETTINGS if not row.local}


def test_an_image_of_the_older_extension_fills_our_controls():
    expected = {
        **schema.IMPLIED,
        "enabled": True,
        "agent_source": "similarity",
        "ratio": 0.35,
        "agent_ratio": 0.9,
        "sx": 3,
        "sy": 2,
        "fp32": True,
        "max_downsample": "2",
        "until": 0.4,
        "after": "token merging",
        "passes": "first",
    }
    assert {**LOCAL, **read(OLD)} == expected
    assert schema.to_config(schema.check(expected)) is not None


def test_its_hires_only_images_too():
    hires = {**OLD, "Fix Only": "True", "Hires steps": "20", "Denoising strength": "0.5"}
    found = read(hires)
    assert (found["passes"], found["hires_until"], found["until"]) == ("hires", 0.8, schema.IMPLIED["until"])


def test_its_second_step_may_never_come():
    assert read({**OLD, "AgAt Second Pass Step": "40"})["until"] == 1.0
    assert read({**OLD, "AgAt Second Pass Step": "0"})["until"] == schema.BY_NAME["until"].low


@pytest.mark.parametrize("broken", [{"AgAt First Pass sx": "0"}, {"Steps": "many"}, {"AgAt First Pass Ratio": "1.0"}])
def test_what_cannot_be_read_is_at_our_default(broken):
    found = read({**OLD, **broken})
    assert found["enabled"] is True
    assert schema.check(found) == {**LOCAL, **found}


def test_our_own_entry_counts_more_and_other_images_are_not_its():
    ours = {**OLD, infotext.KEY: "ratio=0.2"}
    assert read(ours)["ratio"] == 0.2
    assert legacy.read({"Steps": "20", "AgAt Active": "False"}) is None
    assert read({"Steps": "20", "Fix Only": "True"})["enabled"] is False


# Last run


def test_the_pace_is_told_for_calls_with_and_without_agents():
    times = iter([0.0, 9.0, 10.0, 11.0, 13.0, 15.5])
    clock = StepClock(lambda: next(times))
    for count in (0, 5, 10, 15, 15, 15):
        clock.lap(count)
    assert clock.pace().words() == "1.00 s per U-Net call with, 2.25 s without"


def test_no_pace_without_a_call():
    clock = StepClock()
    clock.lap(0)
    assert clock.pace().words() == ""


@pytest.mark.parametrize(
    ("pace", "slower"),
    [(Pace(1.2, 1.0), True), (Pace(1.01, 1.0), False), (Pace(0.5, 1.0), False), (Pace(1.0), False), (Pace(), False)],
)
def test_what_is_slower_than_without_is_known(pace, slower):
    assert pace.slower is slower
