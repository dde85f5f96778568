"""How the panel tells its states in a real AUTOMATIC1111 WebUI: bad values, interrupted runs, other people's runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from host import Host
from page import SECONDS, Panel, generate, go_to, paste, reload, send, size

from agentsd.settings import infotext
from agentsd.settings.schema import BY_NAME

RANGE = f"must be a whole number from 0 to {BY_NAME['min_tokens'].high}"


def bad_value_stops_nothing(page: Any) -> None:
    """What a person does who mistypes a number: a red line names it, and the image is made."""
    size(page, 128, 128, steps=2)
    panel = Panel(page)
    panel.open()
    for name, label, value in (("min_tokens", "Minimum tokens", -5), ("max_agents", "Maximum agents", 99999999999)):
        panel.switch(True)
        panel.set(name, value)
        assert f"{label} {RANGE}, got {value}" in panel.said(label)
        assert panel.at("summary", ".agent-attention-wrong").is_visible()
        assert infotext.KEY not in generate(page)
        panel.said(f"Not applied: {label} {RANGE}, got {value}", "status")
        top, below = (panel.at(part).bounding_box()["y"] for part in ("status", "preset"))
        assert top < below
        panel.switch(False)
        assert infotext.KEY not in generate(page)
        panel.switch(True)
        panel.set(name, 0)


@pytest.fixture
def panel(page) -> Panel:
    reload(page)
    panel = Panel(page)
    panel.open()
    return panel


def test_a_bad_value_stops_nothing(page, panel: Panel):
    bad_value_stops_nothing(page)


def test_an_interrupted_run_is_told_when_the_host_has_ended(a1111: Host, page, panel: Panel):
    size(page, 512, 512, steps=100)
    panel.unfold("map")
    panel.check("record")
    page.locator("#txt2img_generate").click()
    while a1111.call("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] < 3:
        page.wait_for_timeout(SECONDS)
    page.locator("#txt2img_interrupt").click()
    text = panel.said("Last run", "status")
    assert "512×512" in text
    assert re.search(r"Last run, \d{1,2}:\d\d", text), "the time"
    panel.said("64×64 tokens", "map_text")
    assert panel.at("map_image", "img").is_visible()
    a1111.txt2img([{"ratio": 7}])  # somebody else's
    reload(page)
    panel.open()
    assert "ratio" not in panel.said("512×512", "status")


@pytest.mark.parametrize(("way", "tab"), [("paste", "txt2img"), ("PNG Info", "img2img")])
def test_an_infotext_counts_more_than_the_pages_preset(a1111: Host, page, way: str, tab: str, tmp_path):
    chosen = {"ratio": 0.2, "sx": 3, "method": "pool", "until": 0.9}
    made = a1111.txt2img([chosen], width=64, height=64, steps=1)
    with a1111.options(agent_attention_preset="Paper"):
        reload(page)
        if way == "paste":
            paste(page, made.infotext, tab)
        else:
            send(page, made.infotext, made.images[0], tmp_path, tab)
        page.wait_for_timeout(4 * SECONDS)
        panel = Panel(page, tab)
        panel.open()
        assert {name: panel.get(name) for name in chosen} == chosen
    go_to(page, "txt2img")


@pytest.mark.parametrize(("label", "value"), [("Minimum tokens", -5), ("Until", 7)])
def test_a_bad_value_that_was_saved_stops_nothing(a1111: Host, page, label: str, value: float):
    """The page starts with it: a red line names it, and images are made."""
    with a1111.own_defaults({label: value}):
        reload(page)
        size(page, 128, 128, steps=2)
        assert infotext.NOTE not in generate(page), "while it is off nothing is checked"
        panel = Panel(page)
        panel.open()
        assert f"got {value}" in panel.said(f"{label} must be")
        assert infotext.NOTE not in generate(page), "nothing is written into an image that was made without us"
        assert f"not applied: {label} must be" in page.locator("#html_log_txt2img").first.inner_text()
        panel.said(f"Not applied: {label}", "status")


def test_the_panel_is_low_its_help_is_in_tooltips_and_what_has_no_effect_is_greyed(page, panel: Panel):
    panel.set("method", "corrected")
    control = panel.at("k_scale2")
    panel.at("", ".agent-attention-idle").wait_for(timeout=30 * SECONDS)
    assert control.get_attribute("title").startswith("No effect while Method is corrected.")
    panel.set("method", "agent")
    page.wait_for_function("element => !element.title.startsWith('No effect')", arg=control.element_handle())
    panel.unfold("more", False)
    page.wait_for_timeout(SECONDS)
    assert panel.at().bounding_box()["height"] <= 700
    assert all(panel.at(name).get_attribute("title") for name in ("ratio", "method", "until", "preset"))
