"""Tuning on the first sampling of a clone, and its plan from the next one on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..app.decision import Decision, Hint, SamplingPass
from ..app.preview import Line
from ..attention.tensors import attention_by
from ..hosts import read_size
from ..settings import check
from ..settings.tunings import AUTO
from ..tuning.fingerprint import adapters_of, ordered_sites, structure_of, weights_of
from ..tuning.record import RecordedCall, progress_of, record_calls
from ..tuning.result import Tuning, headline
from ..tuning.tuner import tune
from ..words import ascii_of
from .model import NOT_CALLED, Slot, attach, is_ours, kernel_of

log = logging.getLogger("agentsd.comfy")

MOMENTS = 4
WITHOUT = "made without Agent Attention"
# By model, LoRA, other nodes' patches, size and tolerance. What should outlive the program goes into the node's field.
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
    given = Tuning.from_text(plan) if plan.strip() else None
    return attach(model, lambda unet: TunedSlot(unet, tolerance, given))


class TunedSlot(Slot):
    """Full attention until there is a tuning, and then its plan.

    Which tuning that is turns out at the first call of the U-Net: a node may have it called on tiles.
    """

    def __init__(self, unet: nn.Module, tolerance: float, given: Tuning | None) -> None:
        super().__init__(unet, {**check({}), "enabled": True, "tuning": AUTO, "how_close": ""})
        self.tolerance, self.given, self.said = tolerance, given, ""
        if given is not None:
            given.config_for(unet)  # raises where it is for another model
            self.tuning = given

    def describe(self, word: Callable[[Line], str]) -> str:
        found = [] if self.tuning is None else [*self.tuning.notes, f"plan: {self.tuning.text}"]
        return "\n".join([*filter(None, [self.said, super().describe(word)]), *found])

    def sample(self, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.said, self._patcher, self.tuning = "", getattr(args[0], "model_patcher", None), self.given
        with ExitStack() as self._recording:
            calls = [] if self.given else self._recording.enter_context(record_calls(self._unet, MOMENTS))
            output = super().sample(executor, args, kwargs)
        if self.tuning is None:
            self._tune(calls)
        return output

    def decide(self, sampling: SamplingPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        size, options, unet = read_size(args, kwargs), _options_of(args, kwargs), self._unet
        self._conditions = {"lora": _lora_of(self._patcher), "patches": _patches_of(options)}
        model = structure_of(ordered_sites(unet)), weights_of(unet), adapters_of(unet)
        self._key = (*model, *self._conditions.values(), size, self.tolerance)
        kept = _TUNINGS.get(self._key)
        if self.given is None and (kept is None or kept.doubts(start=progress_of((args, kwargs)) or 0.0)):
            self.last.tuned = WITHOUT
            return Decision(sampling)
        self.tuning = tuning = self.given or kept
        self._recording.close()
        self.said = tuning.advice(*size)
        made = super().decide(sampling, args, kwargs)
        return made if made.tuning else replace(made, config=None, reason=Hint(made.instead), refused=True)

    def _tune(self, calls: list[RecordedCall]) -> None:
        """Tune on the calls of the sampling that has ended: its image is made, and nothing here may cost it."""
        from comfy.model_management import InterruptProcessingException

        try:
            if not calls:
                self.said = f"not tuned: {NOT_CALLED}"
                return
            bare = [_bare(call) for call in calls]
            with attention_by(kernel_of(_options_of(*bare[0]))):
                tuning = tune(self._unet, bare, self.tolerance, progress=_progress(), conditions=self._conditions)
        except InterruptProcessingException:
            self.said = "not tuned: interrupted"
        except Exception as error:
            self.said = f"not tuned: {type(error).__name__}: {error}"
        else:
            _TUNINGS[self._key] = self.tuning = tuning
            self.said = f"tuned on this sampling, used from the next one on: {headline(tuning)}"
        finally:
            log.info("Agent Attention: %s", ascii_of(self.said))


def _options_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The host's options: an argument by name of the U-Net, by place of what its wrappers wrap."""
    options = kwargs.get("transformer_options")
    return next((arg for arg in args if isinstance(arg, dict)), {}) if options is None else options


def _lora_of(patcher: Any) -> str:
    """What nodes add to the weights: how many of them, how strongly, and a checksum of what is added."""
    patches: Mapping[str, Any] = getattr(patcher, "patches", None) or {}
    digest, strengths = hashlib.sha256(), set()
    for key in sorted(map(str, patches)):
        for strength, value, *_ in patches[key]:
            strengths.add(f"{strength:g}")
            first = _first_tensor(getattr(value, "weights", value))
            sample = "" if first is None else first.detach().flatten()[:4].float().tolist()
            digest.update(f"{key} {strength} {sample}".encode())
    strength = "+".join(sorted(strengths))
    return f"{len(patches)} weights at {strength} ({digest.hexdigest()[:6]})" if patches else ""


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, (list, tuple)):
        return next((found for entry in value if (found := _first_tensor(entry)) is not None), None)
    return value if isinstance(value, Tensor) else None


def _theirs(options: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """What answers in place of blocks, by kind, without ours."""
    replaced = options.get("patches_replace", {}).items()
    return {kind: {at: f for at, f in functions.items() if not is_ours(f)} for kind, functions in replaced}


def _patches_of(options: Mapping[str, Any]) -> str:
    """Name what other nodes have put on the model."""
    return " ".join(sorted({*options.get("patches", {}), *(kind for kind, each in _theirs(options).items() if each)}))


def _bare(call: RecordedCall) -> RecordedCall:
    """A call as the U-Net's own modules answer it: without our functions, and without wrappers that may skip it."""
    args, kwargs = call
    options: Mapping[str, Any] = kwargs["transformer_options"]
    kept = {name: value for name, value in options.items() if name not in ("wrappers", "callbacks")}
    kept["patches_replace"] = _theirs(options)
    bare = RecordedCall((args, {**kwargs, "transformer_options": kept}))
    bare.output = call.output
    return bare


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
