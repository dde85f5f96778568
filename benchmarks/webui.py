"""Whole images on a running WebUI: off, the host's token merging, and agent attention, in interleaved rounds.

    python -m benchmarks.webui --url http://127.0.0.1:7860

Start the WebUI with --api and the extension installed. It is set to the fused kernel (cross_attention_optimization
"sdp-no-mem") while it is measured, and gets its own settings back. The result is written after each image; --resume
adds what is missing to it. Seconds are those of the whole request: text encoder, steps, VAE and the answer.
"""

from __future__ import annotations

import argparse
import json
import platform
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

from tqdm import tqdm

SCRIPT = "Agent Attention"
OPTIMIZATION = "cross_attention_optimization"
FUSED = "sdp-no-mem - scaled dot product without memory efficient attention"
MERGING = ("token_merging_ratio", "token_merging_ratio_hr")


@dataclass(frozen=True)
class Way:
    """One way to make the image.

    Attributes:
        label: what the table calls it.
        agents: what differs from the panel's defaults; None where the panel is off.
        merging: ratio of the host's own token merging.
    """

    label: str
    agents: dict[str, Any] | None = None
    merging: float = 0.0


WAYS = {
    "off": Way("off"),
    "host": Way("the host's token merging, .5", merging=0.5),
    "defaults": Way("agent attention, the panel's defaults", {}),
    "all": Way("agent attention, the panel's defaults on all steps", {"until": 1.0}),
    "all8": Way("agent attention, 8 × 8 cells on all steps", {"until": 1.0, "agent_ratio": 0.984}),
}


class WebUI:
    """The HTTP API of a WebUI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=3600) as answer:
            return json.loads(answer.read() or b"null")

    @contextmanager
    def options(self, **wanted: Any) -> Iterator[None]:
        """Options for a while: override_settings would leave those behind that the host's file does not name."""
        before = self.call("/sdapi/v1/options")
        self.call("/sdapi/v1/options", wanted)
        try:
            yield
        finally:
            self.call("/sdapi/v1/options", {name: before[name] for name in wanted})


@dataclass
class Image:
    """One image, the ways to make it, and the seconds of each way, round by round."""

    name: str
    body: dict[str, Any]
    ways: list[str]
    rounds: list[dict[str, float]] = field(default_factory=list)
    passes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def missing(self, rounds: int) -> Iterator[tuple[dict[str, float], str]]:
        """The round and the way of each image still to be made, beginning at another way in each round."""
        while len(self.rounds) < rounds:
            self.rounds.append({})
        for turn, times in enumerate(self.rounds):
            start = turn % len(self.ways)
            yield from ((times, way) for way in self.ways[start:] + self.ways[:start] if way not in times)

    def rows(self) -> list[dict[str, Any]]:
        """Medians, and the median of each round's own ratio to "off"."""
        found = []
        for way in filter(set().union(*self.rounds).__contains__, WAYS):
            times = [one[way] for one in self.rounds if way in one]
            both = [(one["off"], one[way]) for one in self.rounds if {"off", way} <= set(one)]
            speedup = median(off / t for off, t in both) if both else None
            row = {"image": self.name, "way": WAYS[way].label, "rounds": len(times), "seconds": median(times)}
            found.append({**row, "speedup": speedup, "passes": self.passes.get(way)})
        return found


