"""The extension in a real Forge and a real reForge: it loads, changes the image, and leaves no trace."""

from __future__ import annotations

import pytest
from host import Host, Result, with_record
from page import SECONDS, Panel, browser, paste
from test_states import bad_value_stops_nothing

from agentsd.app.token_map import FOREIGN, SMALLEST
from agentsd.panel.controls import element_id
from agentsd.settings import infotext
from agentsd.settings.schema import DEFAULTS, IMPLIED, SETTINGS

HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}


@pytest.fixture(scope="module")
def plain(forge: Host) -> Result:
    return forge.txt2img()


@pytest.fixture
def leaves_no_trace(forge: Host, plain: Result):
    before = forge.state()
    yield
    assert forge.txt2img().pixels == plain.pixels
    after = forge.state()
    assert (after["tree"], after["model"]) == (before["tree"], before["model"])


def test_on_differs_and_repeats(forge: Host, leaves_no_trace, plain: Result):
    on = forge.txt2img([{}])
    assert forge.status()["passes"][0]["calls"].keys() - {"untouched"}
    assert on.pixels != plain.pixels
    assert forge.txt2img([{}]).pixels == on.pixels
    assert infotext.KEY in on.infotext
    assert infotext.KEY not in plain.infotext


SCENARIOS = {
    "hires fix": HIRES,
    "LoRA": {"prompt": "a cat <lora:tinylora:1>"},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(forge: Host, leaves_no_trace, scenario: str):
    body = SCENARIOS[scenario]
    off, on = forge.txt2img(**body), forge.txt2img([{"until": 1}], **body)
    assert on.pixels != off.pixels
    passes = forge.status()["passes"]
    assert [one["hires"] for one in passes] == ([False, True] if "enable_hr" in body else [False])
    assert all(one["calls"].keys() - {"untouched"} for one in passes)
    assert forge.txt2img(**body).pixels == off.pixels


@pytest.mark.parametrize("hires", [False, True], ids=["first pass", "hires pass"])
@pytest.mark.parametrize("action", ["raise", "interrupt"])
def test_ways_out(forge: Host, leaves_no_trace, action: str, hires: bool):
    forge.arm(action, step=2, hires=hires)
    body = HIRES if hires else {}
    if action == "raise":
        with pytest.raises(RuntimeError, match="forced failure"):
            forge.txt2img([{"until": 1}], **body)
    else:
        forge.txt2img([{"until": 1}], **body)
    assert forge.state()["armed"] == {}, "the probe has not acted"


def test_self_attention_with_an_attention_patch_is_ours(forge: Host, leaves_no_trace):
    """With any attn1_patch active Forge hands context and value to self-attention: both are the tokens themselves."""
    with forge.interference(attn1_patch=True):
        off = forge.txt2img()
        on = forge.txt2img([{"until": 1}])
        status = forge.status()
    assert on.pixels != off.pixels
    assert status["passes"][0]["calls"].keys() - {"untouched"}
    assert status["notes"] == []


def test_rules(forge: Host, leaves_no_trace, plain: Result):
    rules = "downsample=2 until=0.5 max_downsample=2 method=pool | blocks=middle_block.* full"
    made = forge.txt2img([{"until": 1, "rules": rules}])
    assert forge.status()["passes"][0]["calls"]["pool"] > 0
    assert made.pixels not in (plain.pixels, forge.txt2img([{"until": 1}]).pixels)
    assert infotext.read(made.info["extra_generation_params"][infotext.KEY])["rules"] == rules


def test_bad_value(forge: Host, leaves_no_trace, plain: Result):
    bad = forge.txt2img([True, 7])
    assert bad.pixels == plain.pixels
    assert "Ratio" in bad.info["extra_generation_params"][infotext.NOTE]
    assert infotext.KEY not in bad.infotext


def test_a_bad_value_stops_nothing(forge: Host):
    with browser(forge.url) as page:
        bad_value_stops_nothing(page)


def test_axes_appear_once(forge: Host):
    labels = [x for x in forge.call("/agent-attention-probe/axes") if x.startswith("[Agent Attention]")]
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)


