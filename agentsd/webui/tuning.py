"""Tuning during a generation: record a sampling pass, and tune on it before it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..app.decision import SamplingPass
from ..app.kept_tunings import PanelTunings, make
from ..app.last_run import STATUS, PassReport
from ..tuning.record import record_calls
from ..tuning.result import Tuning, TuningCancelled, headline
from ..words import error_of_ours
from . import compat

if TYPE_CHECKING:
    from .session import Generation

log = logging.getLogger("agentsd.panel")

NO_END = "this WebUI does not tell where a pass ends"


@contextmanager
def tuned_on(p: Any, generation: Generation, sampling: SamplingPass, report: PassReport) -> Iterator[None]:
    """Record the pass that is made in a `with` block, and tune on it at its end. Never raises for its own sake."""
    unet, checkpoint = compat.HOST.unet(), compat.HOST.checkpoint()
    calls, why_not = [], ""
    with ExitStack() as stack:
        try:
            why_not = _obstacle(p, unet, sampling)
            calls = [] if why_not else stack.enter_context(record_calls(unet))
        except Exception as error:
            why_not = error_of_ours(error)
        yield
    try:
        if why_not:
            pass
        elif compat.HOST.was_stopped():
            why_not = "the image was interrupted"
        elif (unet, checkpoint) != (compat.HOST.unet(), compat.HOST.checkpoint()):
            why_not = "another checkpoint took over: tune each without a refiner"
        elif not calls:
            why_not = "the U-Net was not called"
        else:
            tuning = _tuned(p, generation, sampling, calls)
            generation.found.append((sampling.of, tuning))
            STATUS.tuned, report.tuned = True, "; ".join([headline(tuning), *tuning.notes])
    except TuningCancelled:
        why_not = "cancelled"
    except Exception as error:
        log.debug("tuning failed", exc_info=True)
        why_not = error_of_ours(error)
    if why_not:
        report.tuned = f"not tuned, {why_not}"
        p.comment(f"Agent Attention: {report.tuned}")


def _obstacle(p: Any, unet: nn.Module | None, sampling: SamplingPass) -> str:
    """Say what keeps a pass from being recorded; empty if nothing does."""
    in_the_way = compat.HOST.program(p).obstacle(sampling)
    if not compat.HOST.announces_passes:
        return NO_END
    if in_the_way is not None:
        return in_the_way.text
    if unet is None:
        return "this model has no self-attention to patch"
    return "another extension replaces transformer blocks" if compat.HOST.replaced_blocks(unet) else ""


def _tuned(p: Any, generation: Generation, sampling: SamplingPass, calls: list[Any]) -> Tuning:
    cfg, values = getattr(p, "cfg_scale", None), generation.values
    with compat.HOST.progress_bar() as progress:
        found = make(
            compat.HOST.unet(),
            calls,
            values["tune"],
            checkpoint=compat.HOST.checkpoint(),
            of=sampling.of,
            precision="fp32" if values["fp32"] or compat.HOST.upcasts() else None,
            progress=lambda done, total, text: progress(done, total, f"Tuning Agent Attention: {text}"),
            kv_context=compat.HOST.kv_context(),
            conditions={**compat.HOST.program(p).conditions(), "cfg": "" if cfg is None else f"{cfg:g}"},
        )
    compat.HOST.tunings.put(found)
    return found.tuning


def panel_tunings() -> PanelTunings:
    """Make what the panel shows of the current checkpoint's tunings."""
    return PanelTunings(compat.HOST, "" if compat.HOST.announces_passes else NO_END)
