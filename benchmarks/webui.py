"""Whole images on a running WebUI: without a patch, with the host's token merging, and with agent attention.

    python -m benchmarks.webui --url http://127.0.0.1:7860

Install the extension and start the WebUI with --api. While it is measured it uses the fused kernel
(cross_attention_optimization "sdp-no-mem"); its own options are restored afterwards. Rounds are interleaved. Seconds
are those of the whole request: text encoder, steps, VAE and response. The deviation is that of the image's pixels,
‖image − off‖ / ‖off‖; with a checkpoint of random weights it says nothing about pictures.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from tqdm import trange

from agentsd import __version__
from agentsd.settings.presets import PRESETS

from .machine import PAGE, parser_for, processor
from .results import fill, table, times

MODULE = "benchmarks.webui"
SCRIPT = "Agent Attention"
OPTIMIZATION = "cross_attention_optimization"
FUSED = "sdp-no-mem - scaled dot product without memory efficient attention"
MERGING = ("token_merging_ratio", "token_merging_ratio_hr")


@dataclass(frozen=True)
class Way:
    """One way to make the image."""

    label: str
    agents: dict[str, Any] | None = None  # the panel's settings that differ from its defaults; None if it is off
    merging: float = 0.0  # the ratio of the host's own token merging


WAYS = {
    "off": Way("off"),
    "host": Way("the host's token merging, .5", merging=0.5),
    "defaults": Way("the panel's defaults", {}),
    **{name.lower(): Way(f"preset {name}", dict(PRESETS[name])) for name in ("Fast", "Balanced", "Faithful")},
    "grid": Way("grid agents, 4×4 cells", {"method": "agent", "agent_ratio": 0.9375}),
}


class WebUI:
    """The HTTP API of a WebUI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: Any = None) -> Any:
        """The response to a GET request, or to a POST request if there is a `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=3600) as response:
            return json.loads(response.read() or b"null")

    @contextmanager
    def options(self, **wanted: Any) -> Iterator[None]:
        """Set options in a `with` block. override_settings would not restore options that the host's file lacks."""
        before = self.call("/sdapi/v1/options")
        self.call("/sdapi/v1/options", wanted)
        try:
            yield
        finally:
            self.call("/sdapi/v1/options", {name: before[name] for name in wanted})


def images(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name in the table, and the request, of each image that the options ask for."""
    side = options.size
    body = {"prompt": "a cat", "seed": 1, "sampler_name": "Euler a", "cfg_scale": 7, "save_images": False}
    body |= {"width": side, "height": side}
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    hires |= {"steps": options.hires, "hr_second_pass_steps": options.hires}
    if options.steps:
        yield f"{side}×{side}, {options.steps} steps", {**body, "steps": options.steps}
    if options.hires:
        name = f"{side}×{side}, {options.hires} steps, hires to {2 * side}×{2 * side}, {options.hires} steps"
        yield name, {**body, **hires}


def measure(webui: WebUI, name: str, body: dict[str, Any], ways: list[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """Make an image in each way, each round beginning with a different one; the rows of the table."""
    taken, pixels = [], {}
    for number in trange(rounds, desc=name):
        start, seconds = number % len(ways), {}
        for way in ways[start:] + ways[:start]:
            seconds[way], pixels[way] = make(webui, body, WAYS[way])
        taken.append(seconds)
    for way in ways:
        ratios = [seconds["off"] / seconds[way] for seconds in taken]
        deviation = float(np.linalg.norm(pixels[way] - pixels["off"]) / np.linalg.norm(pixels["off"]))
        cells = (f"{median(seconds[way] for seconds in taken):.3g}", times(median(ratios)))
        yield (name, WAYS[way].label, *cells, ", ".join(f"{r:.2f}" for r in ratios), f"{deviation:.3g}")


def make(webui: WebUI, body: dict[str, Any], way: Way) -> tuple[float, np.ndarray]:
    """Seconds of one image, and the pixels; a RuntimeError says if agent attention did nothing or stood down."""
    settings = {"enabled": way.agents is not None, **(way.agents or {})}
    with webui.options(**dict.fromkeys(MERGING, way.merging)):
        start = time.perf_counter()
        response = webui.call("/sdapi/v1/txt2img", {**body, "alwayson_scripts": {SCRIPT: {"args": [settings]}}})
        seconds = time.perf_counter() - start
    passes = webui.call("/agent-attention/status")["passes"] if way.agents is not None else []
    if way.agents is not None and not any(set(report["calls"]) - {"untouched"} for report in passes):
        raise RuntimeError(f"agent attention did nothing: {passes}")
    if any(report["notes"] or report["obstacles"] for report in passes):
        raise RuntimeError(f"agent attention stood down: {passes}")
    picture = Image.open(io.BytesIO(base64.b64decode(response["images"][0])))
    return seconds, np.asarray(picture, dtype=np.float64)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_for(MODULE, __doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:7860", help="address of the WebUI (default %(default)s)")
    add("--checkpoint", help="checkpoint to load first (default: keep the loaded one)")
    add("--rounds", type=int, default=3, help="rounds (default 3)")
    add("--size", type=int, default=512, help="side of the image in pixels; the hires pass doubles it (default 512)")
    add("--steps", type=int, default=5, help="steps of the image without a hires pass; 0 skips it (default 5)")
    add("--hires", type=int, default=3, help="steps of each pass of the hires image; 0 skips it (default 3)")
    listed = ", ".join(f"{name} ({way.label})" for name, way in WAYS.items())
    add("--ways", nargs="+", choices=list(WAYS), metavar="WAY", default=["host", "defaults"], help=f"some of {listed}")
    add("--publish", action="store_true", help="write the table into docs/measurements.md, too")
    options = parser.parse_args(argv)
    webui, wanted = WebUI(options.url), dict(images(options))
    if options.checkpoint:
        webui.call("/sdapi/v1/options", {"sd_model_checkpoint": options.checkpoint})
    checkpoint = webui.call("/sdapi/v1/options")["sd_model_checkpoint"]
    ways = list(dict.fromkeys(("off", *options.ways)))
    with webui.options(**{OPTIMIZATION: FUSED}):
        first = next(iter(wanted.values()))
        for _ in range(2):  # warm up
            one_step = make(webui, {**first, "steps": 1, "enable_hr": False}, WAYS["off"])[0]
        rows = [row for name, body in wanted.items() for row in measure(webui, name, body, ways, options.rounds)]
    head = ("image", "way", "s", "speed-up", "each round", "deviation of the pixels")
    about = f"{processor()}; agentsd {__version__}; checkpoint {checkpoint}."
    text = "\n".join([f"{about} An image of one step takes {one_step:.3g} s.", "", *table(head, rows)])
    print(text)
    if options.publish:
        fill(PAGE, MODULE, {"webui": text})


if __name__ == "__main__":
    main()
