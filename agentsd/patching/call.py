"""One call of a patched U-Net: an object of its own, which travels with the call in a context variable.

Nothing of a call is kept by the patch or by its layers, so one patched U-Net serves several threads, and calls inside
of calls.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
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
from ..schedule import MAX_TIMESTEP
from .finite import FiniteCheck

if TYPE_CHECKING:
    from .closeness import ClosenessMeter, Watch
    from .measure import Measurement

log = logging.getLogger("agentsd")

KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

_CURRENT: ContextVar[ModelCall | None] = ContextVar("agentsd_model_call", default=None)
_COUNTING = threading.Lock()


def current_call() -> ModelCall | None:
    """Return the call of a patched U-Net that this thread is in, the innermost one; None outside of any."""
    call = _CURRENT.get()
    while call is not None and not call.shared.installed:  # interrupted, and its patch removed by another thread
        call = call._outer
    return call


class Planned(NamedTuple):
    """What is done in a block, all None where full attention stays.

    Attributes:
        config: the settings in force.
        plan: the plan.
        size: (height, width) of its tokens.
        clustered: whether self-attention works on clusters of the block's tokens.
        name: names all of this to the compiler; empty where self-attention isn't changed.
    """

    config: AgentConfig | None = None
    plan: LayerPlan | None = None
    size: Grid | None = None
    clustered: bool = False
    name: str = ""


class BlockCall:
    """What one block does in a call of the U-Net.

    Attributes:
        planned: what is done.
        matching: clusters of its tokens, while it runs.
        asked: whether its self-attention came by.
        merged: what the block's other layers run on now: clusters and the tokens (B, N, C), by the layer's switch.
    """

    __slots__ = ("asked", "matching", "merged", "planned")

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self.matching: Matching | None = None
        self.asked = False
        self.merged: dict[str, tuple[Clusters, Tensor]] | None = None


class ModelCall:
    """One call of a patched U-Net.

    Attributes:
        shared: the patch's.
        latent: (height, width) of the latent; None if it was given none.
        part: progress at which the current part of the diffusion begins; no setting changes within a part.
        active: whether anything may be patched in this call.
        trains: whether it may be followed by a backward pass.
        sizes: (height, width) of the tokens, by the module around some blocks that sees them as an image.
        blocks: what each block does, once it is known.
        watch: compares answers with full attention; None in a call that is not watched.
        partitions: the partitions drawn so far.
    """

    def __init__(self, shared: Shared, latent: Grid | None, t: Any = None) -> None:
        self.shared, self.latent, self._t = shared, latent, t
        self.part: float | None = None
        self.active = latent is not None
        self.trains = torch.is_grad_enabled()
        self.sizes: dict[Any, Grid | None] = {}
        self.blocks: dict[Any, BlockCall] = {}
        self.watch: Watch | None = None
        self.partitions: dict[Any, Partition] = {}
        self._outer: ModelCall | None = None

    @cached_property
    def timestep(self) -> float | None:
        """Timestep of the call; read on demand only, since that waits for the device."""
        t, self._t = self._t, None
        return read_timestep(t)

    @property
    def progress(self) -> float | None:
        """The fraction of the diffusion that is done."""
        # a quotient of whole numbers equals the float that `until` holds; 1 − t / 1000 may not
        return None if self.timestep is None else (MAX_TIMESTEP - self.timestep) / MAX_TIMESTEP

    def partition(self, config: AgentConfig, size: Grid, device: torch.device) -> Partition:
        """Return the partition of a grid at the current timestep, on `device`."""
        key = (config.use_rand, size, config.sx, config.sy, device)
        if key not in self.partitions:
            seed = partition_seed(config.seed, self.timestep, *size, config.sx, config.sy) if config.use_rand else None
            self.partitions[key] = partition(*size, config.sx, config.sy, seed).to(device)
        return self.partitions[key]

    def match(self, config: AgentConfig, x: Tensor, size: Grid, r: int, agent_r: int) -> Matching:
        """Cluster a block's tokens x (B, N, C), which form a grid of this size; r and agent_r as in `LayerPlan`."""
        return match(x, self.partition(config, size, x.device), r, agent_r)


@dataclass(frozen=True)
class Answer:
    """A patched self-attention call, as `Patch.observer` receives it.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens.
        plan: what was done.
        matching: the clusters used; None if there were none.
        latent: (height, width) of the latent.
        timestep: timestep of the U-Net call; None if the call had none.
        call: the U-Net call, shared by all blocks in it.
    """

    name: str
    size: Grid
    plan: LayerPlan
    matching: Matching | None
    latent: Grid
    timestep: float | None
    call: ModelCall


@dataclass(eq=False)
class Shared:
    """What the blocks of one patch share from call to call.

    Attributes:
        config: the settings.
        kv_context: maps an attention module and its input to the inputs of the key and value projections.
        installed: whether the patch is.
        notes: reasons for leaving self-attention to the host, each with its number of calls.
        observer: is told of every answer.
        meter: closeness to full attention, while it is observed.
        timing: times what is done, while the patch measures.
        finite: compares the first answers with the host's.
        last: the last call that began. Gradient checkpointing makes blocks run again when it has ended.
        outside: whether no answer may be part of a graph.
        key: size and part of the call that a compiled graph is in, as text, since torch.compile takes a number that
            changes for a dynamic one; None while nothing may be patched.
    """

    config: AgentConfig
    kv_context: KVContext | None = None
    installed: bool = False
    notes: Counter[str] = field(default_factory=Counter)
    observer: Callable[[Answer], None] | None = None
    meter: ClosenessMeter | None = None
    timing: Measurement | None = None
    finite: FiniteCheck = field(default_factory=FiniteCheck)
    last: ModelCall | None = None
    outside: bool = False
    key: str | None = None
    _said: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None, "timing": None, "finite": FiniteCheck()}

    @property
    def stays_outside(self) -> bool:
        """Whether no answer may be part of a graph now: clusters are made for it, or something looks at it."""
        return self.outside or self.observer is not None or self.meter is not None or self.timing is not None

    def call(self) -> ModelCall | None:
        """Return this patch's call that is going on in this thread."""
        call = _CURRENT.get()
        if call is not None and call.shared is self:
            return call
        # the backward pass may run blocks again, in a thread of its own
        last = self.last
        return last if last is not None and last.trains and torch.is_grad_enabled() else None

    def begin(self, call: ModelCall) -> None:
        """Begin a call, inside of the one that is going on, if any."""
        outer = current_call()
        if outer is not None and outer.shared is self and not outer.sizes:  # the same call, told twice
            outer = outer._outer
        call._outer = outer
        self.last = call
        _CURRENT.set(call)

    def end(self) -> ModelCall | None:
        """End the call that is going on and return it; None if there is none."""
        call = _CURRENT.get()
        while call is not None and call.shared is not self:
            call = call._outer
        if call is not None:
            _CURRENT.set(call._outer)
            call._outer = None
        return call

    def note(self, reason: str, detail: str = "") -> None:
        """Count a reason for leaving a call to the host, and log it the first time, with a detail of that call."""
        with _COUNTING:
            self.notes[reason] += 1
            new = reason not in self._said
            self._said.add(reason)
        if new:
            log.warning("self-attention left to the host: %s%s", reason, detail and f" ({detail})")

    def warn(self, what: str) -> None:
        """Log what else there is to say, once."""
        if what not in self._said:
            self._said.add(what)
            log.warning(what)

    def count(self, calls: Counter[str], action: str) -> None:
        """Count a call; `+=` alone loses some where threads meet."""
        with _COUNTING:
            calls[action] += 1
