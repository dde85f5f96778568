"""Record calls of a model while an ordinary picture is made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..checks import Setting
from ..eager import not_compiled
from ..hosts import find_model, find_timestep, output_tensor, progress_by, read_call, read_timestep
from ..schedule import Moment, Timesteps

log = logging.getLogger("agentsd")

# Calls kept of one timestep: cond and uncond may come in two.
CALLS_OF_A_TIMESTEP = 2


class RecordedCall(tuple[tuple[Any, ...], dict[str, Any]]):
    """One call of a U-Net or transformer: its arguments (args, kwargs)."""

    output: Tensor | None = None  # what it returned while the picture was made; None if unknown
    progress: float | None = None  # the fraction of the diffusion that was done; None if unknown


@contextmanager
def record_calls(model: Any, moments: int = 6, progress: Moment | None = None) -> Iterator[list[RecordedCall]]:
    """Collect calls of the model's U-Net or transformer, spread evenly over the diffusion, during a `with` block.

        with agentsd.record_calls(pipe) as calls:
            pipe("a photo of a cat")
        tuning = agentsd.tune(pipe, calls)

    The arguments are copied, never more than those of 2 · `moments` timesteps of each latent size at a time. Of one
    timestep up to two calls are kept, since cond and uncond may be evaluated separately. Where the model is called on
    tiles or areas, calls of another size than most have are left out, and so is a call whose moment is not known.

    Args:
        model: as for `apply_patch`.
        moments: number of timesteps, 1–100.
        progress: as for `apply_patch`, not as for `tune`: it maps timesteps.

    Yields:
        The list of (args, kwargs), in the order of the diffusion; filled when the block ends, even by an error.
    """
    moments = Setting("moments", "whole", 6, low=1, high=100).check(moments)
    calls: list[RecordedCall] = []
    module = find_model(model)
    recorder = _Recorder(moments, Timesteps(progress or progress_by(model, module)))
    try:
        see, see_output = module.register_forward_pre_hook, module.register_forward_hook
        with see(recorder.see, with_kwargs=True), see_output(recorder.see_output):
            yield calls
    finally:
        calls += recorder.spread()
        if recorder.counts and not calls:
            log.warning(
                "no call was recorded; where timesteps are no training steps, `progress` has to say what they mean"
            )


def copied(value: Any) -> Any:
    """Copy tensors, and the lists, tuples and dictionaries around them; other objects are shared."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def progress_of(call: tuple[tuple[Any, ...], dict[str, Any]]) -> float | None:
    """Return the fraction of the diffusion that is done at a call of a U-Net, 0–1; None if it isn't known.

    That of a plain (args, kwargs) is told by its timestep.
    """
    said, t = getattr(call, "progress", None), read_timestep(find_timestep(*call))
    return Timesteps().progress(t) if said is None and t is not None else said


def spread(values: Iterable[float], count: int) -> list[float]:
    """Choose `count` of some values, spread evenly over their range; all of them if there are fewer."""
    at = sorted(values)
    if len(at) <= count:
        return at
    wanted = [at[0] + (at[-1] - at[0]) * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]
    return sorted({min(at, key=lambda value, w=w: abs(value - w)) for w in wanted})  # type: ignore[misc]


class _Recorder:
    def __init__(self, moments: int, timesteps: Timesteps) -> None:
        self.moments, self.timesteps = moments, timesteps
        self.counts: Counter[tuple[int, int]] = Counter()  # of calls, by size
        self.seen: dict[tuple[int, int], dict[float, list[RecordedCall]]] = {}  # by size and progress
        self.under_way: RecordedCall | None = None

    @not_compiled
    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call. One that cannot be, for want of memory say, is left out: it must not cost the image."""
        self.under_way = None
        try:
            size, t = read_call(module, args, kwargs)
            t = read_timestep(t)
            progress = None if t is None else self.timesteps.progress(t)
            if size is None:
                return
            self.counts[size] += 1
            seen = self.seen.setdefault(size, {})
            if progress is None:
                return
            calls = seen.setdefault(progress, [])
            if len(calls) < CALLS_OF_A_TIMESTEP:
                call = RecordedCall((copied(args), copied(kwargs)))
                call.progress, self.under_way = progress, call
                calls.append(call)
            if len(seen) > 2 * self.moments:  # drop the one whose neighbours are closest to each other
                at = sorted(seen)
                del seen[min(zip(at, at[1:], at[2:], strict=False), key=lambda three: three[2] - three[0])[1]]
        except Exception:
            log.debug("a call was not recorded", exc_info=True)

    @not_compiled
    def see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record what the call returned."""
        try:
            if self.under_way is not None:
                self.under_way.output = output_tensor(output).detach().clone()
        except Exception:
            log.debug("an output was not recorded", exc_info=True)
        self.under_way = None

    def spread(self) -> list[RecordedCall]:
        """Return the calls at the size that most have, the larger of two, thinned out to the timesteps asked for."""
        size = max(self.counts, key=lambda size: (self.counts[size], prod(size)), default=None)
        seen = self.seen.get(size, {})
        return [call for progress in spread(seen, self.moments) for call in seen[progress]]
