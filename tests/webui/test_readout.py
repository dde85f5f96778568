"""The panel's summary in the page of a real AUTOMATIC1111 WebUI: it follows every control, and says what is wrong."""

from __future__ import annotations

import pytest
from host import Host
from page import SECONDS, Panel, go_to, number, reload, size


@pytest.fixture
def panel(page, panel: Panel) -> Panel:
    if page.locator("#txt2img_hr-visible-checkbox").is_checked():
        page.locator("#txt2img_hr > .label-wrap").click()
    return prepared(panel, 512)


def prepared(panel: Panel, side: int) -> Panel:
    panel.open()
    panel.choose("Balanced")
    for name, value in (("method", "agent"), ("until", 0.6), ("min_tokens", 0)):
        panel.set(name, value)
    size(panel.page, side, 512, panel.tab)
    return panel


def test_it_follows_the_size_the_settings_and_the_hires_pass(page, panel: Panel):
    panel.said("512×512: 4096 tokens → 256 agents in 5 layers")
    size(page, 768, 512)
    panel.said("768×512: 6144 tokens → 384 agents in 5 layers")
    panel.set("agent_ratio", 0.98)
    panel.said("→ 96 agents")
    panel.set("max_downsample", "4")
    panel.said("1536 tokens → 24 agents in 5 layers")
    page.locator("#txt2img_hr > .label-wrap").click()
    number(page, "txt2img_hr_scale", 1.5)
    panel.said("Hires 1152×768: 13824 tokens → 216 agents")
    number(page, "txt2img_hr_resize_x", 1024)
    panel.said("Hires 1024×")
    number(page, "txt2img_hr_resize_x", 0)
    panel.set("hires_until", 0.2)
    number(page, "txt2img_denoising_strength", 0.5)
    assert "Change “Until, hires pass”" in panel.said("of the diffusion is done when this pass begins")
    page.locator("#txt2img_width input[type=number]").fill("8192")
    assert "4096" in panel.said("Width must be")


def test_img2img_counts_its_denoising_strength(page):
    go_to(page, "img2img")
    panel = prepared(Panel(page, "img2img"), 640)
    number(page, "img2img_denoising_strength", 0.75)
    panel.said("640×512: 5120 tokens → 320 agents")
    number(page, "img2img_denoising_strength", 0.3)
    assert "Change “Until”" in panel.said("of the diffusion is done when this pass begins")
    go_to(page, "txt2img")


def test_a_slider_asks_once_and_nothing_else_does(page, panel: Panel):
    panel.said("512×512: 4096 tokens → 256 agents")
    page.wait_for_timeout(2 * SECONDS)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(3 * SECONDS)
    assert not [url for url in asked if "agent-attention" in url]
    for ratio in (0.5, 0.8, 0.9, 0.98):
        panel.type("agent_ratio", str(ratio))
        page.wait_for_timeout(30)
    panel.said("→ 64 agents")
    page.wait_for_timeout(2 * SECONDS)
    assert 1 <= sum(url.endswith("/agent-attention/preview") for url in asked) <= 2
    assert not [url for url in asked if "/run/" in url or "queue" in url]


def test_the_hosts_own_options_are_told(a1111: Host, page, panel: Panel):
    with a1111.options(hypertile_enable_unet=True):
        reload(page)
        panel.open()
        assert "Settings → HyperTile" in panel.said("HyperTile is on")
    reload(page)
    panel.open()
    panel.said("tokens →")
