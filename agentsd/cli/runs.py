"""Draw a picture with or without a patch, time it, and record its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from .. import __version__
from ..app.last_run import PassReport
from ..apply import patch_unet, remove_patch
from ..clock import now
from ..config import AgentConfig
from ..methods import UNTOUCHED, selectable
from .models import Model, Request
from .pictures import Distance, distance

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("seconds", "U-Net seconds", "speed", "distance")


@dataclass(frozen=True)
class Run:
    """One picture, and how it was drawn."""

    picture: Image
    seconds: float  # of text encoder, U-Net, sampler and decoder
    unet_seconds: float
    calls: int  # of the U-Net
    report: PassReport  # what agent attention did
    plain: Run | None = None  # the run that this one is compared with; None if there is none

    @cached_property
    def apart(self) -> Distance:
        return distance((self.plain or self).picture, self.picture)

    @property
    def speed(self) -> float:
        """Speed-up of the whole run over the plain one."""
        return (self.plain or self).seconds / self.seconds

    @property
    def row(self) -> list[str]:
        """The figures under `COLUMNS`."""
        apart = str(self.apart) if self.plain else ""
        return [f"{self.seconds:.2f}", f"{self.unet_seconds:.2f}", f"{self.speed:.2f}x", apart]

    @property
    def caption(self) -> str:
        seconds = f"{self.seconds:.2f} s"
        return f"{seconds}, {self.speed:.2f}x\n{self.apart}" if self.plain else seconds

    def say_what_was_done(self) -> None:
        """Print what agent attention did, and why it left layers to the model."""
        calls, phrases = self.report.calls, {method.action: method.phrase for method in selectable()}
        changed = [f"{count} {phrases[action]}" for action, count in calls.items() if action != UNTOUCHED and count]
        print(f"agent attention: of {calls.total()} self-attentions {', '.join(changed) or 'none changed'}")
        if self.report.closeness is not None:
            print(f"  {self.report.closeness}")
        for reason, count in self.report.notes.items():
            print(f"  left to the model {count} times: {reason}" if count else f"  {reason}")


@contextmanager
def stopwatch(module: nn.Module) -> Iterator[list[float]]:
    """Time a module's calls in a `with` block; yields their seconds."""
    seconds: list[float] = []
    device = next(module.parameters()).device

    def end(*_: Any) -> None:
        seconds[-1] += now(device)

    begin = module.register_forward_pre_hook(lambda *_: seconds.append(-now(device)))
    with begin, module.register_forward_hook(end):
        yield seconds


def draw(
    model: Model,
    request: Request,
    config: AgentConfig | None,
    label: str,
    quiet: bool = False,
    plain: Run | None = None,
    step: Callable[[], Any] = lambda: None,
    report: PassReport | None = None,
    since: float | None = None,
) -> Run:
    """Draw the picture of a complete request under a config, or unpatched.

    `step` is called after each sampling step, and may raise to stop the drawing; `report` collects what the patch did,
    with `since` as in `PassReport.add`.
    """
    report, bar = report or PassReport(), tqdm(total=request.steps, desc=label, unit="step", leave=False, disable=quiet)

    def after_step() -> None:
        bar.update()
        step()

    patch = None if config is None else patch_unet(model.unet, config)
    try:
        if patch is not None:
            patch.observe_closeness = True
        with bar, stopwatch(model.unet) as calls:
            start = now(model.unet.device)
            picture = model.draw(request, after_step)
            seconds = now(model.unet.device) - start
        if patch is not None:
            report.add(patch, since)
        return Run(picture, seconds, sum(calls), len(calls), report, plain)
    finally:
        remove_patch(model.unet)


def warm_up(model: Model, request: Request, configs: Iterable[AgentConfig | None], quiet: bool = False) -> None:
    """Run one step with each config, so that one-time costs (memory, kernels) do not count against the first."""
    for config in configs:
        draw(model, replace(request, steps=1), config, "warming up", quiet)


def record(model: Model, request: Request, values: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Make the metadata of a picture's file; `values` are the settings, None if unpatched."""
    made = {"agentsd": __version__, "model": model.name, "sampler": model.sampler, **asdict(request), **more}
    made["height"], made["width"] = made.pop("size")
    return {**made, "agent_attention": None if values is None else dict(values)}
