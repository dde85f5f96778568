"""Tuning on the first sampling of a clone, and its plan from the next one on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..attention.tensors import attention_by
from ..config import AgentConfig
from ..tuning.fingerprint import ordered_sites, structure_of, weights_of
from ..tuning.record import RecordedCall, record_calls
from ..tuning.result import Tuning, headline
from ..tuning.tuner import tune
from .model import ClonePatch, Slot, attach_slot, is_ours, kernel_of

log = logging.getLogger("agentsd.comfy")

MOMENTS = 4
FULL = AgentConfig(merge_attn=False)
_NOISE = 4  # where the host's samplers take the noise: behind guider, sigmas, extra arguments and callback
# By model, size and tolerance. A plan that should outlive the program goes into the node's field.
_TUNINGS: dict[Any, Tuning] = {}


def attach_tuned(model: Any, tolerance: float, plan: str = "") -> Any:
    """Put tuned attention on a clone of a model.

    Args:
        model: a ModelPatcher of ComfyUI.
        tolerance: upper limit on the deviation of the U-Net's output, above 0 and at most 1.
        plan: a tuning as text, to use instead of tuning; blank for none.

    Raises:
        TuningError: the plan is damaged, or for another model.
        UnsupportedModelError: the model is no U-Net with transformer blocks.
    """
    given = Tuning.from_text(plan.strip()) if plan.strip() else None
    return attach_slot(model, lambda unet: TunedSlot(unet, tolerance, given))


class TunedSlot(Slot):
    """Full attention until there is a tuning, and then its plan."""

    def __init__(self, unet: nn.Module, tolerance: float, given: Tuning | None) -> None:
        super().__init__(ClonePatch(unet, FULL))
        self.unet, self.tolerance, self.given = unet, tolerance, given
        self.tuning: Tuning | None = None
        self.said = ""
        if given is not None:
            self._use(given)

    def sample(self, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        noise = kwargs["noise"] if "noise" in kwargs else args[_NOISE]
        size = tuple(noise.shape[-2:])
        key = (structure_of(ordered_sites(self.unet)), weights_of(self.unet), size, self.tolerance)
        tuning = self.given or _TUNINGS.get(key)
        if tuning is None:
            return self._tune(key, executor, args, kwargs)
        self._use(tuning)
        self.said = tuning.advice(*size)
        return super().sample(executor, args, kwargs)

    def describe(self) -> str:
        plan = [] if self.tuning is None else [f"plan: {self.tuning.text}"]
        return "\n".join(filter(None, [self.said, super().describe(), *plan]))

    def _use(self, tuning: Tuning) -> None:
        if tuning is not self.tuning:
            self.patch = ClonePatch(self.unet, tuning.config_for(self.unet))
            self.tuning = tuning

    def _tune(self, key: Any, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sample with full attention, and tune on the calls that were made."""
        from comfy.model_management import InterruptProcessingException

        self.patch, self.tuning = ClonePatch(self.unet, FULL), None
        with record_calls(self.unet, MOMENTS) as calls:
            output = super().sample(executor, args, kwargs)
        try:
            bare = [_bare(call) for call in calls]
            with attention_by(kernel_of(bare[0][1]["transformer_options"])):
                tuning = tune(self.unet, bare, self.tolerance, progress=_progress())
        except InterruptProcessingException:
            raise
        except Exception as error:  # the image is made already
            self.said = f"not tuned: {type(error).__name__}: {error}"
            log.warning("Agent Attention: %s", self.said)
            return output
        _TUNINGS[key], report = tuning, self.patch.last
        self._use(tuning)
        self.patch.last = report  # what was sampled, until something is sampled again
        self.said = f"tuned on this sampling, used from the next one on: {headline(tuning)}"
        log.info("Agent Attention: %s", self.said)
        return output


def _bare(call: RecordedCall) -> RecordedCall:
    """A call as the U-Net's own modules answer it: without our functions, and without wrappers that may skip it."""
    args, kwargs = call
    options: Mapping[str, Any] = kwargs["transformer_options"]
    replaced = {
        kind: {at: function for at, function in functions.items() if not is_ours(function)}
        for kind, functions in options.get("patches_replace", {}).items()
    }
    kept = {name: value for name, value in options.items() if name not in ("wrappers", "callbacks")}
    return args, {**kwargs, "transformer_options": {**kept, "patches_replace": replaced}}


def _progress() -> Callable[[int, int, str], None]:
    """Show the progress in the host's bar, and end where the user interrupts."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bars: list[Any] = []

    def show(done: int, total: int, text: str) -> None:
        throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(ProgressBar(total))
        bars[0].update_absolute(done, total)

    return show