def images(options: argparse.Namespace) -> list[Image]:
    """What is made."""
    side = options.size
    first = {
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
    found = []
    if options.steps:
        found.append(Image(f"{side} × {side}, {options.steps} steps", first, options.ways))
    if options.hires:
        steps = f"{options.hires_first} step{'s' if options.hires_first > 1 else ''}"
        name = f"{side} × {side}, {steps}, hires to {2 * side} × {2 * side}, {options.hires} steps"
        found.append(Image(name, {**first, **hires}, options.hires_ways))
    return found


def make(webui: WebUI, body: dict[str, Any], way: Way) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that one image takes, and what the extension tells of its passes.

    Raises:
        RuntimeError: agent attention was asked for and did nothing, or stood down.
    """
    settings = {"enabled": way.agents is not None, **(way.agents or {})}
    with webui.options(**dict.fromkeys(MERGING, way.merging)):
        start = time.perf_counter()
        webui.call("/sdapi/v1/txt2img", {**body, "alwayson_scripts": {SCRIPT: {"args": [settings]}}})
        seconds = time.perf_counter() - start
    passes = webui.call("/agent-attention/status")["passes"] if way.agents is not None else []
    if way.agents is not None and not any(set(one["calls"]) - {"untouched"} for one in passes):
        raise RuntimeError(f"agent attention did nothing: {passes}")
    if any(one["notes"] or one["obstacles"] for one in passes):
        raise RuntimeError(f"agent attention stood down: {passes}")
    return seconds, passes


def measure(webui: WebUI, todo: list[Image], rounds: int, write: Callable[[float], None]) -> None:
    """Make the images that are missing; `write` is given the seconds of an image of one step, and called after each."""
    missing = [(image, *one) for image in todo for one in image.missing(rounds)]
    if not missing:
        return
    short = {**todo[0].body, "steps": 1, "enable_hr": False}
    one_step = min(make(webui, short, WAYS["off"])[0] for _ in range(2))  # the first warms up
    with tqdm(missing, unit="image") as bar:
        for image, times, way in bar:
            bar.set_postfix_str(f"{image.name}, {WAYS[way].label}")
            times[way], image.passes[way] = make(webui, image.body, WAYS[way])
            write(one_step)


class File:
    """The results, as JSON and as a table.

    Raises:
        ValueError: resuming what was measured with another checkpoint or another WebUI.
    """

    def __init__(self, stem: Path, about: dict[str, Any], todo: list[Image], resume: bool) -> None:
        self.json, self.markdown = (stem.with_name(stem.name + ending) for ending in (".json", ".md"))
        self.about, self.todo, self.runs = about, todo, []
        if resume and self.json.exists():
            self._take(json.loads(self.json.read_text(encoding="utf-8")))
        stem.parent.mkdir(parents=True, exist_ok=True)

    def _take(self, before: dict[str, Any]) -> None:
        for name, value in self.about.items():
            if before["about"].get(name) != value:
                raise ValueError(f"{self.json} was measured with {name} {before['about'].get(name)}, this is {value}")
        self.runs = before["runs"]
        known = {image["name"]: image for image in before["images"]}
        for image in self.todo:
            image.rounds = known.get(image.name, {}).get("rounds", [])
            image.passes = known.get(image.name, {}).get("passes", {})
        here = {image.name for image in self.todo}
        self.todo += [Image(**image) for name, image in known.items() if name not in here]

    def write(self, one_step: float) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        run = {"date": now, "one_step": one_step}
        out = {"about": self.about, "runs": [*self.runs, run], "images": [vars(image) for image in self.todo]}
        self.json.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.markdown.write_text(self.table(one_step), encoding="utf-8")

    def table(self, one_step: float) -> str:
        rows = [row for image in self.todo for row in image.rows()]
        told = ", ".join(f"{name} {value}" for name, value in self.about.items())
        lines = [f"{told}. An image of one step takes {one_step:.3g} s.", ""]
        lines += ["| image | way | s | speed-up | rounds | s a step |", "|---|---|---|---|---|---|"]
        return "\n".join([*lines, *map(_row, rows), ""])


def _row(row: dict[str, Any]) -> str:
    speedup = "–" if row["speedup"] is None else f"{row['speedup']:.2f}×"
    paces = [one["pace"] for one in row["passes"] or []]
    steps = "; ".join(
        ", ".join(f"{pace[kind]:.3g} {kind}" for kind in ("patched", "untouched") if pace.get(kind)) for pace in paces
    )
    cells = (row["image"], row["way"], f"{row['seconds']:.3g}", speedup, str(row["rounds"]), steps or "–")
    return "| " + " | ".join(cells) + " |"


def make_parser() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.webui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = {"nargs": "+", "choices": list(WAYS), "metavar": "WAY"}
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:7860", help="where the WebUI answers (default http://127.0.0.1:7860)")
    add("--checkpoint", help="load this checkpoint first (default: the one that is loaded)")
    add("--rounds", type=int, default=3, help="rounds (default 3)")
    add("--size", type=int, default=512, help="side of the image, which the hires pass doubles (default 512)")
    add("--steps", type=int, default=20, help="steps of the image without hires pass; 0 leaves it out (default 20)")
    add("--hires-first", type=int, default=20, help="steps of the hires image's first pass (default 20)")
    add("--hires", type=int, default=5, help="steps of its second pass; 0 leaves it out (default 5)")
    add("--denoising", type=float, default=0.6, help="denoising strength of the second pass (default 0.6)")
    listed = ", ".join(f"{name} ({way.label})" for name, way in WAYS.items())
    add("--ways", **ways, default=["off", "host", "defaults", "all"], help=f"of {listed}; the default leaves out all8")
    add("--hires-ways", **ways, default=["off", "host", "defaults"], help="the same for the hires image")
    add("--resume", action="store_true", help="make only the images that are missing in the file")
    add(
        "--out", type=Path, default=Path("out/bench/webui"), help="stem of the results' files (default out/bench/webui)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parser.parse_args(argv)
    webui = WebUI(options.url)
    if options.checkpoint:
        webui.call("/sdapi/v1/options", {"sd_model_checkpoint": options.checkpoint})
    checkpoint = webui.call("/sdapi/v1/options")["sd_model_checkpoint"]
    todo = images(options)
    try:
        about = {"checkpoint": checkpoint, "system": platform.system()}
        file = File(options.out, about, list(todo), options.resume)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    with webui.options(**{OPTIMIZATION: FUSED}):
        measure(webui, todo, options.rounds, file.write)
    print(file.markdown.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
