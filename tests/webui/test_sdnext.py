"""The extension in a real SD.Next, which announces no passes and has other options."""

from __future__ import annotations

import pytest
from host import Host, acted
from page import SECONDS, Panel, browser, size
from PIL import Image

from agentsd.settings import infotext
from agentsd.settings.schema import IMPLIED, SETTINGS
from agentsd.tuning.fingerprint import ordered_sites, structure_of
from agentsd.words import percent

# Its hires fix resizes by this mode; without force it would only upscale
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent Nearest", "hr_resize_mode": 1, "hr_force": True}
HIRES |= {"hr_second_pass_steps": 3, "denoising_strength": 0.6}
NO_END = "this WebUI does not tell where a pass ends"
ALL = [{"until": 1}]


def says_nothing(made) -> bool:
    return infotext.KEY not in made.infotext and infotext.NOTE not in made.infotext


SCENARIOS = {
    "as it comes": {},
    "batches": {"batch_size": 2, "n_iter": 2},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
    "Heun": {"sampler_name": "Heun"},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M"},
    "no guidance": {"cfg_scale": 1},
    "img2img": {"denoising_strength": 0.7},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(sdnext: Host, leaves_no_trace, scenario: str):
    body, image = SCENARIOS[scenario], Image.radial_gradient("L").convert("RGB").resize((128, 128))

    def make(agents=None):
        return sdnext.img2img(image, agents, **body) if scenario == "img2img" else sdnext.txt2img(agents, **body)

    off, on = make(), make(ALL)
    assert all(acted(one) for one in sdnext.status()["passes"])
    assert len(on.pixels) == len(off.pixels)
    assert not set(on.pixels) & set(off.pixels)
    assert make(ALL).pixels == on.pixels
    assert infotext.KEY in on.infotext
    assert says_nothing(off)


def test_hires_fix_has_settings_of_its_own(sdnext: Host, leaves_no_trace):
    off, both = sdnext.txt2img(**HIRES), sdnext.txt2img(ALL, **HIRES)
    passes = sdnext.status()["passes"]
    assert [(one["hires"], one["latent"]) for one in passes] == [(False, [16, 16]), (True, [32, 32])]
    assert all(acted(one) for one in passes)
    second = sdnext.txt2img([{"until": 1, "passes": "hires"}], **HIRES)
    assert [one["hires"] for one in sdnext.status()["passes"]] == [True]
    assert len({tuple(made.pixels) for made in (off, both, second)}) == 3


@pytest.mark.parametrize("hires", [False, True], ids=["first pass", "hires pass"])
@pytest.mark.parametrize("action", ["raise", "interrupt", "skip"])
def test_ways_out(sdnext: Host, leaves_no_trace, action: str, hires: bool):
    sdnext.arm(action, step=2, hires=hires)
    sdnext.txt2img(ALL, **(HIRES if hires else {}))
    assert sdnext.state()["armed"] == {}, "the probe has not acted"


OBSTACLES = {
    "ToMe": {"token_merging_method": "ToMe", "tome_ratio": 0.5},
    "ToDo": {"token_merging_method": "ToDo", "todo_ratio": 0.5},
    "HyperTile": {"hypertile_unet_enabled": True},  # last: it leaves a forward on each attention module
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_stands_down_beside_its_own(sdnext: Host, reason: str):
    plain = sdnext.plain
    with sdnext.options(**OBSTACLES[reason]):
        off, on = sdnext.txt2img(), sdnext.txt2img(ALL)
        assert reason in sdnext.status()["text"]
    assert on.pixels == off.pixels or reason == "HyperTile"  # which draws its tiles at random
    assert says_nothing(on)
    assert sdnext.txt2img().pixels == plain.pixels


def test_a_bad_value_and_an_order_to_tune_make_the_plain_image(sdnext: Host, leaves_no_trace):
    for asked, reason in (([True, 7], "Ratio"), ([{"tune": 0.05}], NO_END)):
        made = sdnext.txt2img(asked)
        assert made.pixels == sdnext.plain.pixels
        assert reason in sdnext.status()["text"]
        assert reason in made.written[infotext.NOTE]
        assert infotext.KEY not in made.infotext
    assert says_nothing(made)


def test_what_was_tuned_elsewhere_is_used(sdnext: Host, leaves_no_trace):
    kind = pytest.importorskip("diffusers", reason="needs diffusers").UNet2DConditionModel
    sites = ordered_sites(kind.from_config(kind.load_config(sdnext.models / "tiny-sd/unet")))
    plan = f"first tuning 1 16x16 0.05 {structure_of(sites)} | method=pool sx=2 sy=2 | 0.0 {'a' * len(sites)}"
    on = sdnext.txt2img([{"tuning": plan}])
    assert f"tuned, U-Net output within {percent(0.05)}" in sdnext.status()["text"]
    assert on.pixels != sdnext.plain.pixels
    assert f"tuning={plan}" in on.infotext
    # none are kept here
    auto = sdnext.txt2img([{"tuning": "auto"}])
    assert "so the other settings were used" in sdnext.status()["text"]
    assert auto.pixels == sdnext.txt2img([{}]).pixels


def test_its_axes_and_settings_page(sdnext: Host):
    labels = sdnext.our_axes()
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)
    assert "Traceback" not in sdnext.console()
    with sdnext.options(agent_attention_log_level="debug"):
        told = sdnext.call("/agent-attention-probe/options", {"names": ["agent_attention_log_level"]})
    assert told == {"agent_attention_log_level": "debug"}


def test_panel(sdnext: Host):
    """Its page: the panel plans, an image is made and told of, and an infotext is read back."""
    settings = {"enabled": True, "ratio": 0.2, "use_rand": False, "method": "agent", "until": 0.9}
    settings["agent_source"] = "similarity"
    made = sdnext.txt2img([settings])
    with browser(sdnext.url) as page:
        page.locator("#splash").wait_for(state="detached", timeout=120 * SECONDS)
        panel = Panel(page)
        assert not panel.get("enabled")
        panel.open()
        panel.unfold("tuner")
        assert f"Nothing can be tuned here: {NO_END}" in panel.text("tuned")
        assert not panel.at("tune_next").is_visible()
        panel.set("min_tokens", 0)
        panel.set("until", 1)
        size(page, 128, 128, steps=2)
        page.locator("#txt2img_prompt textarea").fill("a cat")
        page.wait_for_timeout(3 * SECONDS)
        assert "128×128" in panel.text("summary")
        page.locator("#txt2img_generate").click()
        assert "128×128: 256 tokens" in panel.said("Last run", "status")
        page.locator("#txt2img_prompt textarea").fill(made.infotext)
        page.locator("#txt2img_paste").click()
        for _ in range(60):
            if panel.get("ratio") == settings["ratio"]:
                break
            page.wait_for_timeout(SECONDS)
        assert panel.values() == {**IMPLIED, **settings, "min_tokens": 0}
