"""Tuning on the first sampling of a clone, and its plan from the next one on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..attention.tensors import attention_by
from ..config import AgentConfig
from ..hosts import read_size
from ..tuning.fingerprint import adapters_of, ordered_sites, structure_of, weights_of
from ..tuning.record import RecordedCall, progress_of, record_calls
from ..tuning.result import Tuning, headline
from ..tuning.tuner import tune
from ..words import ascii_of
from .model import ClonePatch, Slot, attach_slot, is_ours, kernel_of

log = logging.getLogger("agentsd.comfy")

MOMENTS = 4
FULL = AgentConfig(merge_attn=False)
WITHOUT = "made without Agent Attention"
NOT_CALLED = "another node calls the U-Net's blocks itself, or skips the U-Net"
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
    return attach_slot(model, lambda unet: TunedSlot(unet, tolerance, given))


class TunedSlot(Slot):
    """Full attention until there is a tuning, and then its plan.

    Which tuning that is turns out at the first call of the U-Net: a node may have it called on tiles.
    """

    def __init__(self, unet: nn.Module, tolerance: float, given: Tuning | None) -> None:
        super().__init__(ClonePatch(unet, FULL, outcome=WITHOUT))
        self.unet, self.tolerance, self.given = unet, tolerance, given
        self.tuning: Tuning | None = None
        self.said = ""
        self._use(given)

    def describe(self) -> str:
        plan = [] if self.tuning is None else [f"plan: {self.tuning.text}"]
        return "\n".join(filter(None, [self.said, super().describe(), *plan]))

    def sample(self, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.said, self._key, self._patcher = "", None, getattr(args[0] if args else None, "model_patcher", None)
        self._use(self.given)
        with ExitStack() as self._recording:
            calls = [] if self.given else self._recording.enter_context(record_calls(self.unet, MOMENTS))
            output = super().sample(executor, args, kwargs)
        if self.tuning is None:
            self._tune(calls)
        return output

    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the tuning at the first call of a sampling."""
        if self._key is None:
            size, options = read_size(args, kwargs), _options_of(args, kwargs)
            lora, patches = _lora_of(self._patcher), _patches_of(options)
            model = structure_of(ordered_sites(unet)), weights_of(unet), adapters_of(unet)
            self._key = (*model, lora, patches, size, self.tolerance)
            self._conditions = {"lora": lora, "patches": patches}
            self._choose(size, progress_of((args, kwargs)) or 0.0)
        super().begin_call(unet, args, kwargs)

    def _choose(self, size: tuple[int, int] | None, start: float) -> None:
        kept = _TUNINGS.get(self._key)
        if self.given is None and kept is not None and not kept.doubts(start=start):
            self._recording.close()
            self._use(kept)
            self.patch.begin_sampling()
        if self.tuning is not None and size is not None:
            self.said = self.tuning.advice(*size)

    def _use(self, tuning: Tuning | None) -> None:
        if tuning is None or tuning is not self.tuning:
            if tuning is None:
                self.patch = ClonePatch(self.unet, FULL, outcome=WITHOUT)
            else:
                self.patch = ClonePatch(self.unet, tuning.config_for(self.unet))
            self.tuning = tuning

    def _tune(self, calls: list[RecordedCall]) -> None:
        """Tune on the calls of the sampling that has ended: its image is made, and nothing here may cost it."""
        from comfy.model_management import InterruptProcessingException

        try:
            if not calls:
                self.said = f"not tuned: {NOT_CALLED}"
                return
            bare = [_bare(call) for call in calls]
            with attention_by(kernel_of(_options_of(*bare[0]))):
                tuning = tune(self.unet, bare, self.tolerance, progress=_progress(), conditions=self._conditions)
        except InterruptProcessingException:
            self.said = "not tuned: interrupted"
        except Exception as error:
            self.said = f"not tuned: {type(error).__name__}: {error}"
        else:
            _TUNINGS[self._key], report = tuning, self.patch.last
            self._use(tuning)
            self.patch.last = report  # what was sampled, until something is sampled again
            self.said = f"tuned on this sampling, used from the next one on: {headline(tuning)}"
            self.said += "".join(f"\n{note}" for note in tuning.notes)
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
            first = next(_tensors(getattr(value, "weights", value)), None)
            sample = "" if first is None else first.detach().flatten()[:4].float().tolist()
            digest.update(f"{key} {strength} {sample}".encode())
    strength = "+".join(sorted(strengths))
    return f"{len(patches)} weights at {strength} ({digest.hexdigest()[:6]})" if patches else ""


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _patches_of(options: Mapping[str, Any]) -> str:
    """Name what other nodes have put on the model."""
    replaced = {
        kind
        for kind, functions in options.get("patches_replace", {}).items()
        if not all(map(is_ours, functions.values()))
    }
    return " ".join(sorted({*options.get("patches", {}), *replaced}))


def _bare(call: RecordedCall) -> RecordedCall:
    """A call as the U-Net's own modules answer it: without our functions, and without wrappers that may skip it."""
    args, kwargs = call
    options: Mapping[str, Any] = kwargs["transformer_options"]
    replaced = {
        kind: {at: function for at, function in functions.items() if not is_ours(function)}
        for kind, functions in options.get("patches_replace", {}).items()
    }
    kept = {name: value for name, value in options.items() if name not in ("wrappers", "callbacks")}
    bare = RecordedCall((args, {**kwargs, "transformer_options": {**kept, "patches_replace": replaced}}))
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
