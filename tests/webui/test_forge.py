"""The extension in a real Forge and a real reForge: it loads, changes the image, and leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from host import Host, acted, with_record
from page import SECONDS, Panel, browser, go_to, paste
from test_a1111 import HIRES
from test_states import bad_value_stops_nothing

from agentsd.app.token_map import FOREIGN, SMALLEST
from agentsd.settings import infotext
from agentsd.settings.schema import DEFAULTS, IMPLIED, SETTINGS

ALL = [{"until": 1}]
SCENARIOS = {
    "as it comes": {},
    "hires fix": HIRES,
    "LoRA": {"prompt": "a cat <lora:tinylora:1>"},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(forge: Host, leaves_no_trace, scenario: str):
    body = SCENARIOS[scenario]
    off, on = forge.txt2img(**body), forge.txt2img(ALL, **body)
    passes = forge.status()["passes"]
    assert on.pixels == forge.txt2img(ALL, **body).pixels != off.pixels
    assert (infotext.KEY in on.infotext, infotext.KEY in off.infotext) == (True, False)
    assert [one["hires"] for one in passes] == ([False, True] if "enable_hr" in body else [False])
    assert all(acted(one) for one in passes)
    assert forge.txt2img(**body).pixels == off.pixels


@pytest.mark.parametrize("hires", [False, True], ids=["first pass", "hires pass"])
@pytest.mark.parametrize("action", ["raise", "interrupt"])
def test_ways_out(forge: Host, leaves_no_trace, action: str, hires: bool):
    forge.arm(action, step=2, hires=hires)
    with pytest.raises(RuntimeError, match="forced failure") if action == "raise" else nullcontext():
        forge.txt2img(ALL, **(HIRES if hires else {}))
    assert forge.state()["armed"] == {}, "the probe has not acted"


def test_self_attention_with_an_attention_patch_is_ours(forge: Host, leaves_no_trace):
    """With any attn1_patch active Forge hands context and value to self-attention: both are the tokens themselves."""
    with forge.interference(attn1_patch=True):
        off, on = forge.txt2img(), forge.txt2img(ALL)
        status = forge.status()
    assert on.pixels != off.pixels
    assert acted(status["passes"][0])
    assert status["notes"] == []


def test_rules_and_a_bad_value(forge: Host, leaves_no_trace):
    rules = "downsample=2 until=0.5 max_downsample=2 method=pool | blocks=middle_block.* full"
    made = forge.txt2img([{"until": 1, "rules": rules}])
    assert forge.status()["passes"][0]["calls"]["pool"] > 0
    assert made.pixels not in (forge.plain.pixels, forge.txt2img(ALL).pixels)
    assert made.entry["rules"] == rules
    bad = forge.txt2img([True, 7])
    assert bad.pixels == forge.plain.pixels
    assert "Ratio" in bad.written[infotext.NOTE]
    assert infotext.KEY not in bad.infotext


def test_axes_appear_once(forge: Host):
    labels = forge.our_axes()
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)


def test_sdxl(forge: Host):
    if not forge.has("tinysdxl"):
        pytest.skip(f"{forge.models} lacks tinysdxl")
    body = {"width": 256, "height": 256, "steps": 2}  # its largest layers have a quarter of the tokens
    forge.use("tinysdxl")
    try:
        off, on = forge.txt2img(**body), forge.txt2img(ALL, **body)
        tokens = {layer["tokens"] for layer in forge.status()["passes"][0]["layers"]}
        assert tokens == {256}, "the largest layers are at level 2"
        assert infotext.KEY in on.infotext
        assert forge.txt2img(**body).pixels == off.pixels != on.pixels
    finally:
        forge.use("tinysd1")
        forge.txt2img()  # Forge loads a model when it is asked for an image


def test_panel(forge: Host, leaves_no_trace):
    """Forge's own API fails on any infotext: it is read back in the page, where the token map is drawn, too."""
    changed = {"enabled": True, "method": "agent", "ratio": 0.4, "use_rand": False, "until": 0.9}
    changed["agent_source"] = "similarity"
    made = forge.txt2img(with_record(changed))
    with browser(forge.url) as page:
        panel = Panel(page)
        panel.open()
        assert panel.text("status").strip() == "", "it was not made here"
        panel.unfold("map")
        panel.press("map_show")
        assert FOREIGN in panel.said("256 tokens were merged into 154", "map_text")
        page.wait_for_timeout(SECONDS)
        picture = panel.picture("map_image").convert("HSV")
        assert picture.size == (SMALLEST, SMALLEST)
        assert picture.getextrema()[1][1] > 200, "clusters are coloured"
        before = panel.text("map_text")
        panel.slide("map_moment", 3)
        assert panel.text("map_text") != before
        panel.set("agent_ratio", 0.9)
        paste(page, made.infotext)
        page.wait_for_timeout(2 * SECONDS)
        assert panel.values() == {**IMPLIED, **changed, "min_tokens": 0}
        go_to(page, "Img2img")
        other = Panel(page, "img2img")
        other.open()
        assert other.values() == {**DEFAULTS, "enabled": True}


def test_a_bad_value_stops_nothing(forge: Host):
    with browser(forge.url) as page:
        bad_value_stops_nothing(page)


def test_beside_reforges_own(forge: Host, leaves_no_trace):
    """Token merging is an option, HyperTile a script: each changes the layers, and keeps them."""
    if forge.kind != "reforge":
        pytest.skip("only reForge has both")
    with forge.options(token_merging_ratio=0.5):
        off, on = forge.txt2img(), forge.txt2img(ALL)
        assert "token merging" in forge.status()["text"]
    assert on.pixels == off.pixels
    assert infotext.KEY not in on.infotext
    tiles = {"alwayson_scripts": {"hypertile integrated": {"args": [True, 64, 1, 3, False]}}}
    off = forge.txt2img(width=256, height=256, **tiles)
    on = forge.txt2img(ALL, width=256, height=256, **tiles)
    assert on.pixels == off.pixels
    assert forge.status()["notes"]
    assert infotext.KEY not in on.infotext
