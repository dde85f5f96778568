"""Draw a picture with or without a patch, time it, and record its settings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..apply import patch_unet, remove_patch
from ..config import AgentConfig
from ..methods import UNTOUCHED, selectable
from ..patching.closeness import Closeness
from ..patching.patch import Patch
from ..settings import infotext
from .models import Model, Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Run:
    """One picture, and how it was drawn."""

    picture: Image
    seconds: float  # of text encoder, U-Net, sampler and decoder
    unet_seconds: float
    calls: int  # of the U-Net
    actions: Mapping[str, int]  # self-attention calls by action, such as "agents" or "untouched"
    notes: Mapping[str, int]  # calls left to the model, by reason
    closeness: Closeness | None = None

    def faster(self, plain: Run) -> str:
        """Format the speed-up of the whole run over the unpatched one."""
        return f"{plain.seconds / self.seconds:.2f}x"

    def say_what_was_done(self) -> None:
        """Print what agent attention did, and why it left layers to the model."""
        phrases = {method.action: method.phrase for method in selectable()}
        changed = {action: count for action, count in self.actions.items() if action != UNTOUCHED and count}
        what = ", ".join(f"{count} {phrases[action]}" for action, count in changed.items()) or "none changed"
        print(f"agent attention: of {sum(self.actions.values())} self-attentions {what}")
        if self.closeness is not None:
            print(f"  {self.closeness}")
        for reason, count in self.notes.items():
            print(f"  left to the model {count} times: {reason}" if count else f"  {reason}")


@contextmanager
def stopwatch(module: nn.Module) -> Iterator[list[float]]:
    """Time a module's calls in a `with` block; yields their seconds."""
    seconds: list[float] = []

    def end(*_: Any) -> None:
        seconds[-1] += _now()

    begin = module.register_forward_pre_hook(lambda *_: seconds.append(-_now()))
    with begin, module.register_forward_hook(end):
        yield seconds


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
    """Draw the picture of a complete request under a config, or unpatched.

    `step` is called after each sampling step, and may raise to stop the drawing; `before_removal` is called with the
    patch, if there is one, when the picture is done.
    """
    bar = tqdm(total=request.steps, desc=label, unit="step", leave=False, disable=quiet)

    def after_step() -> None:
        bar.update()
        if step is not None:
            step()

    patch = None if config is None else patch_unet(model.unet, config)
    try:
        if patch is not None:
            patch.observe_closeness = True
        with bar, stopwatch(model.unet) as calls:
            start = _now()
            picture = model.draw(request, after_step)
            seconds = _now() - start
        found: tuple[Any, ...] = {}, {}
        if patch is not None:
            actions = sum((Counter(layer.calls) for layer in patch.report()), Counter())
            found = actions, dict(patch.notes), patch.closeness()
            if before_removal is not None:
                before_removal(patch)
        return Run(picture, seconds, sum(calls), len(calls), *found)
    finally:
        remove_patch(model.unet)


def warm_up(model: Model, request: Request, configs: Iterable[AgentConfig | None], quiet: bool = False) -> None:
    """Run one step with each config, so that one-time costs (memory, kernels) do not count against the first."""
    for config in configs:
        draw(model, replace(request, steps=1), config, "warming up", quiet)


def record(model: Model, request: Request, values: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Make the metadata of a picture's file; `values` are the settings, None if unpatched."""
    made: dict[str, Any] = {
        "agentsd": __version__,
        "model": model.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative,
    }
    made |= {"seed": request.seed, "steps": request.steps, "sampler": model.sampler, "guidance": request.guidance}
    made |= {"width": request.size[1], "height": request.size[0]}
    return {**made, "agent_attention": None if values is None else dict(values), **more}


def infotext_of(made: Mapping[str, Any]) -> str:
    """Format a record as the WebUI's infotext, for its "PNG Info" tab."""
    negative = [f"Negative prompt: {made['negative_prompt']}"] if made["negative_prompt"] else []
    names = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance", "Seed": "seed"}
    parts = {label: made[name] for label, name in names.items()}
    parts["Size"] = f"{made['width']}x{made['height']}"
    if made["agent_attention"] is not None:
        parts[infotext.KEY] = infotext.write(made["agent_attention"])
    return "\n".join([made["prompt"], *negative, ", ".join(f"{key}: {value}" for key, value in parts.items())])
