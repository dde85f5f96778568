"""The panel in a real AUTOMATIC1111 WebUI's page, in headless Chromium: filled in, generated from, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from host import USER_DEFAULTS, Host
from page import Panel, generate, number, paste, reload, send

from agentsd.settings import infotext
from agentsd.settings.schema import BY_NAME, DEFAULTS, IMPLIED, SETTINGS

CHANGED: dict[str, Any] = {
    "enabled": True,
    "ratio": 0.4,
    "agent_ratio": 0.9,
    "k_scale2": 0.5,
    "k_shortcut": 0.1,
    "fp32": True,
    "agent_source": "similarity",
    "method": "agent",
    "since": 0.1,
    "until": 0.85,
    "hires_until": 0.95,
    "after": "token merging",
    "passes": "first",
    "max_downsample": "2",
    "min_tokens": 16,
    "max_agents": 99,
    "sx": 3,
    "sy": 5,
    "use_rand": False,
    "merge_attn": True,
    "merge_crossattn": True,
    "merge_mlp": True,
    "seed": 12,
    "rules": "downsample=2 method=pool | blocks=middle_block.* full",
    "exact_ratio": 0.14,
}
# with those of a tuning, which tests/webui/test_tune.py changes
ALL = {**IMPLIED, **CHANGED}


def test_starts_with_the_users_own_defaults(panel: Panel):
    panel.open()
    own = {key.split("/")[3]: value for key, value in USER_DEFAULTS.items()}
    wanted = {row.name: row.check(own.get(row.label, row.default)) for row in SETTINGS}
    assert panel.values() == {**wanted, "enabled": True}


def test_filled_in_generated_from_and_read_back(a1111: Host, page, panel: Panel):
    # prompt, sampler, seed and size as the API's; the page's own sampler makes NaNs of random weights
    paste(page, a1111.txt2img().infotext)
    panel.open()
    for name, value in CHANGED.items():
        if name != "enabled":
            panel.set(name, value)
    text = generate(page)
    entry = text.split(f"{infotext.KEY}: ")[1].split(",")[0]
    assert infotext.read(entry) == ALL
    assert f"{infotext.KEY}: {entry}" in a1111.txt2img([CHANGED]).infotext
    # read back into a page at the user's defaults
    reload(page)
    assert panel.get("enabled") is False
    paste(page, "a cat\n" + text.splitlines()[-1])
    panel.open()
    assert panel.values() == ALL


def test_an_image_at_the_tables_defaults_undoes_the_users_own(a1111: Host, page, panel: Panel):
    made = a1111.txt2img([True], width=256, height=256, steps=1)  # smaller layers are left alone
    paste(page, made.infotext)
    panel.open()
    assert panel.values() == {**DEFAULTS, "enabled": True}


def test_an_image_made_without_us_unticks_the_box_and_keeps_the_rest(a1111: Host, page, panel: Panel):
    panel.open()
    before = panel.values()
    paste(page, a1111.txt2img(width=64, height=64, steps=1).infotext)
    assert panel.get("enabled") is False
    panel.switch(True)
    assert panel.values() == before


def test_png_info_sends_to_txt2img(a1111: Host, page, panel: Panel, tmp_path: Path):
    made = a1111.txt2img([CHANGED], width=64, height=64, steps=4)  # some of them between From and Until
    send(page, made.infotext, made.images[0], tmp_path)
    panel.open()
    assert panel.values() == ALL


def test_off_in_the_page_is_off(page, panel: Panel):
    panel.switch(False)
    for element, value in {"txt2img_width": 64, "txt2img_height": 64, "txt2img_steps": 1}.items():
        number(page, element, value)
    assert infotext.KEY not in generate(page)


def test_the_status_line_tells_of_the_last_run(page, panel: Panel):
    panel.open()
    panel.set("ratio", 0.0)
    panel.set("min_tokens", 0)
    for element, value in {"txt2img_width": 128, "txt2img_height": 128, "txt2img_steps": 2}.items():
        number(page, element, value)
    generate(page)
    assert "128×128" in panel.said("agents", "status")


def test_the_panel_is_in_img2img_too(page):
    page.locator("#tabs button", has_text="img2img").first.click()
    panel = Panel(page, "img2img")
    panel.open()
    # no defaults of the user's own there
    assert panel.values() == {**DEFAULTS, "enabled": True}
    assert BY_NAME["ratio"].label in page.locator("#img2img_agent_attention").inner_text()
