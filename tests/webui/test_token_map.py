"""The token map in the page of a real AUTOMATIC1111 WebUI: asked for, drawn over the last image, gone with the next."""

from __future__ import annotations

import re

import numpy as np
import pytest
from host import Host, with_record
from page import SECONDS, Panel, generate, paste, size
from PIL import Image

from agentsd.app.token_map import FOREIGN, RECORD, SMALLEST
from agentsd.panel.controls import element_id

PAPER = {"agent_source": "similarity", "ratio": 0.4, "until": 0.4, "after": "token merging"}


def tokens_of(picture: Image.Image, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a map have a dot, and which a colour (rows × columns each)."""
    pixels = np.asarray(picture.convert("RGB"), dtype=int)
    side = picture.width / columns
    dots, colours = np.zeros((rows, columns), bool), np.zeros((rows, columns), bool)
    for y, x in np.ndindex(rows, columns):
        middle = [pixels[int((y + 0.5 + dy) * side), int((x + 0.5 + dx) * side)] for dy in (0, 0.1) for dx in (0, 0.1)]
        corner = pixels[int((y + 0.15) * side), int((x + 0.15) * side)]
        dots[y, x] = np.min(middle) >= 235
        colours[y, x] = corner.max() - corner.min() > 40
    return dots, colours


@pytest.fixture(scope="module", autouse=True)
def _prepared(a1111: Host, page):
    """The API's prompt, sampler and seed in the page: its own sampler makes NaNs of random weights."""
    paste(page, a1111.txt2img().infotext)
    panel = Panel(page)
    panel.open()
    panel.unfold("map")


@pytest.fixture
def told(page, panel: Panel):
    """Press the button; the words that then appear."""

    def press(what: str) -> str:
        panel.press("map_show")
        panel.said(what, "map_text")
        page.wait_for_timeout(SECONDS)
        return panel.text("map_text")

    return press


def record(page, on: bool) -> None:
    page.locator(f"#{element_id('txt2img', 'record')} input").set_checked(on)


def slide(page, name: str, value: int) -> None:
    field = page.locator(f"#{element_id('txt2img', name)} input[type=number]").first
    field.fill(str(value))
    field.blur()
    page.wait_for_timeout(2 * SECONDS)


def test_without_a_record_it_says_what_to_do(page, panel: Panel, told):
    panel.choose("Paper")
    record(page, False)
    size(page, 256, 192)
    generate(page)
    assert RECORD in told("No record was kept")
    assert not page.locator(f"#{element_id('txt2img', 'map_image')}").is_visible()


def test_it_shows_the_clusters_and_the_agents_that_were_used(page, panel: Panel, told):
    panel.choose("Paper")
    size(page, 256, 192)
    record(page, True)
    generate(page)
    text = told("First pass")
    assert "32×24 tokens" in text
    merged, agents = (int(re.search(what, text)[1]) for what in (r"merged into (\d+)", r"Dots: (\d+) agents"))
    assert (merged, agents) == (461, 48)
    picture = panel.picture("map_image")
    assert picture.size == (SMALLEST, SMALLEST * 192 / 256)
    dots, colours = tokens_of(picture, 24, 32)
    assert dots.sum() == agents
    assert (dots.reshape(6, 4, 8, 4).sum((1, 3)) == 1).all(), "an agent in each cell of 4 × 4 tokens"
    # a cluster that lost m tokens to merging has m + 1 coloured ones
    assert 768 - merged < colours.sum() <= 2 * (768 - merged)


def test_the_sliders_lead_to_other_moments_and_layers(page, panel: Panel, told):
    first, before = told("First pass"), panel.picture("map_image").tobytes()
    slide(page, "map_layer", 2)
    assert "Layer 2 of 5" in panel.text("map_text")
    assert panel.picture("map_image").tobytes() != before
    slide(page, "map_moment", 4)
    text = panel.text("map_text")
    assert "Dots" in first
    assert "Dots" not in text, "token merging follows the agents"
    assert not tokens_of(panel.picture("map_image"), 24, 32)[0].any()


def test_grid_agents_leave_the_images_colours(page, panel: Panel, told):
    panel.choose("Balanced")
    panel.set("method", "agent")
    generate(page)
    assert "Dots: 48 agents, each the mean of its cell" in told("mean of its cell")
    shown = panel.picture("map_image")
    made = page.locator("#txt2img_gallery img").first
    assert made.is_visible()
    pixels = np.asarray(shown.convert("RGB"), dtype=int)
    middles = pixels[48::96, 48::96][:6, :8]
    assert (middles >= 235).all(), "a dot in the middle of each cell"


def test_a_click_shows_what_the_window_opens(page, panel: Panel, told):
    panel.choose("Faithful")
    generate(page)
    assert "Click on a window" in told("Click on a window")
    before = panel.picture("map_image").tobytes()
    page.locator(f"#{element_id('txt2img', 'map_image')} img").click(position={"x": 20, "y": 20})
    panel.said("Tinted: those of the outlined window", "map_text")
    page.wait_for_timeout(SECONDS)
    assert panel.picture("map_image").tobytes() != before


def test_the_map_of_a_new_image_comes_by_itself_and_goes_with_the_record(page, panel: Panel, told):
    panel.choose("Balanced")
    generate(page)
    panel.said("one token of each cell", "map_text")
    record(page, False)
    generate(page)
    assert RECORD in told("No record was kept")
    assert not page.locator(f"#{element_id('txt2img', 'map_image')}").is_visible()


def test_a_map_of_somebody_elses_image_says_so(a1111: Host, page, panel: Panel, told):
    record(page, True)
    panel.choose("Paper")
    generate(page)
    assert FOREIGN not in told("tokens were merged")
    a1111.txt2img(with_record(PAPER), width=192, height=128)
    assert "24×16 tokens" in told(FOREIGN)


def test_where_nothing_was_done_it_says_why(a1111: Host, told):
    a1111.txt2img(with_record({"min_tokens": 9999}), width=64, height=64, steps=1)
    assert "to be gained from layers of 64 tokens" in told("There is nothing to show")
    with a1111.options(token_merging_ratio=0.5):
        a1111.txt2img(with_record(PAPER), width=64, height=64, steps=1)
    assert "token merging" in told("There is nothing to show")


def test_the_hires_pass_of_an_image_that_is_not_square(a1111: Host, page, panel: Panel, told):
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    a1111.txt2img(with_record({**PAPER, "hires_until": 1.0}), width=200, height=120, **hires)
    assert "25×15 tokens" in told("First pass")
    last = page.locator(f"#{element_id('txt2img', 'map_moment')} input[type=range]").get_attribute("max")
    slide(page, "map_moment", int(last))
    text = panel.text("map_text")
    assert "Hires pass" in text
    assert "37×22 tokens" in text
    assert panel.picture("map_image").size == (3 * 8 * 37, 3 * 8 * 22), "the hires image is 296 × 176"


def test_asking_for_it_changes_no_pixel_and_leaves_no_trace(a1111: Host):
    before = a1111.state()
    plain, without = a1111.txt2img(), a1111.txt2img([PAPER])
    assert a1111.txt2img(with_record(PAPER)).pixels == without.pixels
    assert a1111.txt2img().pixels == plain.pixels
    after = a1111.state()
    assert (after["tree"], after["model"]) == (before["tree"], before["model"])
