"""One call of a patched U-Net: an object of its own, which travels with the call in a context variable.

Nothing of a call is kept by the patch or by its layers, so one patched U-Net serves several threads, and calls inside
of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Clusters, Matching, Partition, match, partition, partition_seed
from ..config import AgentConfig
from ..hosts import read_timestep
from ..methods import LayerPlan

if TYPE_CHECKING:
    from .closeness import Watch
    from .layer import Layer
    from .patch import Patch

KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


class Planned(NamedTuple):
    """What is done in a block; all but the size None where full attention stays."""

    config: AgentConfig | None = None  # the settings in force
    plan: LayerPlan | None = None
    size: Grid | None = None  # (height, width) of its tokens
    clustered: bool = False  # whether self-attention works on clusters of the block's tokens
    name: str = ""  # names all of this to the compiler; empty where self-attention isn't changed


UNPLANNED = Planned()


@dataclass(eq=False)
class ModelCall:
    """One call of a patched U-Net."""

    patch: Patch
    latent: Grid | None  # (height, width) of the latent; None if it was given none
    t: Any = None  # the timesteps it was given, unread
    part: float | None = None  # progress at which its part of the diffusion begins; no setting changes within a part
    active: bool = True  # whether anything may be patched
    trains: bool = field(default_factory=torch.is_grad_enabled)  # whether it may be followed by a backward pass
    watch: Watch | None = None  # compares answers with full attention; None in a call that is not watched
    outer: ModelCall | None = None  # the call inside of which this one goes on, if any
    plans: dict[Layer, Planned] = field(default_factory=dict)  # once the size of a block's tokens is known
    matchings: dict[Layer, Matching] = field(default_factory=dict)  # clusters of a block's tokens, while it runs
    # what a block's other layers run on now, by their switch: clusters, and the tokens (B, N, C)
    merged: dict[tuple[Layer, str], tuple[Clusters, Tensor]] = field(default_factory=dict)
    answered: list[tuple[Layer, str]] = field(default_factory=list)  # calls of self-attention, and what was done
    partitions: dict[Any, Partition] = field(default_factory=dict)  # those drawn so far

    @cached_property
    def timestep(self) -> float | None:
        """Timestep of the call; read on demand only, since that waits for the device."""
        t, self.t = self.t, None
        return read_timestep(t)

    @cached_property
    def progress(self) -> float | None:
        """The fraction of the diffusion that is done."""
        return None if self.timestep is None else self.patch.timesteps.progress(self.timestep)

    def match(self, config: AgentConfig, x: Tensor, size: Grid, r: int, agent_r: int) -> Matching:
        """Cluster a block's tokens x (B, N, C), which form a grid of this size; r and agent_r as in `LayerPlan`."""
        key = (config.use_rand, size, config.sx, config.sy, x.device)
        if key not in self.partitions:
            seed = partition_seed(config.seed, self.timestep, *size, config.sx, config.sy) if config.use_rand else None
            self.partitions[key] = partition(*size, config.sx, config.sy, seed).to(x.device)
        return match(x, self.partitions[key], r, agent_r)


class Answer(NamedTuple):
    """A patched self-attention call, as `Patch.observer` receives it."""

    name: str  # the block's name in the U-Net
    size: Grid  # (height, width) of its tokens
    plan: LayerPlan  # what was done
    matching: Matching | None  # the clusters used; None if there were none
    call: ModelCall  # the U-Net call, shared by all blocks in it
    chosen: list[Tensor]  # cells that windows opened in the first row (windows, heads, opened), some heads at a time


CURRENT: ContextVar[ModelCall | None] = ContextVar("agentsd_model_call", default=None)


def current_call() -> ModelCall | None:
    """Return the call of a patched U-Net that this thread is in, the innermost one; None outside of any."""
    call = CURRENT.get()
    while call is not None and not call.patch.active:  # interrupted, and its patch removed by another thread
        call = call.outer
    return call
