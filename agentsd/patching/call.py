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
from ..hosts import find_timestep, read_size, read_timestep
from ..methods import LayerPlan
from ..schedule import Timesteps
from ..words import error_of_ours
from .finite import FiniteCheck

if TYPE_CHECKING:
    from .closeness import Watch
    from .measure import Measured, Measurement

log = logging.getLogger("agentsd")

KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

_CURRENT: ContextVar[ModelCall | None] = ContextVar("agentsd_model_call", default=None)
# `+=` alone loses some counts where threads meet
COUNTING = threading.Lock()


def current_call() -> ModelCall | None:
    """Return the call of a patched U-Net that this thread is in, the innermost one; None outside of any."""
    call = _CURRENT.get()
    while call is not None and not call.patch.active:  # interrupted, and its patch removed by another thread
        call = call._outer
    return call


class Planned(NamedTuple):
    """What is done in a block, all None where full attention stays."""

    config: AgentConfig | None = None  # the settings in force
    plan: LayerPlan | None = None
    size: Grid | None = None  # (height, width) of its tokens
    clustered: bool = False  # whether self-attention works on clusters of the block's tokens
    name: str = ""  # names all of this to the compiler; empty where self-attention isn't changed


UNPLANNED = Planned()


@dataclass(slots=True)
class BlockCall:
    """What one block does in a call of the U-Net."""

    planned: Planned
    asked: bool = False  # whether its self-attention came by
    matching: Matching | None = None  # clusters of its tokens, while it runs
    # what the block's other layers run on now: clusters and the tokens (B, N, C), by the layer's switch
    merged: dict[str, tuple[Clusters, Tensor]] | None = None


class ModelCall:
    """One call of a patched U-Net.

    Attributes:
        patch: the patch.
        latent: (height, width) of the latent; None if it was given none.
        part: progress at which the current part of the diffusion begins; no setting changes within a part.
        active: whether anything may be patched in this call.
        trains: whether it may be followed by a backward pass.
        sizes: (height, width) of the tokens, by the module around some blocks that sees them as an image.
        plans: what is planned, by the block, once the size of its tokens is known.
        blocks: what each block has done so far.
        watch: compares answers with full attention; None in a call that is not watched.
        partitions: the partitions drawn so far.
    """

    def __init__(self, patch: PatchState, latent: Grid | None, t: Any = None, part: float | None = None) -> None:
        self.patch, self.latent, self._t, self.part = patch, latent, t, part
        self.active = latent is not None
        self.trains = torch.is_grad_enabled()
        self.sizes: dict[Any, Grid | None] = {}
        self.plans: dict[Any, Planned] = {}
        self.blocks: dict[Any, BlockCall] = {}
        self.watch: Watch | None = None
        self.partitions: dict[Any, Partition] = {}
        self._outer: ModelCall | None = None

    @cached_property
    def timestep(self) -> float | None:
        """Timestep of the call; read on demand only, since that waits for the device."""
        t, self._t = self._t, None
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
    latent: Grid  # (height, width) of the latent
    timestep: float | None  # timestep of the U-Net call; None if the call had none
    call: ModelCall  # the U-Net call, shared by all blocks in it
    chosen: list[Tensor]  # cells that windows opened in the first row (windows, heads, opened), some heads at a time


@dataclass(eq=False)
class PatchState:
    """What the blocks of one patch share from call to call."""

    config: AgentConfig  # the settings
    # maps an attention module and its input to the inputs of the key and value projections
    kv_context: KVContext | None = None
    outside: bool = False  # whether no answer may be part of a graph
    active: bool = False  # whether the patch is installed
    timesteps: Timesteps = field(default_factory=Timesteps)  # tells how far the diffusion is
    # reasons for leaving self-attention to the host, each with its number of calls
    notes: Counter[str] = field(default_factory=Counter)
    # is called with an `Answer` after every patched attention, of which it must not keep a tensor; None (the default)
    # costs nothing
    observer: Callable[[Answer], None] | None = None
    meter: Watch | None = None
    timing: Measurement | None = None
    measured: Measured | None = None  # what `Patch.measure` found; None before two U-Net calls have been changed
    finite: FiniteCheck = field(default_factory=FiniteCheck)
    # the U-Net call that began last; None before the first, and where torch.compile made it part of a graph. Gradient
    # checkpointing makes blocks run again when it has ended.
    last_call: ModelCall | None = None
    sized_outside: bool = False  # whether sizes are read off values, which no graph can
    # size and part of the call that a compiled graph is in, as text, since torch.compile takes a number that changes
    # for a dynamic one; None while nothing may be patched
    key: str | None = None
    _said: set[str] = field(default_factory=set)

    def read_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Read (height, width) off the arguments of the model, or of a part that sees tokens as an image."""
        return read_size(args, kwargs)

    def find_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the timesteps among the model's arguments, unread; None if there are none."""
        return find_timestep(args, kwargs)

    @property
    def watched(self) -> bool:
        """Whether something looks at the answers."""
        return self.observer is not None or self.meter is not None or self.timing is not None

    @property
    def stays_outside(self) -> bool:
        """Whether no answer may be part of a graph now: clusters are made for it, or something looks at it."""
        return self.outside or self.watched

    def call(self) -> ModelCall | None:
        """Return this patch's call that is going on in this thread."""
        call = _CURRENT.get()
        if call is not None and call.patch is self:
            return call
        # the backward pass may run blocks again, in a thread of its own
        last = self.last_call
        return last if last is not None and last.trains and torch.is_grad_enabled() else None

    def begin(self, call: ModelCall) -> None:
        """Begin a call, inside of the one that is going on, if any."""
        outer = current_call()
        if outer is not None and outer.patch is self and not outer.sizes:  # the same call, told twice
            outer = outer._outer
        call._outer = outer
        self.last_call = call
        _CURRENT.set(call)

    def end(self) -> ModelCall | None:
        """End the call that is going on and return it; None if there is none."""
        call = _CURRENT.get()
        while call is not None and call.patch is not self:
            call = call._outer
        if call is not None:
            _CURRENT.set(call._outer)
            call._outer = None
        return call

    def note(self, reason: str, detail: str = "") -> None:
        """Count a reason for leaving a call to the host, and log it the first time, with a detail of that call."""
        with COUNTING:
            self.notes[reason] += 1
        self.say_once(reason, f"self-attention left to the host: {reason}{detail and f' ({detail})'}")

    def note_error(self, error: Exception, where: str = "a call of the model") -> None:
        """Note an error that is being handled: a bug of ours must never cost the user an image."""
        self.note(error_of_ours(error))
        log.debug("agent attention failed in %s", where, exc_info=True)

    def say_once(self, what: str, text: str = "") -> None:
        """Log `text`, or `what` without one, unless `what` was said before."""
        with COUNTING:
            new = what not in self._said
            self._said.add(what)
        if new:
            log.warning("%s", text or what)