def test_sdxl(forge: Host):
    if not forge.has("tinysdxl"):
        pytest.skip(f"{forge.models} lacks tinysdxl")
    body = {"width": 256, "height": 256, "steps": 2}  # its largest layers have a quarter of the tokens
    forge.call("/sdapi/v1/options", {"sd_model_checkpoint": "tinysdxl.safetensors"})
    try:
        off, on = forge.txt2img(**body), forge.txt2img([{"until": 1}], **body)
        assert on.pixels != off.pixels
        tokens = {layer["tokens"] for layer in forge.status()["passes"][0]["layers"]}
        assert tokens == {256}, "the largest layers are at level 2"
        assert infotext.KEY in on.infotext
        assert forge.txt2img(**body).pixels == off.pixels
    finally:
        forge.call("/sdapi/v1/options", {"sd_model_checkpoint": "tinysd1.safetensors"})


def test_panel(forge: Host):
    """Forge's own API fails on any infotext: it is read back in the page."""
    changed = {"enabled": True, "method": "agent", "ratio": 0.4, "use_rand": False, "until": 0.9}
    changed["agent_source"] = "similarity"
    made = forge.txt2img([changed])
    with browser(forge.url) as page:
        panel = Panel(page)
        panel.open()
        panel.set("agent_ratio", 0.9)
        paste(page, made.infotext)
        page.wait_for_timeout(2 * SECONDS)
        assert panel.values() == {**IMPLIED, **changed}
        page.locator("#tabs button", has_text="Img2img").first.click()
        other = Panel(page, "img2img")
        other.open()
        assert other.values() == {**DEFAULTS, "enabled": True}


def test_token_map(forge: Host, leaves_no_trace):
    forge.txt2img(with_record({"method": "agent", "agent_source": "similarity", "ratio": 0.4}))
    with browser(forge.url) as page:
        panel = Panel(page)
        panel.open()
        assert panel.text("status").strip() == "", "it was not made here"
        panel.unfold("map")
        panel.press("map_show")
        page.locator(f"#{element_id('txt2img', 'map_image')} img").first.wait_for(timeout=30 * SECONDS)
        assert "256 tokens were merged into 154" in panel.text("map_text")
        assert FOREIGN in panel.text("map_text")
        picture = panel.picture("map_image").convert("HSV")
        assert picture.size == (SMALLEST, SMALLEST)
        assert picture.getextrema()[1][1] > 200, "clusters are coloured"
        moment = page.locator(f"#{element_id('txt2img', 'map_moment')} input[type=number]").first
        moment.fill("3")
        moment.blur()
        page.wait_for_function(
            "id => !document.getElementById(id).innerText.includes(', 0 of')",
            arg=element_id("txt2img", "map_text"),
            timeout=30 * SECONDS,
        )


def test_beside_reforges_own(forge: Host, leaves_no_trace):
    """Token merging is an option, HyperTile a script: each changes the layers, and keeps them."""
    if forge.kind != "reforge":
        pytest.skip("only reForge has both")
    with forge.options(token_merging_ratio=0.5):
        off, on = forge.txt2img(), forge.txt2img([{"until": 1}])
        assert "token merging" in forge.status()["text"]
    assert on.pixels == off.pixels
    assert infotext.KEY not in on.infotext
    tiles = {"alwayson_scripts": {"hypertile integrated": {"args": [True, 64, 1, 3, False]}}}
    off = forge.txt2img(width=256, height=256, **tiles)
    on = forge.txt2img([{"until": 1}], width=256, height=256, **tiles)
    assert on.pixels == off.pixels
    assert forge.status()["notes"]
    assert infotext.KEY not in on.infotext
