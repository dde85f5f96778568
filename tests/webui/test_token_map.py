"""The token map in the page of a real AUTOMATIC1111 WebUI: asked for, drawn over the last image, gone with the next."""

from __future__ import annotations

import pytest
from host import Host, with_record
from page import SECONDS, Panel, generate, paste, size

from agentsd.app.token_map import FOREIGN, RECORD, SMALLEST

PAPER = {"agent_source": "similarity", "ratio": 0.4, "until": 0.4, "after": "token merging"}


@pytest.fixture(scope="module", autouse=True)
def _prepared(a1111: Host, page):
    """The API's prompt, sampler and seed in the page: its own sampler makes NaNs of random weights."""
    paste(page, a1111.plain.infotext)
    size(page, 256, 192)
    panel = Panel(page)
    panel.open()
    panel.unfold("map")


@pytest.fixture
def panel(page) -> Panel:
    return Panel(page)


@pytest.fixture
def told(page, panel: Panel):
    """Press the button; the words that then appear."""

    def press(what: str) -> str:
        panel.press("map_show")
        panel.said(what, "map_text")
        page.wait_for_timeout(SECONDS)
        return panel.text("map_text")

    return press


def test_without_a_record_it_says_what_to_do(page, panel: Panel, told):
    panel.choose("Paper")
    generate(page)
    assert RECORD in told("No record was kept")
    assert not panel.at("map_image").is_visible()


def test_it_shows_the_clusters_and_agents_that_were_used_at_each_moment_and_layer(page, panel: Panel, told):
    panel.choose("Paper")
    panel.check("record")
    generate(page)
    text = told("First pass")
    assert "32×24 tokens" in text
    assert "merged into 461" in text
    assert "Dots: 48 agents" in text
    picture = panel.picture("map_image")
    assert picture.size == (SMALLEST, SMALLEST * 192 / 256)
    assert picture.convert("HSV").getextrema()[1][1] > 200, "clusters are coloured"
    panel.slide("map_layer", 2)
    assert "Layer 2 of 5" in panel.text("map_text")
    assert panel.picture("map_image").tobytes() != picture.tobytes()
    panel.slide("map_moment", 4)
    assert "Dots" not in panel.text("map_text"), "token merging follows the agents"


def test_a_click_shows_what_the_window_opens(page, panel: Panel, told):
    panel.choose("Faithful")
    generate(page)
    assert "Click on a window" in told("Click on a window")
    before = panel.picture("map_image").tobytes()
    panel.at("map_image", "img").click(position={"x": 20, "y": 20})
    panel.said("Tinted: those of the outlined window", "map_text")
    page.wait_for_timeout(SECONDS)
    assert panel.picture("map_image").tobytes() != before


def test_the_map_of_a_new_image_comes_by_itself_and_goes_with_the_record(page, panel: Panel, told):
    panel.choose("Balanced")
    panel.check("record")
    generate(page)
    panel.said("one token of each cell", "map_text")
    panel.check("record", False)
    generate(page)
    assert RECORD in told("No record was kept")
    assert not panel.at("map_image").is_visible()


def test_a_map_of_somebody_elses_image_says_so_and_why_nothing_was_done(a1111: Host, page, panel: Panel, told):
    panel.check("record")
    panel.choose("Paper")
    generate(page)
    assert FOREIGN not in told("tokens were merged")
    a1111.txt2img(with_record(PAPER), width=192, height=128)
    assert "24×16 tokens" in told(FOREIGN)
    a1111.txt2img(with_record({"min_tokens": 9999}), width=64, height=64, steps=1)
    assert "to be gained from layers of 64 tokens" in told("There is nothing to show")
    with a1111.options(token_merging_ratio=0.5):
        a1111.txt2img(with_record(PAPER), width=64, height=64, steps=1)
    assert "token merging" in told("There is nothing to show")


def test_the_hires_pass_of_an_image_that_is_not_square(a1111: Host, page, panel: Panel, told):
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    a1111.txt2img(with_record({**PAPER, "hires_until": 1.0}), width=200, height=120, **hires)
    assert "25×15 tokens" in told("First pass")
    panel.slide("map_moment", int(panel.at("map_moment", "input[type=range]").get_attribute("max")))
    text = panel.text("map_text")
    assert "Hires pass" in text
    assert "37×22 tokens" in text
    assert panel.picture("map_image").size == (3 * 8 * 37, 3 * 8 * 22), "the hires image is 296 × 176"


def test_asking_for_it_changes_no_pixel(a1111: Host, leaves_no_trace):
    assert a1111.txt2img(with_record(PAPER)).pixels == a1111.txt2img([PAPER]).pixels
