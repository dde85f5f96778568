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
from collections.abc import Mapping
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


class ComfyUI:
    """One checkout, with models, outputs and custom nodes in `base`, which none of the user's own are in.

    Args:
        root: the folder of its main.py.
        base: an empty folder.
        packs: folders to load as node packs.
        flags: more flags to start it with.
    """

    def __init__(self, root: Path, base: Path, packs: tuple[Path, ...], flags: tuple[str, ...] = ()) -> None:
        self.root, self.base, self.flags = root, base, flags
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = base / "comfyui.log"
        self._process: subprocess.Popen | None = None
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
            (base / folder).mkdir(parents=True)
        for pack in packs:
            (base / "custom_nodes" / pack.name).symlink_to(pack)

    # Life

    def start(self, patience: float = 240) -> None:
        python = next(
            (p for p in (self.root / "venv/bin/python", self.root.parent / "venv/bin/python") if p.exists()),
            Path(sys.executable),
        )
        port = self.url.rsplit(":", 1)[1]
        command = [str(python), "main.py", "--port", port, "--base-directory", str(self.base), *FLAGS, *self.flags]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=self.root, env={**os.environ, **OFFLINE}, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + patience
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.output()[-3000:]}")

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    # HTTP

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    # Graphs

    def queue(self, nodes: Nodes) -> str:
        """Queue a graph, and return its id."""
        try:
            return self.post("/prompt", {"prompt": nodes, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise GraphError(error.read().decode()) from None

    def wait(self, prompt: str, patience: float = 300) -> dict[str, Any]:
        """Wait for the end of a graph; return its entry in the history."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error"):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"{prompt} did not end:\n{self.output()[-2000:]}")

    def run(self, nodes: Nodes) -> Outputs:
        """Run a graph to its end."""
        entry = self.wait(self.queue(nodes))
        if entry["status"]["status_str"] != "success":
            said = [
                about["exception_message"] for _, about in entry["status"]["messages"] if "exception_message" in about
            ]
            raise GraphError("; ".join(said) or str(entry["status"]))
        return Outputs(entry["outputs"])


class Outputs(dict):
    """Outputs of the graph's output nodes."""

    def latent(self, name: str = "out") -> np.ndarray:
        shown = self[name]
        return np.frombuffer(base64.b64decode(shown["latent"][0]), np.float32).reshape(shown["shape"])

    def text(self, name: str = "text") -> str:
        return self[name]["text"][0]


class Graph:
    """A graph of the small model: TinyModel, nodes on the model, KSampler, ExactLatent."""

    def __init__(
        self,
        layout: str = "SD 1",
        size: tuple[int, int] = (256, 256),
        steps: int = 2,
        batch: int = 1,
        seed: int = 1,
        sampler: str = "euler",
        weights: int = 1,
    ) -> None:
        self.nodes: Nodes = {}
        self.sampling = {"seed": seed, "steps": steps, "cfg": 5.0, "sampler_name": sampler}
        self.model = self.add("tiny", "TinyModel", layout=layout, weights=weights)
        self.size, self.batch = size, batch

    def add(self, name: str, kind: str, **inputs: Any) -> list[Any]:
        """Add a node, and return its first output."""
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]

    def on_model(self, kind: str, /, name: str = "", **inputs: Any) -> Graph:
        """Put a node on the model."""
        self.model = self.add(name or kind, kind, model=self.model, **inputs)
        return self

    def agents(self, name: str = "agents", **inputs: Any) -> Graph:
        """Put ours on it."""
        return self.on_model("AgentAttention", name, **{**DEFAULTS, **inputs})

    def sampled(self, name: str = "out", after: str = "", positive: Any = ("tiny", 1), **sampling: Any) -> Graph:
        """Sample the model as it is now: from noise, or as a hires pass over what was sampled `after`."""
        width, height = self.size
        latent = self.add(f"{name} noise", "EmptyLatentImage", width=width, height=height, batch_size=self.batch)
        if after:
            size = {"width": width, "height": height, "upscale_method": "bilinear", "crop": "disabled"}
            latent = self.add(f"{name} upscaled", "LatentUpscale", samples=[f"{after} sampler", 0], **size)
        given = {"denoise": 0.5 if after else 1.0, **self.sampling, **sampling}
        given |= {"scheduler": "normal", "positive": list(positive), "negative": ["tiny", 2]}
        samples = self.add(f"{name} sampler", "KSampler", model=self.model, latent_image=latent, **given)
        self.add(name, "ExactLatent", latent=samples)
        return self

    def reported(self, name: str = "text", sampled: str = "out") -> Graph:
        """Report on what was sampled."""
        report = self.add(f"{name} report", "AgentAttentionReport", model=self.model, after=[f"{sampled} sampler", 0])
        self.add(name, "PreviewAny", source=report)
        return self


# As the node's own, but with the cheapest method
DEFAULTS = {
    "method": "agent",
    "cells": "4×4",
    "from": 0.0,
    "until": 1.0,
    "layers": "auto",
    "ratio": 0.0,
    "agent_ratio": 0.95,
    "k_scale2": 0.3,
    "k_shortcut": 0.075,
    "fp32": False,
}
