"""Whole images on a running WebUI: off, the host's token merging, and agent attention, interleaved.

    python -m benchmarks.webui --url http://127.0.0.1:7860

Start the WebUI with --api and the extension installed. It is set to the fused kernel (cross_attention_optimization
"sdp-no-mem") while it is measured, and gets its own settings back.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from agentsd.webui.settings import DEFAULTS, NAMES

SCRIPT = "Agent Attention"
OPTIMIZATION = "cross_attention_optimization"
FUSED = "sdp-no-mem - scaled dot product without memory efficient attention"
MERGING = ("token_merging_ratio", "token_merging_ratio_hr")
OFF, HOST, OURS = "off", "the host's token merging, .5", "agent attention, all steps"


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


def bodies(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The images to make, by name."""
    first = {
        "prompt": "a cat",
        "seed": 1,
        "sampler_name": "Euler a",
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "steps": options.steps,
        "save_images": False,
    }
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    return {
        f"512 × 512, {options.steps} steps": first,
        f"512 × 512, {options.hires_first} steps, hires to 1024 × 1024, {options.hires} steps": {
            **first,
            **hires,
            "steps": options.hires_first,
            "hr_second_pass_steps": options.hires,
        },
    }


def image(webui: WebUI, body: dict[str, Any], way: str, agents: dict[str, Any]) -> float:
    """Seconds that one image takes."""
    ratio = 0.5 if way == HOST else 0.0
    values = {**DEFAULTS, **agents, "enabled": way == OURS}
    scripts = {SCRIPT: {"args": [values[name] for name in NAMES]}}
    with webui.options(**dict.fromkeys(MERGING, ratio)):
        start = time.perf_counter()
        webui.call("/sdapi/v1/txt2img", {**body, "alwayson_scripts": scripts})
        return time.perf_counter() - start


def measure(webui: WebUI, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Median seconds and speed-ups of each image, each way; the rounds are interleaved. Yields what there is so far."""
    rows: list[dict[str, Any]] = []
    kinds, ways = bodies(options), (OFF, HOST, OURS)
    with tqdm(total=len(kinds) * len(ways) * options.rounds, unit="image") as bar:
        image(webui, {**kinds[next(iter(kinds))], "steps": 1}, OFF, options.agents)  # a warm-up
        for name, body in kinds.items():
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(options.rounds):
                for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                    bar.set_postfix_str(f"{name}, {way}")
                    times[way].append(image(webui, body, way, options.agents))
                    bar.update()
            for way in ways:
                speedup = median(off / t for off, t in zip(times[OFF], times[way], strict=True))
                result = {"seconds": median(times[way]), "speedup": speedup, "times": times[way]}
                rows.append({"image": name, "way": way, **result})
            yield rows


def write(rows: list[dict[str, Any]], checkpoint: str, options: argparse.Namespace) -> str:
    """Write the results, and return them as a table."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"checkpoint": checkpoint, "system": platform.system(), "rounds": options.rounds, "agents": options.agents}
    out = {**about, "date": date, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(out), encoding="utf-8")
    return markdown(out)


def markdown(out: dict[str, Any]) -> str:
    """The results as a table."""
    lines = ["| image | way | s | speed-up |", "|---|---|---|---|"]
    lines += [f"| {r['image']} | {r['way']} | {r['seconds']:.3g} | {r['speedup']:.2f}× |" for r in out["rows"]]
    return "\n".join([f"{out['checkpoint']}, {out['rounds']} rounds, {out['date']}.", "", *lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.webui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:7860", help="where the WebUI answers (default http://127.0.0.1:7860)")
    add("--rounds", type=int, default=3, help="rounds (default 3)")
    add("--steps", type=int, default=20, help="steps of the 512 × 512 image (default 20)")
    add("--hires-first", type=int, default=20, help="steps of the hires image's first pass (default 20)")
    add("--hires", type=int, default=5, help="steps of its second pass (default 5)")
    add(
        "--agents",
        type=json.loads,
        default={"until": 1.0},
        metavar="JSON",
        help='panel settings (default {"until": 1})',
    )
    add(
        "--out", type=Path, default=Path("out/bench/webui"), help="stem of the results' files (default out/bench/webui)"
    )
    options = parser.parse_args(argv)
    webui = WebUI(options.url)
    checkpoint = webui.call("/sdapi/v1/options")["sd_model_checkpoint"]
    table = ""
    with webui.options(**{OPTIMIZATION: FUSED}):
        for rows in measure(webui, options):
            table = write(rows, checkpoint, options)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
