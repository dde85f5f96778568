"""Tuning during a generation: record a sampling pass, tune on it before it ends; find the plans of later passes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..app.decision import SamplingPass
from ..app.kept_tunings import Kept, PanelTunings, make
from ..app.last_run import PassReport
from ..tuning.record import record_calls
from ..tuning.result import TuningCancelled
from ..words import error_of_ours, percent
from . import compat

log = logging.getLogger("agentsd.panel")

NO_END = "this WebUI does not tell where a pass ends"


@contextmanager
def tuned_on(p: Any, values: Mapping[str, Any], sampling: SamplingPass, report: PassReport) -> Iterator[list[Kept]]:
    """Record the pass that is made in a `with` block, and tune on it at its end; the report is told of the outcome.

    The block gets a list, in which the tuning is afterwards, if there is one. Never raises for its own sake.
    """
    unet, checkpoint = compat.HOST.current_unet(), compat.HOST.checkpoint()
    cfg = getattr(p, "cfg_scale", None)
    conditions = {**compat.HOST.program(p).conditions(), "cfg": "" if cfg is None else f"{cfg:g}"}
    kept: list[Kept] = []
    calls, why_not = [], ""
    with ExitStack() as stack:
        try:
            why_not = _obstacle(p, unet, sampling)
            if not why_not:
                calls = stack.enter_context(record_calls(unet))
        except Exception as error:
            why_not = error_of_ours(error)
        yield kept
    try:
        if why_not:
            pass
        elif compat.HOST.was_stopped():
            why_not = "the image was interrupted"
        elif (unet, checkpoint) != (compat.HOST.current_unet(), compat.HOST.checkpoint()):
            why_not = "another checkpoint took over: tune each without a refiner"
        elif not calls:
            why_not = "the U-Net was not called"
        else:
            with compat.HOST.progress_bar() as progress:
                found = make(
                    unet,
                    calls,
                    values["tune"],
                    checkpoint=checkpoint,
                    of=sampling.of,
                    precision="fp32" if values["fp32"] or compat.HOST.upcasts() else None,
                    progress=lambda done, total, text: progress(done, total, f"Tuning Agent Attention: {text}"),
                    kv_context=compat.HOST.kv_context(),
                    conditions=conditions,
                )
            compat.HOST.tunings.put(found)
            kept.append(found)
    except TuningCancelled:
        why_not = "cancelled"
    except Exception as error:
        log.debug("tuning failed", exc_info=True)
        why_not = error_of_ours(error)
    report.tuned = f"not tuned, {why_not}" if why_not else sentence(found)


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


def panel_tunings() -> PanelTunings:
    """The tunings of the current checkpoint, for the panel."""
    return PanelTunings(compat.HOST, "" if compat.HOST.announces_passes else NO_END)


def sentence(kept: Kept) -> str:
    """Describe a new tuning in one clause."""
    plan, notes = kept.tuning.plan, "".join(f"; {note}" for note in kept.tuning.notes)
    if not plan.acts:
        return f"tuned, {plan.gain}{notes}"
    return f"tuned to within {percent(plan.tolerance)}: {plan.gain}, deviation {plan.reached}{notes}"
