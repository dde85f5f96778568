"""A ComfyUI checkout under test: start it beside a base folder of its own, and run graphs over its HTTP API."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = Path(__file__).resolve().parent / "pack"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Without its cache: an equal graph would be answered from there, without sampling
FLAGS = ("--cpu", "--cache-none", "--disable-auto-launch", "--disable-api-nodes", "--disable-metadata")
Nodes = dict[str, Any]


class GraphError(RuntimeError):
    """A graph was refused, or ended with an error; the text has what the host said."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def python_of(root: Path) -> str:
    """The Python of the checkout whose main.py is in `root`."""
    known = (root / "venv/bin/python", root.parent / "venv/bin/python", Path(sys.executable))
    return str(next(path for path in known if path.exists()))


class ComfyUI:
    """One checkout, with models, outputs and custom nodes in the empty folder `base`, and these node packs alone."""

    def __init__(self, root: Path, base: Path, packs: tuple[Path, ...]) -> None:
        self.root, self.base = root, base
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = base / "comfyui.log"
        self._process: subprocess.Popen | None = None
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
            (base / folder).mkdir(parents=True)
        for pack in packs:
            (base / "custom_nodes" / pack.name).symlink_to(pack)

    def start(self, patience: float = 240) -> None:
        command = [python_of(self.root), "main.py", "--port", self.url.rsplit(":", 1)[1], *FLAGS]
        command += ["--base-directory", str(self.base)]
        given = {"cwd": self.root, "env": {**os.environ, **OFFLINE}, "start_new_session": True}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **given)

        def answers() -> bool:
            assert self._process.poll() is None, self.output()[-3000:]
            with suppress(OSError):
                return bool(self.ask("/system_stats"))
            return False

        self.until(answers, patience)

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, done: Callable[[], Any], patience: float = 300) -> Any:
        """Wait until `done` returns something, and return that."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if found := done():
                return found
            time.sleep(0.05)
        raise TimeoutError(self.output()[-3000:])

    def ask(self, path: str, body: Any = None) -> Any:
        """GET a path, or POST a body to it, as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    # Graphs

    def queue(self, nodes: Nodes) -> str:
        """Queue a graph, and return its id."""
        try:
            return self.ask("/prompt", {"prompt": nodes, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise GraphError(error.read().decode()) from None

    def wait(self, prompt: str) -> dict[str, Any]:
        """Wait for the end of a graph; return its entry in the history."""

        def ended() -> Any:
            entry = self.ask(f"/history/{prompt}").get(prompt)
            return entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error") and entry

        return self.until(ended)

    def run(self, graph: Graph) -> Outputs:
        """Run a graph to its end."""
        entry = self.wait(self.queue(graph.nodes))
        if entry["status"]["status_str"] != "success":
            messages = (about for _, about in entry["status"]["messages"])
            said = [about["exception_message"] for about in messages if "exception_message" in about]
            raise GraphError("; ".join(said) or str(entry["status"]))
        return Outputs(entry["outputs"])

    def ran(self, *nodes: tuple[str, dict[str, Any]], **given: Any) -> tuple[np.ndarray, str]:
        """The latent of the small model with these nodes on it, and what our report says if one of ours is there."""
        graph = Graph(**given)
        for kind, inputs in nodes:
            graph.on_model(kind, **inputs)
        ours = any(kind.startswith("AgentAttention") for kind, _ in nodes)
        outputs = self.run(graph.sampled().reported() if ours else graph.sampled())
        return outputs.latent(), outputs.text() if ours else ""


class Outputs(dict):
    """Outputs of the graph's output nodes."""

    def latent(self, name: str = "out") -> np.ndarray:
        shown = self[name]
        return np.frombuffer(base64.b64decode(shown["latent"][0]), np.float32).reshape(shown["shape"])

    def text(self, name: str = "text") -> str:
        return self[name]["text"][0]


class Graph:
    """A graph of the small model: TinyModel, nodes on the model, KSampler, ExactLatent."""

    def __init__(self, layout: str = "SD 1", size: tuple[int, int] = (256, 256), batch: int = 1, weights: int = 1,
                 positive: str = "", **sampling: Any) -> None:  # fmt: skip
        self.nodes: Nodes = {}
        self.sampling = {"seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "denoise": 1.0, **sampling}
        self.model = self.add("tiny", "TinyModel", layout=layout, weights=weights)
        self.size, self.batch, self.positive = size, batch, ["tiny", 1]
        if positive:
            area = {"width": 128, "height": 192, "x": 64, "y": 0, "strength": 1.0}
            self.positive = self.add("area", positive, conditioning=self.positive, **area)

    def add(self, name: str, kind: str, **inputs: Any) -> list[Any]:
        """Add a node, and return its first output."""
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def on_model(self, kind: str, /, name: str = "", **inputs: Any) -> Graph:
        """Put a node on the model; what is not said of ours is as in `DEFAULTS`."""
        inputs = {**DEFAULTS, **inputs} if kind == "AgentAttention" else inputs
        self.model = self.add(name or kind, kind, model=self.model, **inputs)
        return self

    def sampled(self, name: str = "out", after: str = "", **sampling: Any) -> Graph:
        """Sample the model as it is now: from noise, or as a hires pass over what was sampled `after`."""
        width, height = self.size
        latent = self.add(f"{name} noise", "EmptyLatentImage", width=width, height=height, batch_size=self.batch)
        given = {**self.sampling, **sampling}
        if after:
            size = {"width": width, "height": height, "upscale_method": "bilinear", "crop": "disabled"}
            latent = self.add(f"{name} upscaled", "LatentUpscale", samples=[f"{after} sampler", 0], **size)
            given["denoise"] = 0.5
        given |= {"scheduler": "normal", "positive": self.positive, "negative": ["tiny", 2]}
        samples = self.add(f"{name} sampler", "KSampler", model=self.model, latent_image=latent, **given)
        self.add(name, "ExactLatent", latent=samples)
        return self

    def reported(self, name: str = "text", sampled: str = "out") -> Graph:
        """Report on what was sampled."""
        report = self.add(f"{name} report", "AgentAttentionReport", model=self.model, after=[f"{sampled} sampler", 0])
        self.add(name, "PreviewAny", source=report)
        return self


# As the node's own, but with the cheapest method
DEFAULTS = {"method": "agent", "cells": "4×4", "from": 0.0, "until": 1.0, "layers": "auto", "ratio": 0.0}
DEFAULTS |= {"agent_ratio": 0.95, "k_scale2": 0.3, "k_shortcut": 0.075, "fp32": False}
