"""Make recorded calls again, and compare what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import SettingError
from ..clock import timed
from ..config import AgentConfig
from ..hosts import find_unet, output_tensor, read_size, weight_of
from ..patching.layer import KVContext
from ..patching.patch import Patch
from .probe import installed, norm, unpatched
from .record import RecordedCall, copied, progress_of
from .result import TuningCancelled

Progress = Callable[[int, int, str], Any]


class Replay:
    """Recorded calls of a U-Net, which can be made again.

    Args:
        unet: the U-Net.
        calls: its calls, in any order.
        progress: called with (done, total, text) before each call; the calls stop if it returns False.

    Attributes:
        calls: the calls in the order of the diffusion.
        size: (height, width) of their latents.
        full: outputs with full attention, once `remember` has stored them.
        done: number of calls made.
        total: number of calls expected.

    Raises:
        SettingError: there are no calls, or their latents are of several sizes.
    """

    def __init__(self, unet: nn.Module, calls: Iterable[RecordedCall], progress: Progress | None = None) -> None:
        self.calls = sorted(calls, key=lambda call: progress_of(call) or 0.0)
        sizes = {read_size(*call) for call in self.calls}
        if not sizes:
            raise SettingError("calls must hold at least one call of the U-Net, got none")
        if None in sizes or len(sizes) > 1:
            raise SettingError(f"calls must have latents of one size, got {sorted(map(str, sizes))}")
        (self.size,) = sizes
        self.unet, self.progress = unet, progress
        self.device = weight_of(unet).device
        self.full: dict[int, Tensor] = {}
        self.done = self.total = 0

    def __len__(self) -> int:
        return len(self.calls)

    def call(self, number: int, text: str) -> tuple[Tensor, float]:
        """Make a call under whatever patch is installed; return its output, in float32, and its seconds.

        Raises:
            TuningCancelled: `progress` returned False.
        """
        if self.progress is not None and self.progress(min(self.done, self.total), self.total, text) is False:
            raise TuningCancelled(f"cancelled after {self.done} U-Net calls")
        self.done += 1
        args, kwargs = copied(self.calls[number])
        out, seconds = timed(lambda: self.unet(*args, **kwargs), self.device)
        return output_tensor(out).detach().float(), seconds

    def remember(self, number: int, full: Tensor) -> None:
        """Store the output of a call with full attention."""
        self.full[number] = full

    def deviation(self, number: int, out: Tensor) -> float:
        """‖out − full‖ / ‖full‖."""
        full = self.full[number]
        return norm(out - full) / max(norm(full), 1e-12)


@dataclass(frozen=True)
class Compared:
    """What settings do to recorded calls.

    Attributes:
        deviation: ‖out − full‖ / ‖full‖ of the U-Net's output, the largest of all calls.
        seconds: seconds of a call, their mean.
    """

    deviation: float
    seconds: float


def compare(
    model: Any,
    calls: Iterable[RecordedCall],
    configs: Mapping[str, AgentConfig | None],
    *,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
) -> dict[str, Compared]:
    """Make recorded calls with full attention and under each of several settings, in turn.

    Args:
        model: as for `apply_patch`. A patch on it is removed meanwhile.
        calls: as for `agentsd.tune`.
        configs: the settings, by names of the caller's; None for full attention.
        progress: as for `agentsd.tune`.
        kv_context: as for `agentsd.Patch`.

    Returns:
        The comparison for each name.
    """
    replay = Replay(find_unet(model), calls, progress)
    replay.total = len(replay) * (1 + len(configs))
    found: dict[str, list[Compared]] = {name: [] for name in configs}
    with torch.no_grad(), unpatched(replay.unet):
        for number in range(len(replay)):
            replay.remember(number, replay.call(number, "Full attention")[0])
            for name, config in configs.items():
                out, seconds = called_under(replay, number, config, name, kv_context)
                found[name].append(Compared(replay.deviation(number, out), seconds))
    return {name: _summary(each) for name, each in found.items()}


def called_under(
    replay: Replay, number: int, config: AgentConfig | None, text: str, kv_context: KVContext | None
) -> tuple[Tensor, float]:
    """Make a call under a config; None for full attention."""
    if config is None:
        return replay.call(number, text)
    with installed(Patch(replay.unet, config, kv_context)):
        return replay.call(number, text)


def _summary(each: Sequence[Compared]) -> Compared:
    return Compared(max(one.deviation for one in each), fmean(one.seconds for one in each))
