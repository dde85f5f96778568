"""What the preview says is what the run does, to the number of patched calls, on a real AUTOMATIC1111."""

from __future__ import annotations

from typing import Any

import pytest
from host import DEFAULTS, SMALL_IMAGES, Host
from PIL import Image
from test_a1111 import HIRES, use_checkpoint

from agentsd.settings.presets import PRESETS

AGENTS = {"method": "agent"}
LATE = {"method": "agent", "since": 0.3, "until": 0.8}
RULES = {"rules": "downsample=2 until=0.5 max_downsample=2 method=pool | blocks=middle_block.* full", **AGENTS}
# settings, and what is asked of the host
CASES: dict[str, tuple[dict, dict]] = {
    "as it comes": ({}, {}),
    "256 × 192, a batch of 2": (AGENTS, {"width": 256, "height": 192, "batch_size": 2, "steps": 3}),
    "from and until": (LATE, {"steps": 9}),
    "another sampler": (LATE, {"steps": 7, "sampler_name": "DDIM"}),
    "another schedule": (LATE, {"steps": 7, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}),
    "a preset": (PRESETS["Paper"], {"steps": 7}),
    "rules": (RULES, {"steps": 5}),
    "deeper layers": ({**AGENTS, "max_downsample": "4"}, {}),
    "hires fix": ({**LATE, "hires_until": 0.9}, {**HIRES, "steps": 5}),
    "steps of the hires pass": ({**LATE, "hires_until": 0.9}, {**HIRES, "steps": 5, "hr_second_pass_steps": 3}),
    "hires pass only": ({**AGENTS, "passes": "hires"}, HIRES),
    "agents end before the hires pass": ({**AGENTS, "hires_until": 0.2}, HIRES),
    "small layers": ({**AGENTS, "min_tokens": 512}, {}),
    **{f"img2img at {s}": (LATE, {"denoising_strength": s, "steps": 8}) for s in (0.2, 0.5, 0.75, 1.0)},
}


def previewed(host: Host, settings: dict, body: dict) -> list[dict]:
    """The passes as the preview tells them, asked as the page asks."""
    asked = {**DEFAULTS, **body}
    state: dict[str, Any] = {
        "tab": "txt2img",
        "values": {**SMALL_IMAGES, **settings},
        **{name: asked[name] for name in ("width", "height", "steps")},
        "batch_size": asked.get("batch_size", 1),
        "sampler": asked["sampler_name"],
        "scheduler": asked.get("scheduler", "Automatic"),
        "denoising": asked.get("denoising_strength", 1.0),
    }
    if "enable_hr" in asked:
        sliders = {"scale": asked["hr_scale"], "resize_x": 0, "resize_y": 0}
        state["hires"] = {**sliders, "steps": asked.get("hr_second_pass_steps", 0)}
    elif "denoising_strength" in asked:
        state["tab"] = "img2img"
    return host.call("/agent-attention/preview", state)["passes"]


def ran(host: Host, settings: dict, body: dict) -> list[dict]:
    """The passes as the last run tells them."""
    if "denoising_strength" in body and "enable_hr" not in body:
        source = Image.radial_gradient("L").convert("RGB").resize((128, 128))
        host.img2img(source, [settings], **body)
    else:
        host.txt2img([settings], **body)
    return host.status()["passes"]


def equal(foretold: list[dict], done: list[dict]) -> None:
    patched = [one for one in foretold if one["patched"]]
    acted = [one for one in done if set(one["calls"]) - {"untouched"}]
    assert [one["latent"] for one in patched] == [one["latent"] for one in acted]
    assert [one["calls"] for one in patched] == [one["calls"] for one in acted]


@pytest.mark.parametrize("case", CASES)
def test_it_is(a1111: Host, case: str):
    settings, body = CASES[case]
    equal(previewed(a1111, settings, body), ran(a1111, settings, body))


@pytest.mark.parametrize("checkpoint", ["tinysd2v", "tinysdxl"])
def test_it_is_on_other_models(a1111: Host, checkpoint: str):
    use_checkpoint(a1111, checkpoint)
    try:
        body = {"width": 256, "height": 256}
        equal(previewed(a1111, LATE, body), ran(a1111, LATE, body))
    finally:
        use_checkpoint(a1111, "tinysd1")


@pytest.mark.parametrize("option", [{"token_merging_ratio": 0.5}, {"hypertile_enable_unet": True}])
def test_it_is_where_the_host_has_the_layers(a1111: Host, option: dict):
    with a1111.options(**option):
        foretold, done = previewed(a1111, AGENTS, {}), ran(a1111, AGENTS, {})
    assert [one["patched"] for one in foretold] == [False]
    equal(foretold, done)
