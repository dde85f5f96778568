"""What the preview says is what the run does, to the number of patched calls, on a real AUTOMATIC1111."""

from __future__ import annotations

from typing import Any

import pytest
from host import DEFAULTS, SMALL_IMAGES, Host, acted
from PIL import Image
from test_a1111 import HIRES

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
    "first pass only": ({**AGENTS, "passes": "first"}, HIRES),
    "hires pass only": ({**AGENTS, "passes": "hires"}, HIRES),
    "agents end before the hires pass": ({**AGENTS, "hires_until": 0.2}, HIRES),
    "small layers": ({**AGENTS, "min_tokens": 512}, {}),
    "tinysd2v": (LATE, {"width": 256, "height": 256}),
    "tinysdxl": (LATE, {"width": 256, "height": 256}),
    **{f"img2img at {s}": (LATE, {"denoising_strength": s, "steps": 8}) for s in (0.2, 0.5, 0.75, 1.0)},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is(a1111: Host, case: str):
    settings, body = CASES[case]
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
        state["hires"] = {"scale": asked["hr_scale"], "steps": asked.get("hr_second_pass_steps", 0)}
    elif "denoising_strength" in asked:
        state["tab"] = "img2img"
    a1111.use(case if case.startswith("tiny") else "tinysd1")
    try:
        foretold = [one for one in a1111.call("/agent-attention/preview", state)["passes"] if one["patched"]]
        if state["tab"] == "img2img":
            a1111.img2img(Image.radial_gradient("L").convert("RGB").resize((128, 128)), [settings], **body)
        else:
            a1111.txt2img([settings], **body)
        done = [one for one in a1111.status()["passes"] if acted(one)]
    finally:
        a1111.use("tinysd1")
    assert [(one["latent"], one["calls"]) for one in foretold] == [(one["latent"], one["calls"]) for one in done]
