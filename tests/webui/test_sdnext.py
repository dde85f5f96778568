"""The extension in a real SD.Next, which announces no passes and has other options."""

from __future__ import annotations

import pytest
from host import Host, Result
from page import SECONDS, Panel, browser, number, size
from PIL import Image

from agentsd.app.timings import changed
from agentsd.panel.controls import element_id
from agentsd.settings import infotext
from agentsd.settings.schema import IMPLIED, SETTINGS
from agentsd.tuning.fingerprint import ordered_sites, structure_of
from agentsd.words import percent

# Its hires fix resizes by this mode; without force it would only upscale
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_upscaler": "Latent Nearest",
    "hr_resize_mode": 1,
    "hr_force": True,
    "hr_second_pass_steps": 3,
    "denoising_strength": 0.6,
}


@pytest.fixture(scope="module")
def plain(sdnext: Host) -> Result:
    return sdnext.txt2img()


@pytest.fixture
def leaves_no_trace(sdnext: Host, plain: Result):
    before = sdnext.state()
    yield
    assert sdnext.txt2img().pixels == plain.pixels
    assert sdnext.state()["tree"] == before["tree"]


NO_END = "this WebUI does not tell where a pass ends"


def says_nothing(made: Result) -> bool:
    return infotext.KEY not in made.infotext and infotext.NOTE not in made.infotext


def test_on_differs_and_repeats(sdnext: Host, leaves_no_trace, plain: Result):
    on = sdnext.txt2img([{}])
    assert changed(sdnext.status()["passes"][0]["calls"])
    assert on.pixels != plain.pixels
    assert sdnext.txt2img([{}]).pixels == on.pixels
    assert infotext.KEY in on.infotext
    assert says_nothing(plain)


def test_hires_fix_has_settings_of_its_own(sdnext: Host, leaves_no_trace):
    off = sdnext.txt2img(**HIRES)
    both = sdnext.txt2img([{"until": 1}], **HIRES)
    passes = sdnext.status()["passes"]
    assert [(one["hires"], one["latent"]) for one in passes] == [(False, [16, 16]), (True, [32, 32])]
    assert all(changed(one["calls"]) for one in passes)
    second = sdnext.txt2img([{"until": 1, "passes": "hires"}], **HIRES)
    assert [one["hires"] for one in sdnext.status()["passes"]] == [True]
    assert len({tuple(made.pixels) for made in (off, both, second)}) == 3


SCENARIOS = {
    "batches": {"batch_size": 2, "n_iter": 2},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
    "Heun": {"sampler_name": "Heun"},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M"},
    "no guidance": {"cfg_scale": 1},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(sdnext: Host, leaves_no_trace, scenario: str):
    body = SCENARIOS[scenario]
    off, on = sdnext.txt2img(**body), sdnext.txt2img([{"until": 1}], **body)
    assert len(on.pixels) == len(off.pixels)
    assert not set(on.pixels) & set(off.pixels)
    assert all(changed(one["calls"]) for one in sdnext.status()["passes"])


def test_img2img(sdnext: Host, leaves_no_trace):
    image, body = Image.radial_gradient("L").convert("RGB").resize((128, 128)), {"denoising_strength": 0.7}
    off = sdnext.img2img(image, **body)
    assert sdnext.img2img(image, [{"until": 1}], **body).pixels != off.pixels
    assert sdnext.img2img(image, **body).pixels == off.pixels


@pytest.mark.parametrize("hires", [False, True], ids=["first pass", "hires pass"])
@pytest.mark.parametrize("action", ["raise", "interrupt", "skip"])
def test_ways_out(sdnext: Host, leaves_no_trace, action: str, hires: bool):
    sdnext.arm(action, step=2, hires=hires)
    sdnext.txt2img([{"until": 1}], **(HIRES if hires else {}))
    assert sdnext.state()["armed"] == {}, "the probe has not acted"


OBSTACLES = {
    "ToMe": {"token_merging_method": "ToMe", "tome_ratio": 0.5},
    "ToDo": {"token_merging_method": "ToDo", "todo_ratio": 0.5},
    "HyperTile": {"hypertile_unet_enabled": True},  # last: it leaves a forward on each attention module
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_stands_down_beside_its_own(sdnext: Host, plain: Result, reason: str):
    with sdnext.options(**OBSTACLES[reason]):
        off, on = sdnext.txt2img(), sdnext.txt2img([{"until": 1}])
        assert reason in sdnext.status()["text"]
    if reason != "HyperTile":  # which draws its tiles at random
        assert on.pixels == off.pixels
    assert says_nothing(on)
    assert sdnext.txt2img().pixels == plain.pixels


def test_bad_value(sdnext: Host, leaves_no_trace, plain: Result):
    bad = sdnext.txt2img([True, 7])
    assert bad.pixels == plain.pixels
    assert "Ratio" in bad.info["extra_generation_params"][infotext.NOTE]
    assert infotext.KEY not in bad.infotext


def test_it_cannot_be_tuned_here_and_says_so(sdnext: Host, leaves_no_trace, plain: Result):
    made = sdnext.txt2img([{"tune": 0.05}])
    assert made.pixels == plain.pixels
    assert f"not tuned, {NO_END}" in sdnext.status()["text"]
    assert NO_END in made.info["extra_generation_params"][infotext.NOTE]
    assert says_nothing(made)


def test_what_was_tuned_elsewhere_is_used(sdnext: Host, leaves_no_trace, plain: Result):
    kind = pytest.importorskip("diffusers", reason="needs diffusers").UNet2DConditionModel
    sites = ordered_sites(kind.from_config(kind.load_config(sdnext.models / "tiny-sd/unet")))
    plan = f"first tuning 1 16x16 0.05 {structure_of(sites)} | method=pool sx=2 sy=2 | 0.0 {'a' * len(sites)}"
    on = sdnext.txt2img([{"tuning": plan}])
    assert f"tuned, U-Net output within {percent(0.05)}" in sdnext.status()["text"]
    assert on.pixels != plain.pixels
    assert f"tuning={plan}" in on.infotext
    # none are kept here
    auto = sdnext.txt2img([{"tuning": "auto"}])
    assert "so the other settings were used" in sdnext.status()["text"]
    assert auto.pixels == sdnext.txt2img([{}]).pixels


def test_axes_appear_once(sdnext: Host):
    labels = [x for x in sdnext.call("/agent-attention-probe/axes") if x.startswith("[Agent Attention]")]
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)


def test_settings_page(sdnext: Host):
    assert "Traceback" not in sdnext.console()
    with sdnext.options(agent_attention_log_level="debug"):
        assert sdnext.call("/agent-attention-probe/options", {"names": ["agent_attention_log_level"]}) == {
            "agent_attention_log_level": "debug"
        }


def test_panel(sdnext: Host):
    """Its page: the panel plans, an image is made and told of, and an infotext is read back."""
    settings = {
        "enabled": True,
        "ratio": 0.2,
        "use_rand": False,
        "agent_source": "similarity",
        "method": "agent",
        "until": 0.9,
    }
    made = sdnext.txt2img([settings])
    with browser(sdnext.url) as page:
        page.locator("#splash").wait_for(state="detached", timeout=120 * SECONDS)
        panel = Panel(page)
        assert not panel.get("enabled")
        panel.open()
        panel.unfold("tuner")
        assert f"Nothing can be tuned here: {NO_END}" in panel.text("tuned")
        assert not page.locator(f"#{element_id('txt2img', 'tune_next')}").first.is_visible()
        panel.set("min_tokens", 0)
        panel.set("until", 1)
        size(page, 128, 128)
        number(page, "txt2img_steps", 2)
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
