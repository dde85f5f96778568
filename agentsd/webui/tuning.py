"""Tuning during a generation: record a sampling pass, tune on it before it ends; find the plans of later passes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..app.kept_tunings import Kept, PanelTunings, config_of, make, plans
from ..app.last_run import PassReport
from ..attention.grid import Grid
from ..config import AgentConfig
from ..settings import tunings
from ..tuning.record import record_calls
from ..tuning.result import TuningCancelled, TuningError
from ..words import percent
from . import compat

log = logging.getLogger("agentsd.panel")

NO_END = "this WebUI does not tell where a pass ends"


def pass_of(p: Any, hires: bool) -> str:
    """Return the kind of the next pass: one of `tunings.PASSES`."""
    if hires:
        return tunings.HIRES
    # SD.Next has an empty list where there are none
    return tunings.IMG2IMG if getattr(p, "init_images", None) else tunings.FIRST


def size_of(p: Any, hires: bool) -> tuple[int, int]:
    """Return (height, width) of the next pass's latent, for hosts that don't provide the latent."""
    sides = ("hr_upscale_to_y", "hr_upscale_to_x") if hires else ("height", "width")
    return Grid.of_pixels(*(int(getattr(p, side, 0) or 0) for side in sides))


def precision_of(values: Mapping[str, Any]) -> str | None:
    return "fp32" if values["fp32"] or compat.HOST.upcasts() else None


class Plans:
    """The plans of one pass.

    Args:
        values: every setting, in canonical form.
        of: the pass.
        size: (height, width) of its latent.
        noted: the plans of the generation; those of this pass are added when they are chosen.

    Attributes:
        used: whether a plan was chosen.
    """

    def __init__(
        self, values: Mapping[str, Any], of: str, size: tuple[int, int], noted: list[tunings.PassTuning]
    ) -> None:
        self.values, self.of, self.size, self._noted = values, of, size, noted
        self.used = False
        self._checkpoint = ""

    def hold(self) -> bool:
        """Whether the checkpoint is that of the last plan: a host may load another one into the same U-Net."""
        return not self.values.get("tuning") or self._checkpoint == compat.HOST.checkpoint()

    def config(self, unet: nn.Module, report: PassReport) -> AgentConfig | None:
        """Choose the plan for a U-Net and say so in the report; None where the other settings apply.

        Raises:
            TuningError: a plan was given as text, and is for another model.
        """
        if not self.values["tuning"]:
            return None
        self._checkpoint = compat.HOST.checkpoint()
        auto = self.values["tuning"] == tunings.AUTO
        kept = compat.HOST.tunings.find(self._checkpoint, self.of, self.size) if auto else None
        refusal = None
        for plan in plans(self.values, self.of, self.size, kept):
            try:
                config = config_of(plan, unet, precision_of(self.values))
            except TuningError as error:
                refusal = error
                continue
            self.used = True
            self._noted.append(tunings.PassTuning(self.of, plan))
            report.plan = f"tuned to within {percent(plan.tolerance)}"
            return config
        if refusal is not None and not auto:
            raise refusal
        report.plan = f"{refusal or 'no tuning for this checkpoint and size'}, so the other settings are used"
        return None


class Recording:
    """Records one pass, and tunes on it when it has ended. A context manager that never raises for its own sake.

    Args:
        p: the host's processing object.
        values: every setting, in canonical form.
        of: the pass.
        report: of the pass; told of the outcome.

    Attributes:
        kept: the tuning; None if there is none.
    """

    def __init__(self, p: Any, values: Mapping[str, Any], of: str, report: PassReport) -> None:
        self.values, self.of, self.report = values, of, report
        self.kept: Kept | None = None
        self._model = compat.HOST.current_unet(), compat.HOST.checkpoint()
        self._stack, self._conditions = ExitStack(), conditions_of(p)
        self._obstacle = next(iter(compat.HOST.obstacles(p, report.hires)), "")

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
                precision=precision_of(self.values),
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
    networks = getattr(p, "extra_network_data", None) or {}
    names = sorted(" ".join(map(str, network.items[:2])) for each in networks.values() for network in each)
    cfg = getattr(p, "cfg_scale", None)
    return {"lora": " + ".join(names), "cfg": "" if cfg is None else f"{cfg:g}"}


def sentence(kept: Kept) -> str:
    """Describe a new tuning in one clause."""
    plan, notes = kept.tuning.plan, "".join(f"; {note}" for note in kept.tuning.notes)
    if not plan.acts:
        return f"tuned, {plan.gain}{notes}"
    return f"tuned to within {percent(plan.tolerance)}: {plan.gain}, deviation {plan.reached}{notes}"
