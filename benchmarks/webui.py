"""Whole images on a running WebUI: without a patch, with the host's token merging, and with agent attention.

    python -m benchmarks.webui --url http://127.0.0.1:7860

Install the extension and start the WebUI with --api. While it is measured it uses the fused kernel
(cross_attention_optimization "sdp-no-mem"); its own options are restored afterwards. The rounds are interleaved, and
results are written after each image; --resume adds the missing images. Seconds are those of the whole request: text
encoder, steps, VAE and response. The deviation is that of the image's pixels, ‖image − off‖ / ‖off‖, against the image
without a patch; --latents adds that of the final latent, by one image more of each way. With a checkpoint of random
weights neither says anything about pictures.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image as Picture
from tqdm import tqdm

from agentsd import __version__
from agentsd.settings.presets import PRESETS

from .machine import ROOT, processor
from .pages import fill
from .results import table
from .results import times as as_times

MODULE, PAGE = "benchmarks.webui", ROOT / "docs/measurements.md"
SCRIPT = "Agent Attention"
OPTIMIZATION = "cross_attention_optimization"
FUSED = "sdp-no-mem - scaled dot product without memory efficient attention"
MERGING = ("token_merging_ratio", "token_merging_ratio_hr")
# The host's decoder whose pixels are three fixed linear combinations of the latent's four channels, in 8 bits
DECODER, LINEAR = "sd_vae_decode_method", "Approx cheap"


@dataclass(frozen=True)
class Way:
    """One way to make the image.

    Attributes:
        label: its name in the table.
        agents: the panel's settings that differ from its defaults; None if the panel is off.
        merging: the ratio of the host's own token merging.
    """

    label: str
    agents: dict[str, Any] | None = None
    merging: float = 0.0


COMPARED = [name for name in PRESETS if name in ("Fast", "Balanced", "Faithful")]
WAYS = {
    "off": Way("off"),
    "host": Way("the host's token merging, .5", merging=0.5),
    "defaults": Way("the panel's defaults", {}),
    **{
        name.lower(): Way(f"preset {name}", dict(PRESETS[name]))
        for name in ("Fast", "Balanced", "Faithful")
        if name in PRESETS
    },
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


@dataclass
class Image:
    """One image to make.

    Attributes:
        name: its name in the table.
        body: the request for it.
        ways: the ways to make it.
        rounds: seconds of each way, round by round.
        passes: the extension's report of its sampling passes, for each way.
        deviations: relative deviation of the pixels from those without a patch, for each way.
        latents: the same of the final latents.
    """

    name: str
    body: dict[str, Any]
    ways: list[str]
    rounds: list[dict[str, float]] = field(default_factory=list)
    passes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    latents: dict[str, float] = field(default_factory=dict)

    def missing(self, rounds: int) -> Iterator[tuple[dict[str, float], str]]:
        """(round, way) of each image that is missing; each round begins with a different way."""
        while len(self.rounds) < rounds:
            self.rounds.append({})
        for number, times in enumerate(self.rounds):
            start = number % len(self.ways)
            yield from ((times, way) for way in self.ways[start:] + self.ways[:start] if way not in times)

    def rows(self) -> list[dict[str, Any]]:
        """A row of the table for each way: median seconds, and the median of the speed-up within each round."""
        rows = []
        for way in filter(set().union(*self.rounds).__contains__, WAYS):
            times = [seconds[way] for seconds in self.rounds if way in seconds]
            pairs = [(seconds["off"], seconds[way]) for seconds in self.rounds if {"off", way} <= set(seconds)]
            ratios = [off / t for off, t in pairs]
            row = {"image": self.name, "way": WAYS[way].label, "seconds": median(times), "ratios": ratios}
            more = {"deviation": self.deviations.get(way), "latent": self.latents.get(way)}
            speedup = median(ratios) if ratios else None
            rows.append({**row, "speedup": speedup, "passes": self.passes.get(way), **more})
        return rows


def plan_images(options: argparse.Namespace) -> list[Image]:
    """The images that the options ask for."""
    side = options.size
    body = {
        "prompt": "a cat",
        "seed": 1,
        "sampler_name": "Euler a",
        "cfg_scale": 7,
        "width": side,
        "height": side,
        "steps": options.steps,
        "save_images": False,
    }
    hires = {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "denoising_strength": options.denoising,
        "steps": options.hires_first,
        "hr_second_pass_steps": options.hires,
    }
    images = []
    if options.steps:
        images.append(Image(f"{side}×{side}, {options.steps} steps", body, options.ways))
    if options.hires:
        steps = f"{options.hires_first} step{'s' if options.hires_first > 1 else ''}"
        name = f"{side}×{side}, {steps}, hires to {2 * side}×{2 * side}, {options.hires} steps"
        images.append(Image(name, {**body, **hires}, options.hires_ways))
    return images


def make(webui: WebUI, body: dict[str, Any], way: Way) -> tuple[float, list[dict[str, Any]], np.ndarray]:
    """Seconds of one image, the extension's report of its sampling passes, and the pixels.

    Raises:
        RuntimeError: agent attention was on, and did nothing or stood down.
    """
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
    picture = Picture.open(io.BytesIO(base64.b64decode(response["images"][0])))
    return seconds, passes, np.asarray(picture, dtype=np.float64)


def measure(webui: WebUI, images: list[Image], rounds: int, write: Callable[[float], None]) -> None:
    """Make the missing images; `write` is called after each, with the seconds of an image of one step."""
    missing = [(image, times, way) for image in images for times, way in image.missing(rounds)]
    if not missing:
        return
    short = {**images[0].body, "steps": 1, "enable_hr": False}
    one_step = min(make(webui, short, WAYS["off"])[0] for _ in range(2))  # the first one warms up
    pixels: dict[tuple[str, str], np.ndarray] = {}
    with tqdm(missing, unit="image") as bar:
        for image, times, way in bar:
            bar.set_postfix_str(f"{image.name}, {WAYS[way].label}")
            times[way], image.passes[way], pixels[image.name, way] = make(webui, image.body, WAYS[way])
            if (off := pixels.get((image.name, "off"))) is not None:
                made = {way: picture for (name, way), picture in pixels.items() if name == image.name}
                image.deviations |= {way: _deviation(picture, off) for way, picture in made.items()}
            write(one_step)


def measure_latents(webui: WebUI, images: list[Image], write: Callable[[], None]) -> None:
    """Make one more image in each way, and compare the latents behind their pixels."""
    missing = [image for image in images if set(image.ways) - set(image.latents)]
    if not missing:
        return
    with webui.options(**{DECODER: LINEAR}):
        for image in tqdm(missing, desc="latents", unit="image"):
            ways = dict.fromkeys(("off", *image.ways))
            # what the host made of them, from −1…1 to 0…255
            made = {way: make(webui, image.body, WAYS[way])[2] / 127.5 - 1 for way in ways}
            image.latents |= {way: _deviation(latent, made["off"]) for way, latent in made.items()}
            write()


def _deviation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class ResultFile:
    """The results as JSON and as a table.

    Args:
        stem: path of the files without their endings.
        about: the checkpoint and the system; they must be the same in two runs.
        images: the images of this run.
        resume: add to the file if there is one.

    Raises:
        ValueError: the file to resume was measured with another checkpoint or on another system.
    """

    def __init__(self, stem: Path, about: dict[str, Any], images: list[Image], resume: bool) -> None:
        self.stem, self.about, self.images, self.one_step = stem, about, images, math.nan
        file = stem.with_suffix(".json")
        if resume and file.exists():
            self._resume(json.loads(file.read_text(encoding="utf-8")))
        stem.parent.mkdir(parents=True, exist_ok=True)

    def _resume(self, before: dict[str, Any]) -> None:
        for name, value in self.about.items():
            if before["about"].get(name) != value:
                raise ValueError(f"the results are of {name} {before['about'].get(name)}, this is {value}")
        self.one_step = before["one_step"]
        measured = {image["name"]: Image(**image) for image in before["images"]}
        for image in self.images:
            if image.name in measured:
                found = measured.pop(image.name)
                image.rounds, image.passes = found.rounds, found.passes
                image.deviations, image.latents = found.deviations, found.latents
        self.images += measured.values()

    def write(self, one_step: float | None = None) -> None:
        """Write both files; `one_step`: seconds of an image of one step, if they were measured."""
        self.one_step = self.one_step if one_step is None else one_step
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        out = {"about": self.about, "date": date, "one_step": self.one_step, "images": [vars(i) for i in self.images]}
        self.stem.with_suffix(".json").write_text(
            json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        self.stem.with_suffix(".md").write_text(self.table() + "\n", encoding="utf-8")

    def table(self) -> str:
        """The results as Markdown."""
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        head = ("image", "way", "s", "speed-up", "each round", "s per step", "deviation", "of the latent")
        rows = [_row(row) for image in self.images for row in image.rows()]
        return "\n".join([f"{about}. An image of one step takes {self.one_step:.3g} s.", "", *table(head, rows)])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    paces = [report["pace"] for report in row["passes"] or []]
    steps = "; ".join(
        ", ".join(f"{pace[kind]:.3g} {kind}" for kind in ("patched", "untouched") if pace.get(kind)) for pace in paces
    )
    each = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"]) or "–"
    deviations = ["–" if row[name] is None else f"{row[name]:.3g}" for name in ("deviation", "latent")]
    return (
        row["image"],
        row["way"],
        f"{row['seconds']:.3g}",
        as_times(row["speedup"]),
        each,
        steps or "–",
        *deviations,
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.webui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = {"nargs": "+", "choices": list(WAYS), "metavar": "WAY"}
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:7860", help="address of the WebUI (default http://127.0.0.1:7860)")
    add("--checkpoint", help="checkpoint to load first (default: keep the loaded one)")
    add("--rounds", type=int, default=3, help="rounds (default 3)")
    add("--size", type=int, default=512, help="side of the image in pixels; the hires pass doubles it (default 512)")
    add("--steps", type=int, default=20, help="steps of the image without a hires pass; 0 skips it (default 20)")
    add("--hires-first", type=int, default=20, help="steps of the first pass of the hires image (default 20)")
    add("--hires", type=int, default=5, help="steps of its second pass; 0 skips the image (default 5)")
    add("--denoising", type=float, default=0.6, help="denoising strength of the second pass (default 0.6)")
    listed = ", ".join(f"{name} ({way.label})" for name, way in WAYS.items())
    few = ["off", "host", "defaults"]
    add("--ways", **ways, default=few, help=f"one or more of {listed} (default {' '.join(few)})")
    add("--hires-ways", **ways, default=few, help="the same for the hires image")
    add("--latents", action="store_true", help="compare final latents too: one image more of each way")
    add("--resume", action="store_true", help="make only the images that are missing in the file")
    add("--publish", action="store_true", help="write the table into docs/measurements.md, too")
    add("--out", type=Path, default=Path("out/bench/webui"), help="stem of the result files (default out/bench/webui)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parser.parse_args(argv)
    webui = WebUI(options.url)
    if options.checkpoint:
        webui.call("/sdapi/v1/options", {"sd_model_checkpoint": options.checkpoint})
    checkpoint = webui.call("/sdapi/v1/options")["sd_model_checkpoint"]
    images = plan_images(options)
    try:
        about = {"agentsd": __version__, "checkpoint": checkpoint, "processor": processor()}
        file = ResultFile(options.out, about, images[:], options.resume)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    with webui.options(**{OPTIMIZATION: FUSED}):
        measure(webui, images, options.rounds, file.write)
        if options.latents:
            measure_latents(webui, images, file.write)
    print(file.table())
    if options.publish:
        fill(PAGE, MODULE, {"webui": file.table()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
