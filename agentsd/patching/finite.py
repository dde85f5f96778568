"""A guard against black images: the first answers of a patch are compared with the host's for what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOTE = "agents gave values that are not finite where the host's attention is"


class FiniteCheck:
    """Checks the first answer of each block, without waiting for the device: what was found there is read once known.

    On an accelerator only float16 is checked, which ends at 65504: other types reach as far as the host's attention.
    """

    def __init__(self) -> None:
        self.failed = False
        self.answered: set[Any] = set()  # the blocks whose first answer was looked at
        self._bad: list[Tensor] = []
        self._sent: Tensor | None = None
        self._arrived: torch.Event | None = None
        self._lowest = float("inf")

    def answer(self, block: Any, ours: Tensor, host: Callable[[], Tensor]) -> Tensor:
        """Return our answer of a block, or the host's where ours, the first, is not finite and the host's is."""
        on_cpu, first = ours.device.type == "cpu", block not in self.answered
        self.answered.add(block)
        # tensors without values, as counters of FLOPs use them, have nothing to look at
        if not first or not (on_cpu or ours.dtype == torch.float16) or type(ours) is not Tensor:
            return ours
        fine = ours.detach().isfinite().all()  # gradient checkpointing must save as many tensors when it runs again
        if on_cpu and fine:
            return ours
        try:
            theirs = host()
        except RuntimeError:  # too little memory, say
            return ours
        bad = ~fine & theirs.isfinite().all()
        self._bad.append(bad)
        return torch.where(bad, theirs, ours)

    def is_over(self, timestep: float | None) -> bool:
        """Whether a call at this timestep belongs to another pass: within one, timesteps don't rise."""
        over = timestep is not None and timestep > self._lowest
        self._lowest = self._lowest if timestep is None else min(self._lowest, timestep)
        return over

    def poll(self) -> bool:
        """Return `failed`, as far as it is known without waiting; asked between U-Net calls."""
        if (self._bad or self._arrived) and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.failed  # a CUDA graph has no room for what is read
        if self._bad:
            bad, self._bad = torch.stack(self._bad).any(), []
            event = getattr(getattr(torch, bad.device.type, None), "Event", None)
            if bad.device.type == "cpu" or event is None:  # DirectML has none
                self.failed |= bool(bad)
            else:
                self._sent = bad.to("cpu", non_blocking=True)
                self._arrived = event()
                self._arrived.record()
        if self._arrived is not None and self._arrived.query():
            self._arrived = None
            self.failed |= bool(self._sent)
        return self.failed
