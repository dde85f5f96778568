"""The panel in a real AUTOMATIC1111 WebUI's page, in headless Chromium: filled in, generated from, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from host import OWN, Host
from page import SECONDS, Panel, generate, go_to, paste, reload, send, size, wait_for_panel
from test_a1111 import EVERYTHING

from agentsd.settings import infotext
from agentsd.settings.presets import CUSTOM, KEPT, PRESETS
from agentsd.settings.schema import BY_NAME, DEFAULTS, IMPLIED, SETTINGS

# with those of a tuning, which tests/webui/test_tune.py changes
ALL = {**IMPLIED, **EVERYTHING, "enabled": True}
OLDER = (
    "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, AgAt Active: True, AgAt Use Second Pass: "
    "True, AgAt Second Pass Step: 8, AgAt First Pass sx: 3, AgAt First Pass sy: 4, AgAt First Pass Ratio: 0.3, AgAt "
    "First Pass Agent Ratio: 0.9, AgAt Use FP32 Precision: True, AgAt Max Downsample: 2, AgAt Apply to Hires. Fix "
    "Only: False, Version: v1.10.1"
)


def test_starts_with_the_users_own_defaults(panel: Panel):
    wanted = {row.name: row.check(OWN.get(row.label, row.default)) for row in SETTINGS}
    assert panel.values() == {**wanted, "enabled": True}


def test_filled_in_generated_from_and_read_back(a1111: Host, page, panel: Panel):
    # prompt, sampler, seed and size as the API's; the page's own sampler makes NaNs of random weights
    paste(page, a1111.plain.infotext)
    panel.open()
    for name, value in EVERYTHING.items():
        panel.set(name, value)
    text = generate(page)
    entry = text.split(f"{infotext.KEY}: ")[1].split(",")[0]
    assert infotext.read(entry) == ALL
    assert f"{infotext.KEY}: {entry}" in a1111.txt2img([EVERYTHING]).infotext
    # read back into a page at the user's defaults
    reload(page)
    assert panel.get("enabled") is False
    paste(page, "a cat\n" + text.splitlines()[-1])
    panel.open()
    assert panel.values() == ALL
    panel.switch(False)
    size(page, 64, 64, steps=1)
    assert infotext.KEY not in generate(page), "off in the page is off"


def test_an_image_at_the_tables_defaults_undoes_the_users_own(a1111: Host, page, panel: Panel):
    made = a1111.txt2img([True], width=256, height=256, steps=1)  # smaller layers are left alone
    paste(page, made.infotext)
    panel.open()
    assert panel.values() == {**DEFAULTS, "enabled": True}


def test_an_image_made_without_us_unticks_the_box_and_keeps_the_rest(a1111: Host, page, panel: Panel):
    before = panel.values()
    paste(page, a1111.txt2img(width=64, height=64, steps=1).infotext)
    assert panel.get("enabled") is False
    panel.switch(True)
    assert panel.values() == before


def test_png_info_and_the_arrow_under_an_empty_prompt_bring_the_settings_back(a1111: Host, page, tmp_path: Path):
    made = a1111.txt2img([EVERYTHING], width=64, height=64)
    for bring in (lambda: send(page, made.infotext, made.images[0], tmp_path), lambda: paste(page, "")):
        reload(page)
        bring()
        panel = Panel(page)
        panel.open()
        assert panel.values() == ALL


def test_the_older_extensions_infotext_fills_our_controls(page, panel: Panel):
    panel.choose("Fast")
    paste(page, OLDER)
    wanted = {"ratio": 0.3, "agent_ratio": 0.9, "sx": 3, "sy": 4, "until": 0.4, "fp32": True, "passes": "first"}
    wanted |= {"agent_source": "similarity", "after": "token merging", "max_downsample": "2", "enabled": True}
    assert panel.values() == {**IMPLIED, **wanted}
    panel.shows(CUSTOM)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_the_controls_and_keeps_the_users_own(panel: Panel, name: str):
    panel.set("seed", 5)
    panel.set("fp32", True)
    own = {setting: value for setting, value in panel.values().items() if setting in KEPT}
    panel.choose(name)
    assert panel.values() == {**PRESETS[name], **own}
    panel.shows(name)


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


def test_two_pages_tell_of_their_own_runs(a1111: Host, page, panel: Panel):
    """Both press Generate at about the same time: the host makes one image after the other."""
    page_of_another = page.context.browser.new_page(viewport={"width": 1400, "height": 1300})
    page_of_another.goto(a1111.url, wait_until="domcontentloaded")
    wait_for_panel(page_of_another)
    panels = {256: panel, 192: Panel(page_of_another)}
    for side, one in panels.items():
        one.open()
        one.choose("Paper")
        one.set("min_tokens", 0)
        size(one.page, side, side, steps=4)
    for one in panels.values():
        one.page.locator("#txt2img_generate").click()
    for side, one in panels.items():
        one.said(f"{side}×{side}", "status")
    page_of_another.close()


def test_the_panel_is_in_img2img_too(page):
    go_to(page, "img2img")
    panel = Panel(page, "img2img")
    panel.open()
    # no defaults of the user's own there
    assert panel.values() == {**DEFAULTS, "enabled": True}
    assert BY_NAME["ratio"].label in panel.at().inner_text()
