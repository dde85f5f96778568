"""Make recorded calls again, compare what comes out, and tell which is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import comb
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import SettingError
from ..clock import WALL, Clock, peak_memory
from ..config import AgentConfig
from ..hosts import find_timestep, find_unet, output_tensor, read_size, read_timestep, weight_of
from ..patching.call import KVContext
from ..patching.patch import Patch
from ..schedule import Timesteps
from .probe import alone, norm
from .record import RecordedCall, copied, progress_of
from .result import TuningCancelled

Progress = Callable[[int, int, str], Any]
# Rounds of calls without and with: after so many the first look, and the last.
MIN_ROUNDS, MAX_ROUNDS = 6, 18
# Confidence with which a ratio of times is told from 1.
CONFIDENCE = 0.95
# Rounds in which settings are compared with full attention, at each recorded timestep
_COMPARED = 2


class Replay:
    """Recorded calls of a U-Net, which can be made again; the arguments are those of `agentsd.tune`.

    Attributes:
        calls: the calls in the order of the diffusion.
        moments: the fraction of the diffusion that is done at each; None if it isn't known.
        size: (height, width) of their latents.
        full: outputs with full attention, by the call's number, once `remember` has made them.
        done, total: numbers of calls made, and expected.

    Raises:
        SettingError: there are no calls, or their latents are of several sizes.
    """

    def __init__(
        self,
        unet: nn.Module,
        calls: Iterable[RecordedCall],
        progress: Progress | None = None,
        kv_context: KVContext | None = None,
        clock: Clock = WALL,
    ) -> None:
        # as a run makes them, whatever their order
        falling, timesteps = sorted(calls, key=lambda c: -(read_timestep(find_timestep(*c)) or 0.0)), Timesteps()
        moments = {id(call): progress_of(call, timesteps) for call in falling}
        self.calls = sorted(falling, key=lambda call: moments[id(call)] or 0.0)
        self.moments = [moments[id(call)] for call in self.calls]
        sizes = {read_size(*call) for call in self.calls}
        if not sizes:
            raise SettingError("calls must hold at least one call of the U-Net, got none")
        if None in sizes or len(sizes) > 1:
            raise SettingError(f"calls must have latents of one size, got {sorted(map(str, sizes))}")
        (self.size,) = sizes
        self.unet, self.progress, self.kv_context = unet, progress, kv_context
        self.clock = clock
        self.device = weight_of(unet).device
        self.full: dict[int, Tensor] = {}
        self.done = self.total = 0

    def __len__(self) -> int:
        return len(self.calls)

    def call(self, number: int, text: str, config: AgentConfig | None = None) -> tuple[Tensor, float]:
        """Make a call under a config (None: under whatever is installed); return its output, in float32, and seconds.

        Raises:
            TuningCancelled: `progress` returned False.
        """
        if self.progress is not None and self.progress(min(self.done, self.total), self.total, text) is False:
            raise TuningCancelled(f"cancelled after {self.done} U-Net calls")
        self.done += 1
        args, kwargs = copied(tuple(self.calls[number]))
        moment = self.moments[number]
        patch = None if config is None else Patch(self.unet, config, self.kv_context, progress=lambda t: moment)
        with nullcontext() if patch is None else alone(self.unet, patch):
            out, seconds = self.clock.timed(lambda: self.unet(*args, **kwargs), self.device)
        return output_tensor(out).detach().float(), seconds

    def remember(self, number: int, text: str) -> float:
        """Make a call with full attention and keep its output; return by how much the recorded output differs."""
        self.full[number], _ = self.call(number, text)
        recorded = getattr(self.calls[number], "output", None)
        return 0.0 if recorded is None else self.deviation(number, recorded.float())

    def deviation(self, number: int, out: Tensor) -> float:
        """‖out − full‖ / ‖full‖."""
        full = self.full[number]
        return norm(out - full) / max(norm(full), 1e-12)


@dataclass(frozen=True)
class TimeRatio:
    """Seconds with / seconds without."""

    ratio: float  # mean over the calls of medians over rounds
    low: float  # where it begins, with `CONFIDENCE`; 0 where too few rounds were made to tell
    high: float  # where it ends; infinite where too few were made
    seconds: float = 0.0  # without, averaged over the calls
    peaks: tuple[int | None, int | None] = (None, None)  # most bytes on the device, without and with


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval that holds the median of what `samples` are drawn from; without end if they are too few.

    By order statistics, for any distribution (e.g. Gibbons and Chakraborti, Nonparametric Statistical Inference, 5.4).
    """
    ordered, n = sorted(samples), len(samples)
    outside, k = 0.0, -1
    while k + 1 < n / 2 and outside + 2 * comb(n, k + 1) / 2**n <= 1 - confidence:
        k += 1
        outside += 2 * comb(n, k) / 2**n
    return (ordered[k], ordered[n - 1 - k]) if k >= 0 else (0.0, float("inf"))


def timed_in_turn(replay: Replay, configs: Mapping[int, AgentConfig], text: str) -> TimeRatio:
    """Make calls without and with their config in turn, until one can tell which is faster, or `MAX_ROUNDS` were made.

    A round is one call, without and with, and the next round the next call in the other order: what else the machine
    does meanwhile meets both.
    """
    spent: dict[int, list[tuple[float, float]]] = {number: [] for number in configs}
    peaks: dict[bool, int | None] = {}
    numbers = list(configs)
    for round_ in range(MAX_ROUNDS):
        number, order = numbers[round_ % len(numbers)], (False, True)
        seconds = {}
        for ours in reversed(order) if round_ // len(numbers) % 2 else order:
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

    deviation: float  # ‖out − full‖ / ‖full‖ of the U-Net's output, the largest of all calls
    time: float  # of a call, full attention in the same round = 1: the median of all rounds


def comparing_takes(calls: Sized, configs: Sized) -> int:
    """Return the number of U-Net calls that `compare` makes."""
    return len(calls) * (1 + _COMPARED * (1 + len(configs)))


def compare(
    model: Any,
    calls: Iterable[RecordedCall],
    configs: Mapping[str, AgentConfig],
    *,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
    clock: Clock = WALL,
) -> dict[str, Compared]:
    """Make recorded calls with full attention and under each of several settings, in turn.

    Args:
        configs: the settings, by names of the caller's, which those of what is returned are.
        model, calls, progress, kv_context, clock: as for `agentsd.tune`; this `progress` is told how far it is.
    """
    replay = Replay(find_unet(model), calls, progress, kv_context, clock)
    replay.total = comparing_takes(replay, configs)
    found: dict[str, list[Compared]] = {name: [] for name in configs}
    with torch.no_grad(), alone(replay.unet):
        for number in range(len(replay)):
            replay.remember(number, "Full attention")
            for _ in range(_COMPARED):
                without = replay.call(number, "Full attention")[1]
                for name, config in configs.items():
                    out, seconds = replay.call(number, name, config)
                    found[name].append(Compared(replay.deviation(number, out), seconds / without))
    return {
        name: Compared(max(one.deviation for one in each), median(one.time for one in each))
        for name, each in found.items()
    }
