"""Our section of AUTOMATIC1111's settings page, and the panel's defaults, as a person uses them."""

from __future__ import annotations

import json

import pytest
from host import OURS, Host
from page import SECONDS, Panel, open_settings, reload


@pytest.fixture(autouse=True)
def _settings_are_put_back(a1111: Host):
    with a1111.options(
        agent_attention_preset="as saved", agent_attention_log_level="info", agent_attention_status_line=True
    ):
        yield


def test_each_option_is_explained_and_does_what_it_says(a1111: Host, page):
    open_settings(page)
    text = page.locator("#settings_agent_attention").inner_text()
    told = ("Settings → Defaults", "preset when the page loads", "messages in the console", "show the last run")
    assert all(what in text for what in (*told, "how close attention was"))
    page.locator("#setting_agent_attention_preset input").click()
    page.locator("#setting_agent_attention_preset li").filter(has_text="Faithful").click()
    page.locator("#setting_agent_attention_log_level label", has_text="warning").click()
    page.locator("#setting_agent_attention_status_line input").uncheck()
    page.locator("#settings_submit").click()
    page.wait_for_timeout(2 * SECONDS)
    found = a1111.call("/sdapi/v1/options")
    chosen = {"preset": "Faithful", "log_level": "warning", "status_line": False}
    assert {name: found[f"agent_attention_{name}"] for name in chosen} == chosen
    quiet = len(a1111.console())
    a1111.txt2img([{"method": "agent"}], width=64, height=64, steps=1)
    assert "[Agent Attention]" not in a1111.console()[quiet:]
    reload(page)
    panel = Panel(page)
    panel.open()
    page.wait_for_timeout(SECONDS)
    assert (panel.get("method"), panel.get("until")) == ("corrected", 1.0)
    assert panel.text("status").strip() == ""
    a1111.call("/sdapi/v1/options", {"agent_attention_log_level": "info"})
    a1111.txt2img([{"method": "agent"}], width=64, height=64, steps=1)
    assert "[Agent Attention] 64×64: " in a1111.console()[quiet:]


def test_the_webuis_own_defaults_keep_the_panels_controls(a1111: Host, page):
    """Settings → Defaults → Apply writes them, and the page starts with them after a restart of the UI."""
    with a1111.own_defaults({}) as file:
        reload(page)
        panel = Panel(page)
        panel.open()
        panel.set("agent_ratio", 0.9)
        panel.set("after", "token merging")
        panel.unfold("map")
        panel.check("record")
        open_settings(page, "Defaults")
        for button in ("view", "apply"):
            page.locator(f"#ui_defaults_{button}").click()
            page.wait_for_timeout(2 * SECONDS)
            assert f"{OURS}Agent ratio/value" in page.locator("#settings").inner_text() or button == "apply"
        saved = json.loads(file.read_text())
        assert saved[f"{OURS}Agent ratio/value"] == 0.9
        assert saved[f"{OURS}Afterwards/value"] == "token merging"
        assert not [key for key in saved if "ap moment" in key or "Record tokens" in key or "/Preset/" in key]
        a1111.reload_ui()
        reload(page)
        panel.open()
        assert (panel.get("agent_ratio"), panel.get("after")) == (0.9, "token merging")
