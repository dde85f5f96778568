"""Draw a picture with or without a patch, time it, and record its settings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..apply import get_patch, patch_unet, remove_patch
from ..config import AgentConfig
from ..methods import UNTOUCHED, method_of
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
        actions: number of self-attention calls by action, such as "agents" or "untouched".
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

    def faster(self, plain: Run) -> str:
        """Format the speed-up of the whole run over the unpatched one."""
        return f"{plain.seconds / self.seconds:.2f}x"

    def say_what_was_done(self) -> None:
        """Print what agent attention did, and why it left layers to the model."""
        changed = {action: count for action, count in self.actions.items() if action != UNTOUCHED and count}
        what = ", ".join(f"{count} {method_of(action).phrase}" for action, count in changed.items()) or "none changed"
        print(f"agent attention: of {sum(self.actions.values())} self-attentions {what}")
        if self.closeness is not None:
            print(f"  {self.closeness}")
        for reason, count in self.notes.items():
            print(f"  left to the model {count} times: {reason}" if count else f"  {reason}")


@contextmanager
def stopwatch(module: nn.Module) -> Iterator[list[float]]:
    """Time a module's calls in a `with` block; yields their seconds."""
    seconds: list[float] = []
    begin = module.register_forward_pre_hook(lambda *_: seconds.append(-_now()))

    def end(*_: Any) -> None:
        seconds[-1] += _now()

    handles = (begin, module.register_forward_hook(end))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


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
    bar = tqdm(total=request.steps, desc=label, unit="step", leave=False, disable=quiet)
    with _patch(model.unet, config), bar, stopwatch(model.unet) as calls:
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
    return Run(picture, seconds, sum(calls), len(calls), dict(actions), notes, closeness)


@contextmanager
def _patch(unet: nn.Module, config: AgentConfig | None) -> Iterator[None]:
    if config is not None:
        patch_unet(unet, config)
    try:
        yield
    finally:
        remove_patch(unet)


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
        "sampler": model.sampler,
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
        "Sampler": made["sampler"],
        "CFG scale": made["guidance"],
        "Seed": made["seed"],
        "Size": f"{made['width']}x{made['height']}",
    }
    if made["agent_attention"] is not None:
        parts[infotext.KEY] = infotext.write(made["agent_attention"])
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in parts.items())])
