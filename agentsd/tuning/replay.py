"""Make recorded calls again, compare what comes out, and tell which is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from math import comb, inf
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..checks import SettingError
from ..clock import WALL, Clock, peak_memory
from ..config import AgentConfig
from ..hosts import find_model, output_tensor, progress_by, read_call, read_timestep, weight_of
from ..patching.call import KVContext
from ..patching.joint import make_patch
from ..patching.patch import alone
from ..schedule import Timesteps
from .probe import norm
from .record import RecordedCall, copied
from .result import TuningCancelled

Progress = Callable[[int, int, str], Any]
# Rounds of calls without and with: after so many the first look, and the last.
MIN_ROUNDS, MAX_ROUNDS = 6, 18
# Confidence with which a ratio of times is told from 1.
CONFIDENCE = 0.95
# Rounds in which settings are compared with full attention, at each recorded timestep
_COMPARED = 2


class Replay:
    """Recorded calls of a model, which can be made again; the arguments are those of `agentsd.tune`.

    Raises:
        SettingError: there are no calls, or their latents are of several sizes.
    """

    def __init__(
        self,
        model: Any,
        calls: Iterable[RecordedCall],
        progress: Progress | None = None,
        kv_context: KVContext | None = None,
        clock: Clock = WALL,
    ) -> None:
        self.model = find_model(model)  # the U-Net or transformer
        self.progress, self.kv_context, self.clock = progress, kv_context, clock
        read = [(call, size, read_timestep(t)) for call in calls for size, t in [read_call(self.model, *call)]]
        sizes = {size for _, size, _ in read}
        if not sizes:
            raise SettingError("calls must hold at least one call of the model, got none")
        if None in sizes or len(sizes) > 1:
            raise SettingError(f"calls must have latents of one size, got {sorted(map(str, sizes))}")
        (self.size,) = sizes  # (height, width) of the latents, or of a transformer's grid of tokens
        timesteps, told = Timesteps(progress_by(self.model, self.model)), []
        for call, _, t in sorted(read, key=lambda each: -(each[2] or 0.0)):  # as a run makes them
            said = getattr(call, "progress", None)
            told.append((call, timesteps.progress(t) if said is None and t is not None else said))
        told.sort(key=lambda each: each[1] or 0.0)
        # in the order of the diffusion, and the fraction of it that is done at each; None if it isn't known
        self.calls, self.moments = [call for call, _ in told], [moment for _, moment in told]
        # not that of the weights, which offloading moves
        given = (x.device for args, kwargs in self.calls for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        self.device = next(given, weight_of(self.model).device)
        self.full: dict[int, Tensor] = {}  # outputs with full attention, by the call's number
        self.done = self.total = 0  # calls made, and expected

    def __len__(self) -> int:
        return len(self.calls)

    def call(self, number: int, text: str, config: AgentConfig | None = None) -> tuple[Tensor, float]:
        """Make a call under a config (None: under whatever is installed); return its float32 output and seconds."""
        if self.progress is not None and self.progress(min(self.done, self.total), self.total, text) is False:
            raise TuningCancelled(f"cancelled after {self.done} model calls")
        self.done += 1
        args, kwargs = copied(tuple(self.calls[number]))
        moment = self.moments[number]
        patch = None
        if config is not None:
            patch = make_patch(self.model, config, self.kv_context, progress=lambda t: moment)
        with nullcontext() if patch is None else alone(self.model, patch):
            out, seconds = self.clock.timed(lambda: self.model(*args, **kwargs), self.device)
        return output_tensor(out).detach().float(), seconds

    def remember(self, number: int, text: str) -> float:
        """Make a call with full attention and keep its output; return by how much the recorded output differs."""
        self.full[number], _ = self.call(number, text)
        recorded = getattr(self.calls[number], "output", None)
        return 0.0 if recorded is None else self.deviation(number, recorded.float())

    def deviation(self, number: int, out: Tensor) -> float:
        """‖out − full‖ / ‖full‖."""
        return norm(out - self.full[number]) / max(norm(self.full[number]), 1e-12)


@dataclass(frozen=True)
class TimeRatio:
    """Seconds with / seconds without."""

    ratio: float  # mean over the calls of medians over rounds
    low: float  # where it begins, with `CONFIDENCE`; 0 where too few rounds were made to tell
    high: float  # where it ends; infinite where too few were made
    seconds: float = 0.0  # without, averaged over the calls
    peaks: tuple[int | None, int | None] = (None, None)  # most bytes on the device, without and with


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return the interval that holds the median of what `samples` are drawn from; without end if they are too few.

    By order statistics, for any distribution (e.g. Gibbons and Chakraborti, Nonparametric Statistical Inference, 5.4).
    """
    ordered, n = sorted(samples), len(samples)
    outside = accumulate(2 * comb(n, k) / 2**n for k in range((n + 1) // 2))
    k = sum(each <= 1 - CONFIDENCE for each in outside)
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, inf)


def timed_in_turn(replay: Replay, configs: Mapping[int, AgentConfig], text: str) -> TimeRatio:
    """Make calls without and with their config in turn, until one can tell which is faster, or `MAX_ROUNDS` were made.

    A round is one call, without and with, and the next round the next call in the other order: what else the machine
    does meanwhile meets both.
    """
    spent: dict[int, list[tuple[float, float]]] = {number: [] for number in configs}
    peaks: dict[bool, int | None] = {}
    for round_, number in zip(range(MAX_ROUNDS), cycle(configs), strict=False):
        order, seconds = (False, True), {}
        for ours in reversed(order) if round_ // len(configs) % 2 else order:
            call = partial(replay.call, number, text, configs[number] if ours else None)
            (_, seconds[ours]), peak = peak_memory(call, replay.device)
            peaks[ours] = peak and max(peak, peaks.get(ours, 0))
        spent[number].append((seconds[False], seconds[True]))
        low, high = interval([ours / full for each in spent.values() for full, ours in each])
        if round_ + 1 >= MIN_ROUNDS and (low > 1 or high < 1):
            break
    made = [each for each in spent.values() if each]
    ratio = fmean(median(ours / full for full, ours in each) for each in made)
    full = fmean(median(full for full, _ in each) for each in made)
    return TimeRatio(ratio, low, high, full, (peaks[False], peaks[True]))


@dataclass(frozen=True)
class Compared:
    """What settings do to recorded calls."""

    deviation: float  # ‖out − full‖ / ‖full‖ of the model's output, the largest of all calls
    time: float  # of a call, full attention in the same round = 1: the median of all rounds


def comparing_takes(calls: Sized, configs: Sized) -> int:
    """Return the number of model calls that `compare` makes."""
    return len(calls) * (1 + _COMPARED * (1 + len(configs)))


def compare(
    model: Any,
    calls: Iterable[RecordedCall],
    configs: Mapping[str, AgentConfig],
    *,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
) -> dict[str, Compared]:
    """Make recorded calls with full attention and under each of several settings, by name, in turn.

    The other arguments are those of `agentsd.tune`.
    """
    replay = Replay(model, calls, progress, kv_context)
    replay.total = comparing_takes(replay, configs)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in configs}
    with torch.no_grad(), alone(replay.model):
        for number in range(len(replay)):
            replay.remember(number, "Full attention")
            for _ in range(_COMPARED):
                without = replay.call(number, "Full attention")[1]
                for name, config in configs.items():
                    out, seconds = replay.call(number, name, config)
                    found[name][0].append(replay.deviation(number, out))
                    found[name][1].append(seconds / without)
    return {name: Compared(max(deviations), median(times)) for name, (deviations, times) in found.items()}
