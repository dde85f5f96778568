"""The patch: an object that owns its hooks and the changes it made to modules, and can undo all of them."""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import hosts
from ..attention.grid import Grid
from ..clock import WALL, Clock
from ..config import AgentConfig
from ..eager import compiler_loaded, compiling, followed, keep_out, not_compiled
from ..methods import UNTOUCHED, LayerPlan
from ..plan import may_match, plan_block
from ..schedule import MAX_TIMESTEP, Moment, Timesteps
from ..words import error_of_ours
from .call import CURRENT, Answer, KVContext, ModelCall, current_call
from .closeness import Closeness, Watch
from .finite import NOTE as NOT_FINITE
from .finite import FiniteCheck
from .layer import Answerer, Image, Layer, LayerReport
from .measure import Measured, Measurement

log = logging.getLogger("agentsd")

# `+=` alone loses some counts where threads meet
_COUNTING = threading.Lock()


class Patch:
    """Agent attention on one U-Net. Created by `apply_patch`; `remove` undoes it.

    Threads may share a patched U-Net: what belongs to one call of it is a `ModelCall` (`agentsd.patching.call`).

    Args:
        unet: the U-Net (LDM, sgm, Forge or diffusers).
        config: the settings.
        kv_context: maps the attention module and its input (B, N, C) to the inputs of the key and value projections,
            for a host's hypernetworks, say. None: the input itself.
        answerer: plans the blocks and answers their self-attention.
        progress: as for `apply_patch`.

    Raises:
        UnsupportedModelError: the U-Net has no transformer blocks to patch.
    """

    answerer_class: type[Answerer] = Answerer
    sized_outside = False  # whether sizes are read off values, which no graph can
    # lists what can be patched, in order
    sites: Callable[..., list[hosts.Site]] = staticmethod(hosts.find_sites)
    # (height, width) off the arguments (args, kwargs) of the model, or of a part that sees tokens as an image
    read_size: Callable[..., tuple[int, int] | None] = staticmethod(hosts.read_size)
    # the timesteps among the model's arguments, unread; None if there are none
    find_timestep: Callable[..., Any] = staticmethod(hosts.find_timestep)

    def __init__(
        self,
        unet: nn.Module,
        config: AgentConfig,
        kv_context: KVContext | None = None,
        answerer: Answerer | None = None,
        progress: Moment | None = None,
    ) -> None:
        answerer = answerer or self.answerer_class()
        self._unet = weakref.ref(unet)
        self.config, self.kv_context, self.timesteps = config, kv_context, Timesteps(progress)
        self.outside = may_match(config) or answerer.tries  # whether no answer may be part of a graph
        self.active = False  # whether it is installed
        # reasons for leaving self-attention to the host, each with its number of calls
        self.notes: Counter[str] = Counter()
        # called with an `Answer` after every patched attention, of which it must not keep a tensor; None costs nothing
        self.observer: Callable[[Answer], None] | None = None
        self.meter: Watch | None = None
        self.timing: Measurement | None = None
        self.measured: Measured | None = None  # what `measure` found; None before two U-Net calls have been changed
        self.finite = FiniteCheck()
        # the U-Net call that began last; None before the first, and where torch.compile made it part of a graph.
        # Gradient checkpointing makes blocks run again when it has ended.
        self.last_call: ModelCall | None = None
        # size and part of the call that a compiled graph is in, as text, since torch.compile takes a number that
        # changes for a dynamic one; None while nothing may be patched
        self.key: str | None = None
        self._said: set[str] = set()
        self._aside: dict[nn.Module, Any] = {}  # what compiled blocks ran by that run uncompiled now
        self._handles: list[Any] = []
        self._timed, self._parts = config.timed, [since for since, _ in config.parts()]
        sites = self.sites(unet)
        images = {id(site.parent): Image(self, site.parent) for site in sites}
        self._images = list(images.values())
        self._layers = [Layer(self, answerer, site, images[id(site.parent)]) for site in sites]
        self._acting = [layer for layer in self._layers if layer.acts]
        if not self._layers:
            raise hosts.UnsupportedModelError(f"{type(unet).__name__} has no transformer blocks to patch")
        for image in self._images:
            # the first one always: it shows that a call has come that far
            image.looks = image is self._images[0] or any(layer.acts for layer in image.layers)
        self._note_idle_rules()

    def __getstate__(self) -> dict[str, Any]:
        of_this_run = {"last_call": None, "timing": None, "measured": None, "finite": FiniteCheck(), "_aside": {}}
        return {**vars(self), "_unet": self._unet(), **of_this_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _unet=weakref.ref(state["_unet"]))

    @property
    def stays_outside(self) -> bool:
        """Whether no answer may be part of a graph now: clusters are made for it, or something looks at it."""
        return self.outside or any(look is not None for look in (self.observer, self.meter, self.timing))

    def install(self) -> None:
        """Install hooks and replace self-attention, all or nothing. An existing patch is removed first."""
        unet = self._unet()
        if unet is None or self.active:
            return
        old = patch_of(unet)
        if old is not None:
            old.remove()
        keep_out()
        self.active, self.finite = True, FiniteCheck()
        try:
            # a hook of the whole U-Net is outside of its graph, unless its call and not its `forward` is compiled
            outside = self._timed or self.outside or self.sized_outside
            begin = self._begin_outside_graph if outside else self.begin_call
            self._handles.append(unet.register_forward_pre_hook(begin, with_kwargs=True))
            for image in self._images:
                if image.looks:
                    self._handles.append(image.module.register_forward_pre_hook(image.look, with_kwargs=True))
            for layer in self._acting:
                self._handles += layer.install()
            self._handles.append(unet.register_forward_hook(self._end, always_call=True))
        except BaseException:
            self.remove()
            if old is not None:
                old.install()
            raise

    def remove(self) -> None:
        """Undo every change. Further calls do nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            layer.remove()
        self._put_back()
        self.active = False
        while self.end() is not None:  # calls that were interrupted
            pass

    def restart_report(self) -> None:
        """Start the counts of a report, and the look at the first answers, anew."""
        for counts in (self.notes, *(layer.calls for layer in self._layers)):
            counts.clear()
        self.finite = FiniteCheck()
        self._note_idle_rules()

    def report(self) -> list[LayerReport]:
        """Report what was done to each block so far, in U-Net order."""
        return [layer.report() for layer in self._layers]

    def explain(self, height: int, width: int, progress: float | None = None) -> list[tuple[str, LayerPlan | None]]:
        """Plan each block for a latent of `height` × `width` (an eighth of the image), without running anything.

        `progress`, 0–1, is needed only where settings vary over the diffusion. Returns (name, plan) of each block; the
        plan is None where a stage or a rule means full attention, or the block's level in the U-Net is unknown. Where a
        tuning is used at another size than its own, `plan.note` says so, and `plan.reason` where that is not sound.
        """
        places = [layer.site.place for layer in self._layers]
        plans = ((place, plan_block(self.config, place, (height, width), progress)) for place in places)
        return [(place.name, planned and planned[1]) for place, planned in plans]

    @property
    def observe_closeness(self) -> bool:
        """Whether one of every few U-Net calls compares a few tokens of each patched block with full attention.

        Off by default. No pixel depends on it. Setting it starts the measurement anew.
        """
        return self.meter is not None

    @observe_closeness.setter
    def observe_closeness(self, on: bool) -> None:
        self.meter = Watch() if on else None

    def closeness(self) -> Closeness | None:
        """Return how close attention was to full attention; None if not observed. Waits for the device."""
        return None if self.meter is None else self.meter.read()

    def measure(self, clock: Clock = WALL) -> None:
        """Time what the patch does beside what it replaces, within the next two U-Net calls that it changes.

        No U-Net call is made for that, and the outputs are those of the patch. `measured` has the result. What
        torch.compile made part of a graph can't be measured.
        """
        self.timing, self.measured = Measurement(clock), None

    # Calls of the U-Net

    @followed
    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Prepare for a call of the U-Net with these arguments; its pre-hook.

        Whoever installs the patch in another pre-hook of the U-Net calls this as well: PyTorch has listed the hooks of
        that call already. For the same reason it still calls one that was removed there, but without `kwargs`.
        """
        if kwargs is None:
            return
        if not compiling():
            self._begin(args, kwargs)
        elif self._timed or self.sized_outside or self.stays_outside:
            self._begin_outside_graph(unet, args, kwargs)
        else:
            latent = self.read_size(args, kwargs)
            self.last_call = None
            # the length of a range is a number even where that of a tensor is a symbol
            self.key = latent and f"{len(range(latent[0]))} {len(range(latent[1]))} None"

    _begin_outside_graph = not_compiled(begin_call)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            latent = self.read_size(args, kwargs)
            call = ModelCall(self, latent and Grid(*latent), self.find_timestep(args, kwargs))
            call.active = latent is not None and not self._failed(call) and (not self._timed or self._enter_part(call))
        except Exception as error:
            self.note_error(error)
            call = ModelCall(self, None, active=False)
        self.key = f"{call.latent.height} {call.latent.width} {call.part}" if call.active else None
        call.watch = self.meter and self.meter.next_call()
        outer = current_call()
        # where it has come to no image yet, it is the same call, told twice
        call.outer = outer.outer if outer is not None and outer.patch is self and not outer.plans else outer
        self.last_call = call
        CURRENT.set(call)
        for layer in self._acting:
            layer.seam.refresh()
        if compiler_loaded():
            self._set_aside()

    def call(self) -> ModelCall | None:
        """Return this patch's call that is going on in this thread."""
        call = CURRENT.get()
        if call is not None and call.patch is self:
            return call
        # the backward pass may run blocks again, in a thread of its own
        last = self.last_call
        return last if last is not None and last.trains and torch.is_grad_enabled() else None

    @followed
    def _end(self, unet: nn.Module, args: Any, output: Any) -> None:
        if not compiling():
            (self.end if output is None else self.end_call)()  # without an output, the call failed

    def end(self) -> ModelCall | None:
        """End the call that is going on and return it; None if there is none."""
        call = CURRENT.get()
        while call is not None and call.patch is not self:
            call = call.outer
        if call is not None:
            CURRENT.set(call.outer)
            call.outer = None
        return call

    def end_call(self) -> None:
        """Take stock of a call of the U-Net that has ended; its hook."""
        call, timing = self.end(), self.timing
        if call is None:
            return
        asked = {layer for layer, _ in call.answered}
        stayed = [layer for layer in self._layers if layer not in asked and layer.stayed(call)]
        with _COUNTING:
            for layer, action in call.answered:
                layer.calls[action] += 1
            for layer in stayed:
                layer.calls[UNTOUCHED] += 1
        if timing is not None and (found := timing.end_call()) is not None:
            self.timing, self.measured = None, found

    def _failed(self, call: ModelCall) -> bool:
        """Whether the first answers of this pass were not finite, so that the host makes the rest of it."""
        if not self.finite.poll():
            return False
        if self.finite.is_over(call.timestep):
            self.finite = FiniteCheck()
            return False
        self.note(NOT_FINITE)
        return True

    def _enter_part(self, call: ModelCall) -> bool:
        """Find the part of the diffusion that a call belongs to; return False if there is none."""
        progress = call.progress
        if progress is None:
            reason = f"stages and rules need timesteps from {MAX_TIMESTEP} to 0 or to be told the progress"
            self.note(reason, f"got {call.timestep}")
            return False
        call.part = self._parts[bisect_right(self._parts, progress) - 1]
        return True

    def _set_aside(self) -> None:
        """Run blocks that were compiled by themselves uncompiled, while no graph can contain what is done in them."""
        if not self.stays_outside:
            self._put_back()
            return
        for block in (layer.site.block for layer in self._acting):
            compiled = vars(block).pop("_compiled_call_impl", None)
            if compiled is not None:
                self._aside[block] = compiled
                self.say_once("compiled blocks run uncompiled while their tokens are matched or watched")

    def _put_back(self) -> None:
        for block in list(self._aside):  # another thread may put them back meanwhile
            compiled = self._aside.pop(block, None)
            if compiled is not None:
                block._compiled_call_impl = compiled

    # What is said of it

    def note(self, reason: str, detail: str = "") -> None:
        """Count a reason for leaving a call to the host, and log it the first time, with a detail of that call."""
        with _COUNTING:
            self.notes[reason] += 1
        self.say_once(reason, f"self-attention left to the host: {reason}{detail and f' ({detail})'}")

    def note_error(self, error: Exception, where: str = "a call of the model") -> None:
        """Note an error that is being handled: a bug of ours must never cost the user an image."""
        self.note(error_of_ours(error))
        log.debug("agent attention failed in %s", where, exc_info=True)

    def say_once(self, what: str, text: str = "") -> None:
        """Log `text`, or `what` without one, unless `what` was said before."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s", text or what)

    def _note_idle_rules(self) -> None:
        """Note rules that match no block of this U-Net; these are no calls."""
        places = [layer.site.place for layer in self._layers]
        for number, rule in enumerate(self.config.rules, 1):
            anywhere = replace(rule, downsample=())  # a block of unknown level may turn out to match
            if not any((anywhere if place.downsample is None else rule).names(place) for place in places):
                note = f"rule {number} names no block of this model"
                self.notes[note] = 0
                self.say_once(note)


def patch_of(unet: nn.Module) -> Patch | None:
    """Find the patch on a U-Net, which owns it through a hook: both are freed together and deep-copied together."""
    owners = (getattr(hook, "__self__", None) for hook in unet._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Patch)), None)


@contextmanager
def alone(unet: nn.Module, patch: Patch | None = None) -> Iterator[None]:
    """Have a patch, or none, on a U-Net for the length of a `with` block, in place of the one that is on it."""
    outer = patch_of(unet)
    if outer is not None:
        outer.remove()
    try:
        if patch is not None:
            patch.install()
        yield
    finally:
        if patch is not None:
            patch.remove()
        if outer is not None and patch_of(unet) is None:  # another may have come meanwhile
            outer.install()
