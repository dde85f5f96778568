"""A ComfyUI checkout under test: start it beside a base folder of its own, and run graphs over its HTTP API."""

from __future__ import annotations

import base64
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from servers import HostError, Server

PACK = Path(__file__).resolve().parent / "pack"
# Without its cache: an equal graph would be answered from there, without sampling
FLAGS = ("--cpu", "--cache-none", "--disable-auto-launch", "--disable-api-nodes", "--disable-metadata")
Nodes = dict[str, Any]


class ComfyUI(Server):
    """One checkout, with models, outputs and custom nodes in the empty folder `base`, and these node packs alone."""

    def __init__(self, root: Path, base: Path, packs: tuple[Path, ...]) -> None:
        super().__init__(root, base / "comfyui.log")
        self.base = base
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
            (base / folder).mkdir(parents=True)
        for pack in packs:
            (base / "custom_nodes" / pack.name).symlink_to(pack)

    def start(self) -> None:
        """Start it with its own Python, or else with that of the tests."""
        known = (self.root / "venv/bin/python", self.root.parent / "venv/bin/python", Path(sys.executable))
        python = next(path for path in known if path.exists())
        self.launch(python, "main.py", "--port", str(self.port), *FLAGS, "--base-directory", str(self.base))
        self.until(lambda: "To see the GUI go to" in self.console())

    # Graphs

    def queue(self, nodes: Nodes) -> str:
        """Queue a graph, and return its id."""
        return self.call("/prompt", {"prompt": nodes, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt: str) -> dict[str, Any]:
        """Wait for the end of a graph; return its entry in the history."""

        def ended() -> Any:
            entry = self.call(f"/history/{prompt}").get(prompt)
            return entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error") and entry

        return self.until(ended)

    def run(self, graph: Graph) -> Outputs:
        """Run a graph to its end."""
        entry = self.wait(self.queue(graph.nodes))
        if entry["status"]["status_str"] != "success":
            messages = (about for _, about in entry["status"]["messages"])
            said = [about["exception_message"] for about in messages if "exception_message" in about]
            raise HostError("; ".join(said) or str(entry["status"]))
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
