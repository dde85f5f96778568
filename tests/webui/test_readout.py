"""The panel's summary in the page of a real AUTOMATIC1111 WebUI: it follows every control without asking the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from host import Host
from page import SECONDS, Panel, number, reload, size, wait_for_panel

from agentsd.webui.panel import element_id
from agentsd.webui.settings import DEFAULTS

SCRIPT = Path(__file__).parents[2] / "javascript" / "agent_attention.js"
HYPERTILE = {"hypertile_enable_unet": True}


@pytest.fixture
def panel(page, panel: Panel) -> Panel:
    panel.open()
    panel.choose("Fast")
    panel.set("min_tokens", 0)
    size(page, 512, 512)
    hires(page, False)
    return panel


def hires(page, on: bool) -> None:
    if page.locator("#txt2img_hr-visible-checkbox").is_checked() is not on:
        page.locator("#txt2img_hr > .label-wrap").click()
    page.wait_for_timeout(500)


def said(page, what: str, tab: str = "txt2img") -> str:
    """The summary, as soon as it says `what`."""
    element = element_id(tab, "summary")
    page.wait_for_function(
        "([id, what]) => document.getElementById(id).innerText.includes(what)",
        arg=[element, what],
        timeout=30 * SECONDS,
    )
    return page.locator(f"#{element}").first.inner_text()


def test_it_follows_the_size_and_the_settings(page, panel: Panel):
    assert said(page, "512×512: 4096 tokens → 256 agents in 5 layers")
    size(page, 768, 512)
    assert said(page, "768×512: 6144 tokens → 384 agents in 5 layers")
    panel.set("agent_ratio", 0.98)
    assert said(page, "→ 96 agents")
    panel.set("max_downsample", "4")
    assert said(page, "1536 tokens → 24 agents in 5 layers")


def test_the_hires_pass_has_a_line(page, panel: Panel):
    hires(page, True)
    number(page, "txt2img_hr_scale", 1.5)
    assert said(page, "Hires 768×768: 9216 tokens → 576 agents")
    panel.set("hires_until", 0.2)
    number(page, "txt2img_denoising_strength", 0.5)
    assert "Change “Until, hires pass”" in said(page, "50\u00a0% of the diffusion is done when this pass begins")


def test_where_nothing_happens_it_names_the_control(page, panel: Panel):
    panel.set("min_tokens", 5000)
    assert "Change “Minimum tokens”" in said(page, "size is too small")
    panel.set("min_tokens", 0)
    panel.set("agent_ratio", 0.2)
    assert "Change “Agent ratio”" in said(page, "agents are too many")


def test_img2img_counts_its_denoising_strength(page):
    page.locator("#tabs button", has_text="img2img").first.click()
    panel = Panel(page, "img2img")
    panel.open()
    panel.choose("Fast")
    size(page, 640, 512, "img2img")
    number(page, "img2img_denoising_strength", 0.75)
    assert said(page, "640×512: 5120 tokens → 320 agents", "img2img")
    number(page, "img2img_denoising_strength", 0.3)
    assert "Change “Until”" in said(page, "70\u00a0% of the diffusion is done", "img2img")
    page.locator("#tabs button", has_text="txt2img").first.click()


def test_no_slider_asks_the_server(page, panel: Panel):
    said(page, "512×512")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for ratio in (0.5, 0.8, 0.9, 0.98):
        panel.set("agent_ratio", ratio)
        page.wait_for_timeout(400)
    said(page, "→ 64 agents")
    assert not [url for url in asked if "agent-attention" in url or "/run/" in url or "queue" in url]


def test_loaded_twice_it_is_there_once(page, panel: Panel):
    page.add_script_tag(path=SCRIPT)
    size(page, 576, 512)
    text = said(page, "576×512")
    assert text.count("576×512") == 1
    panel.choose("Paper")
    assert said(page, "(2765 queries)")


def test_the_hosts_own_options_are_told(a1111: Host, page, panel: Panel):
    with a1111.options(**HYPERTILE):
        reload(page)
        Panel(page).open()
        assert "Settings → HyperTile" in said(page, "HyperTile is on")
    reload(page)
    Panel(page).open()
    said(page, "tokens →")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_overflows(a1111: Host, page, width: int, theme: str):
    other = page.context.browser.new_page(viewport={"width": width, "height": 1000})
    try:
        other.goto(f"{a1111.url}/?__theme={theme}", wait_until="domcontentloaded", timeout=120 * SECONDS)
        wait_for_panel(other)
        Panel(other).open()
        said(other, "tokens")
        wide = other.evaluate(
            """id => [...document.querySelectorAll(`#${id}, #${id} *`)].filter(e => e.offsetParent
            && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.className)""",
            element_id("txt2img"),
        )
        assert not wide
        assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        other.close()


def test_the_keyboard_reaches_every_control(page, panel: Panel):
    page.locator(f"#{element_id('txt2img', 'preset')} input").focus()
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        found = page.evaluate("document.activeElement.closest('[id^=txt2img_agent_attention_]')?.id ?? ''")
        reached.add(found.removeprefix("txt2img_agent_attention_"))
    assert not {name for name in DEFAULTS if name != "enabled"} - reached
