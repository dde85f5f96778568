"""Tuning on the first sampling of a clone, and its plan from the next one on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..app.decision import Decision, SamplingPass
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
from .model import NOT_CALLED, OPTIONS, Slot, attach, is_ours, kernel_of, log

MOMENTS = 4
MAX_TRIES = 3  # samplings that are tuned on while it can't be told whether a plan is faster
WITHOUT = "made without Agent Attention"
# Tunings and the samplings it took, by model, LoRA, other nodes' patches, sizes and tolerance. What should outlive the
# program goes into the node's field.
_TUNINGS: dict[Any, tuple[Tuning, int]] = {}


def attach_tuned(model: Any, tolerance: float, plan: str = "") -> Any:
    """As `attach`, by tuning or by a plan as text; raises TuningError if it is damaged, or for another model."""
    given = Tuning.from_text(plan) if plan.strip() else None
    return attach(model, lambda unet: TunedSlot(unet, tolerance, given))


class TunedSlot(Slot):
    """Full attention until there is a tuning, and then its plan.

    Which tuning that is turns out at the first call of the U-Net: a node may have it called on tiles.
    """

    def __init__(self, unet: nn.Module, tolerance: float, given: Tuning | None) -> None:
        super().__init__(unet, {**check({}), "enabled": True, "tuning": AUTO, "how_close": ""})
        self.tolerance, self.given, self.said, self.tuning = tolerance, given, "", given
        if given is not None:
            given.config_for(unet)  # raises where it is for another model

    def describe(self, word: Callable[[Line], str]) -> str:
        found = [] if self.tuning is None else [*self.tuning.notes, f"plan: {self.tuning.text}"]
        return "\n".join([*filter(None, [self.said, super().describe(word)]), *found])

    def sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.said, self._patcher, self.tuning = "", getattr(args[0], "model_patcher", None), self.given
        with ExitStack() as self._recording:
            calls = [] if self.given else self._recording.enter_context(record_calls(self._unet, MOMENTS))
            output = super().sample(executor, *args, **kwargs)
        if self.tuning is None and not self.last.refused:
            self.said = self._tune(calls) if calls else f"not tuned: {NOT_CALLED}"
            log.info("Agent Attention: %s", ascii_of(self.said))
        elif self.tuning is not None and self.last.sizes and self.tuning.size not in self.last.sizes:
            self.said = self.tuning.advice(*self.last.sizes[-1])
        return output

    def decide(self, sampling: SamplingPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        unet, size = self._unet, read_size(args, kwargs)
        options = args[5] if len(args) > 5 else kwargs.get(OPTIONS) or {}
        model = structure_of(ordered_sites(unet)), weights_of(unet), adapters_of(unet), _lora_of(self._patcher)
        replaced = (kind for kind, each in _theirs(options).items() if each)
        others = tuple(sorted({*options.get("patches", ()), *replaced}))
        # most calls may be of another size than the first one: which, follows from the latent's and that
        self._key = *model, others, sampling.latent, size, self.tolerance
        kept, self._tries = _TUNINGS.get(self._key, (None, 0))
        again = kept is None or (kept.plan.untold and self._tries < MAX_TRIES)
        if self.given is None and (again or kept.doubts(start=progress_of((args, kwargs)) or 0.0)):
            self.last.tuned = WITHOUT
            return Decision(sampling)
        self.tuning = self.given or kept
        self._recording.close()
        called = size if self.given else self.tuning.size
        made = replace(super().decide(replace(sampling, latent=called), args, kwargs), sampling=sampling)
        # without its plan nothing keeps the tolerance
        return made if made.tuning else replace(made, config=None, refused=True)

    def _tune(self, calls: list[RecordedCall]) -> str:
        """Tune on the calls of the sampling that has ended: its image is made, and nothing here may cost it."""
        from comfy import model_management
        from comfy.model_management import InterruptProcessingException

        try:
            from comfy.utils import ProgressBar

            bar = ProgressBar(1)

            def progress(done: int, total: int, text: str) -> None:
                model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(done, total)

            bare = [_bare(call) for call in calls]
            with attention_by(kernel_of(bare[0][1][OPTIONS])):
                self.tuning = tuning = tune(self._unet, bare, self.tolerance, progress=progress)
            _TUNINGS[self._key] = tuning, self._tries + 1
            again = tuning.plan.untold and self._tries + 1 < MAX_TRIES
            then = "and again on the next one" if again else "used from the next one on"
            return f"tuned on this sampling, {then}: {headline(tuning)}"
        except InterruptProcessingException:
            return "not tuned: interrupted"
        except Exception as error:
            return f"not tuned: {type(error).__name__}: {error}"


def _lora_of(patcher: Any) -> str:
    """Sum up what nodes add to the weights, and how strongly."""
    digest, patches = hashlib.sha256(), getattr(patcher, "patches", None) or {}
    for key in sorted(patches, key=str):
        for strength, value, *_ in patches[key]:
            first = next((x for x in tree_leaves(getattr(value, "weights", value)) if isinstance(x, Tensor)), None)
            sample = "" if first is None else first.detach().flatten()[:4].float().tolist()
            digest.update(f"{key} {strength} {sample}".encode())
    return digest.hexdigest()


def _theirs(options: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """What answers in place of blocks, by kind, without ours."""
    replaced = options.get("patches_replace", {}).items()
    return {kind: {at: f for at, f in functions.items() if not is_ours(f)} for kind, functions in replaced}


def _bare(call: RecordedCall) -> RecordedCall:
    """A call as the U-Net's own modules answer it: without our functions, and without wrappers that may skip it."""
    args, kwargs = call
    kept = {name: value for name, value in kwargs[OPTIONS].items() if name not in ("wrappers", "callbacks")}
    bare = RecordedCall((args, {**kwargs, OPTIONS: {**kept, "patches_replace": _theirs(kept)}}))
    vars(bare).update(vars(call))
    return bare
