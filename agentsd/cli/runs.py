"""Draw a picture with or without a patch, time it, and record its settings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..apply import get_patch, patch_unet, remove_patch
from ..config import AgentConfig
from ..patching.closeness import Closeness
from ..patching.patch import Patch
from ..settings import infotext
from .models import Model, Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Run:
    """One picture, and how it was drawn.

    Attributes:
        picture: the picture.
        seconds: total time: text encoder, U-Net, sampler and decoder.
        unet_seconds: time in the U-Net.
        calls: number of U-Net calls.
        actions: number of self-attention calls by action: "agents", "merge", "pool", "untouched".
        notes: reasons for leaving self-attention to the model, each with its number of calls.
        closeness: how close attention was to full attention; None if nothing was patched.
    """

    picture: Image
    seconds: float
    unet_seconds: float
    calls: int
    actions: Mapping[str, int]
    notes: Mapping[str, int]
    closeness: Closeness | None = None

    def timings(self) -> str:
        return f"{self.seconds:.2f} s, {self.unet_seconds:.2f} s of it in {self.calls} calls of the U-Net"


class Stopwatch:
    """Timer of a module's calls during a `with` block."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.seconds, self.calls = module, 0.0, 0

    def __enter__(self) -> Stopwatch:
        self._handles = [
            self.module.register_forward_pre_hook(self._start),
            self.module.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._began = _now()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds += _now() - self._began
        self.calls += 1


def _now() -> float:
    """Return the time after waiting for all work on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def draw(
    model: Model,
    request: Request,
    config: AgentConfig | None,
    label: str,
    quiet: bool = False,
    step: Callable[[], Any] | None = None,
    before_removal: Callable[[Patch], Any] | None = None,
) -> Run:
    """Draw a picture.

    Args:
        model: the model.
        request: what to draw, complete.
        config: the settings; None for unpatched.
        label: label of the progress bar.
        quiet: show no progress bar.
        step: called after each sampling step; raising stops the drawing.
        before_removal: called with the patch, if there is one, when the picture is done.
    """
    with _patch(model.unet, config), _bar(label, request.steps, quiet) as bar, Stopwatch(model.unet) as watch:
        patch = get_patch(model.unet)
        if patch:
            patch.observe_closeness = True
        start = _now()
        picture = model.draw(request, lambda: (bar.update(), step and step()))
        seconds = _now() - start
        actions: Counter[str] = Counter()
        for layer in patch.report() if patch else ():
            actions.update(layer.calls)
        notes = dict(patch.notes) if patch else {}
        if patch and before_removal:
            before_removal(patch)
        closeness = patch.closeness() if patch else None
    return Run(picture, seconds, watch.seconds, watch.calls, dict(actions), notes, closeness)


@contextmanager
def _patch(unet: nn.Module, config: AgentConfig | None) -> Iterator[None]:
    if config is not None:
        patch_unet(unet, config)
    try:
        yield
    finally:
        remove_patch(unet)


def _bar(label: str, steps: int, quiet: bool) -> Any:
    return nullcontext(_Silent()) if quiet else tqdm(total=steps, desc=label, unit="step", leave=False)


class _Silent:
    def update(self) -> None:
        """Show nothing."""


def warm_up(model: Model, request: Request, configs: list[AgentConfig | None], quiet: bool = False) -> None:
    """Run one step with each config, so that one-time costs (memory, kernels) do not count against the first."""
    for config in configs:
        draw(model, replace(request, steps=1), config, "warming up", quiet)


def record(model: Model, request: Request, values: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Make the metadata of a picture's file; `values` are the settings, None if unpatched."""
    height, width = request.size
    return {
        "agentsd": __version__,
        "model": model.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "width": width,
        "height": height,
        "agent_attention": None if values is None else dict(values),
        **more,
    }


def infotext_of(made: Mapping[str, Any]) -> str:
    """Format a record as the WebUI's infotext, for its "PNG Info" tab."""
    lines = [made["prompt"]]
    if made["negative_prompt"]:
        lines.append(f"Negative prompt: {made['negative_prompt']}")
    parts = {
        "Steps": made["steps"],
        "CFG scale": made["guidance"],
        "Seed": made["seed"],
        "Size": f"{made['width']}x{made['height']}",
    }
    if made["agent_attention"] is not None:
        parts[infotext.KEY] = infotext.write(made["agent_attention"])
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in parts.items())])
