"""Tuning during a generation: record a sampling pass, tune on it before it ends; find the plans of later passes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..app.decision import SamplingPass
from ..app.kept_tunings import Kept, PanelTunings, make
from ..app.last_run import PassReport
from ..tuning.record import record_calls
from ..tuning.result import TuningCancelled
from ..words import percent
from . import compat

log = logging.getLogger("agentsd.panel")

NO_END = "this WebUI does not tell where a pass ends"


class Recording:
    """Records one pass, and tunes on it when it has ended. A context manager that never raises for its own sake.

    Args:
        p: the host's processing object.
        values: every setting, in canonical form.
        sampling: the pass.
        report: of the pass; told of the outcome.

    Attributes:
        kept: the tuning; None if there is none.
    """

    def __init__(self, p: Any, values: Mapping[str, Any], sampling: SamplingPass, report: PassReport) -> None:
        self.values, self.of, self.report = values, sampling.of, report
        self.kept: Kept | None = None
        self._model = compat.HOST.current_unet(), compat.HOST.checkpoint()
        self._stack, self._conditions = ExitStack(), conditions_of(p)
        obstacle = compat.HOST.program(p).obstacle(sampling)
        self._obstacle = "" if obstacle is None else obstacle.text

    def __enter__(self) -> Recording:
        unet, _ = self._model
        try:
            if not compat.HOST.announces_passes:
                self._obstacle = NO_END
            elif unet is None:
                self._obstacle = self._obstacle or "this model has no self-attention to patch"
            elif compat.HOST.replaced_blocks(unet):
                self._obstacle = self._obstacle or "another extension replaces transformer blocks"
            if not self._obstacle:
                self._calls = self._stack.enter_context(record_calls(unet))
        except Exception as error:
            self._obstacle = f"an error of ours: {type(error).__name__}: {error}"
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._stack.close()
        if kind is not None:
            return
        try:
            reason = self._obstacle or self._change() or self._tune()
        except TuningCancelled:
            reason = "cancelled"
        except Exception as failure:
            log.debug("tuning failed", exc_info=True)
            reason = f"an error of ours: {type(failure).__name__}: {failure}"
        self.report.tuned = f"not tuned, {reason}" if reason else sentence(self.kept)

    def _change(self) -> str:
        """Say what about the pass keeps it from being tuned on; empty if nothing does."""
        if compat.HOST.was_stopped():
            return "the image was interrupted"
        if self._model != (compat.HOST.current_unet(), compat.HOST.checkpoint()):
            return "another checkpoint took over: tune each without a refiner"
        return "" if self._calls else "the U-Net was not called"

    def _tune(self) -> str:
        unet, checkpoint = self._model
        with compat.HOST.progress_bar() as progress:
            kept = make(
                unet,
                self._calls,
                self.values["tune"],
                checkpoint=checkpoint,
                of=self.of,
                precision="fp32" if self.values["fp32"] or compat.HOST.upcasts() else None,
                progress=lambda done, total, text: progress(done, total, f"Tuning Agent Attention: {text}"),
                kv_context=compat.HOST.kv_context(),
                conditions=self._conditions,
            )
        compat.HOST.tunings.put(kept)
        self.kept = kept
        return ""


def panel_tunings() -> PanelTunings:
    """The tunings of the current checkpoint, for the panel."""
    return PanelTunings(compat.HOST, "" if compat.HOST.announces_passes else NO_END)


def conditions_of(p: Any) -> dict[str, str]:
    """Say what a tuning of a pass holds for: its LoRA, with their weights, and its guidance."""
    cfg = getattr(p, "cfg_scale", None)
    return {**compat.HOST.program(p).conditions(), "cfg": "" if cfg is None else f"{cfg:g}"}


def sentence(kept: Kept) -> str:
    """Describe a new tuning in one clause."""
    plan, notes = kept.tuning.plan, "".join(f"; {note}" for note in kept.tuning.notes)
    if not plan.acts:
        return f"tuned, {plan.gain}{notes}"
    return f"tuned to within {percent(plan.tolerance)}: {plan.gain}, deviation {plan.reached}{notes}"
