"""Presets in the page of a real AUTOMATIC1111 WebUI, and the settings page."""

from __future__ import annotations

import pytest
from host import Host
from page import SECONDS, Panel, paste, reload

from agentsd.settings.presets import CUSTOM, KEPT, PRESETS
from agentsd.settings.schema import BY_NAME, IMPLIED

OLDER = (
    "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, AgAt Active: True, AgAt Use Second Pass: "
    "True, AgAt Second Pass Step: 8, AgAt First Pass sx: 3, AgAt First Pass sy: 4, AgAt First Pass Ratio: 0.3, AgAt "
    "First Pass Agent Ratio: 0.9, AgAt Use FP32 Precision: True, AgAt Max Downsample: 2, AgAt Apply to Hires. Fix "
    "Only: False, Version: v1.10.1"
)


@pytest.fixture
def panel(panel: Panel) -> Panel:
    panel.open()
    return panel


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_the_controls_and_keeps_the_users_own(page, panel: Panel, name: str):
    panel.set("seed", 5)
    panel.set("fp32", True)
    own = {setting: value for setting, value in panel.values().items() if setting in KEPT}
    panel.choose(name)
    assert panel.values() == {**PRESETS[name], **own}
    panel.shows(name)


def test_the_older_extensions_infotext_fills_our_controls(page, panel: Panel):
    panel.choose("Fast")
    paste(page, OLDER)
    found = panel.values()
    wanted = {"ratio": 0.3, "agent_ratio": 0.9, "sx": 3, "sy": 4, "until": 0.4, "fp32": True, "passes": "first"}
    wanted |= {"agent_source": "similarity", "after": "token merging", "max_downsample": "2", "enabled": True}
    assert found == {**IMPLIED, **wanted}
    panel.shows(CUSTOM)


def test_sd2_suggests_32_bits(a1111: Host, page):
    with a1111.options(sd_model_checkpoint="tinysd2v.safetensors"):
        reload(page)
        panel = Panel(page)
        panel.open()
        panel.set("fp32", False)
        advice = f"“{BY_NAME['fp32'].label}”"
        panel.said(advice)
        panel.set("fp32", True)
        page.wait_for_timeout(2 * SECONDS)
        assert advice not in panel.text("summary")
