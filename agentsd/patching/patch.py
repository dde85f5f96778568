"""The patch: an object that owns its hooks and the changes it made to modules, and can undo all of them."""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.merging import Matching, Partition, match, partition, partition_seed
from ..clock import WALL, Clock
from ..config import AgentConfig
from ..eager import compiling, followed, keep_out, not_compiled
from ..hosts import Site, UnsupportedModelError, find_sites, find_timestep, read_size
from ..methods import LayerPlan
from ..plan import may_match, plan_block
from ..schedule import MAX_TIMESTEP
from .closeness import Closeness, ClosenessMeter
from .layer import Answer, Image, KVContext, Layer, LayerReport, Moment
from .measure import Measured, Measurement

log = logging.getLogger("agentsd")


class Patch:
    """Agent attention on one U-Net. Created by `apply_patch`; `remove` undoes it.

    Args:
        unet: the U-Net (LDM, sgm, Forge or diffusers).
        config: the settings.
        kv_context: maps the attention module and its input (B, N, C) to the inputs of the key and value projections,
            for a host's hypernetworks, say. None: the input itself.

    Attributes:
        config: the settings.
        notes: reasons for leaving self-attention to the host, each with its number of calls.
        observer: called with an `Answer` after every patched attention; None (the default) costs nothing. It must not
            keep a tensor of the answer.

    Raises:
        UnsupportedModelError: the U-Net has no transformer blocks to patch.
    """

    def __init__(self, unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None) -> None:
        self.config = config
        self.kv_context = kv_context
        self.notes: Counter[str] = Counter()
        self.observer: Callable[[Answer], None] | None = None
        self.moment = Moment()
        self.meter: ClosenessMeter | None = None
        self.timing: Measurement | None = None
        self._measurement: Measurement | None = None
        self._unet = weakref.ref(unet)
        self._timed, self._matches = config.timed, may_match(config)
        sites = find_sites(unet)
        images = {id(site.parent): Image(self, site.parent) for site in sites}
        self._images = list(images.values())
        self._layers = [self._layer(site, images[id(site.parent)]) for site in sites]
        self._handles: list[Any] = []
        if not self._layers:
            raise UnsupportedModelError(f"{type(unet).__name__} has no transformer blocks to patch")
        self._note_idle_rules()

    def _layer(self, site: Site, image: Image) -> Layer:
        return Layer(self, site, image)

    @property
    def active(self) -> bool:
        """Whether the patch is installed."""
        return bool(self._handles)

    def install(self) -> None:
        """Install hooks and replace self-attention, all or nothing. An existing patch is removed first."""
        unet = self._unet()
        if unet is None or self.active:
            return
        old = patch_of(unet)
        if old is not None:
            old.remove()
        keep_out()
        try:
            # a hook of the whole U-Net is outside of its graph, unless its call and not its `forward` is compiled
            begin = self._begin_outside_graph if self._timed or self._matches else self.begin_call
            self._handles.append(unet.register_forward_pre_hook(begin, with_kwargs=True))
            for image in self._images:
                self._handles.append(image.module.register_forward_pre_hook(image.look, with_kwargs=True))
            for layer in self._layers:
                self._handles += layer.install()
            self._handles.append(unet.register_forward_hook(self._end))
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

    def report(self) -> list[LayerReport]:
        """Report what was done to each block so far, in U-Net order."""
        return [layer.report() for layer in self._layers]

    def explain(self, height: int, width: int, progress: float | None = None) -> list[tuple[str, LayerPlan | None]]:
        """Plan each block for a latent of `height` × `width`, without running anything.

        Args:
            height: rows of the latent (image height / 8).
            width: columns of the latent.
            progress: fraction of the diffusion done, 0–1; needed only where settings vary over the diffusion.

        Returns:
            (name, plan) of each block; the plan is None where a stage or a rule means full attention, or the block's
            level in the U-Net is unknown. Where a tuning is used at another size than its own, `plan.note` says so, and
            `plan.reason` where that is not sound.
        """
        plans = [plan_block(self.config, layer.site.place, (height, width), progress) for layer in self._layers]
        return [
            (layer.site.name, None if settings_and_plan is None else settings_and_plan[1])
            for layer, settings_and_plan in zip(self._layers, plans, strict=True)
        ]

    @property
    def observe_closeness(self) -> bool:
        """Whether one of every few U-Net calls compares a few tokens of each patched block with full attention.

        Off by default. No pixel depends on it. Setting it starts the measurement anew.
        """
        return self.meter is not None

    @observe_closeness.setter
    def observe_closeness(self, on: bool) -> None:
        self.meter = ClosenessMeter() if on else None

    def closeness(self) -> Closeness | None:
        """Return how close attention was to full attention; None if not observed. Waits for the device."""
        return None if self.meter is None else self.meter.read()

    def measure(self, clock: Clock = WALL) -> None:
        """Time what the patch does beside what it replaces, within the next two U-Net calls that it changes.

        No U-Net call is made for that, and the outputs are those of the patch. `measured` has the result. What
        torch.compile made part of a graph can't be measured.
        """
        self.timing = self._measurement = Measurement(clock)

    @property
    def measured(self) -> Measured | None:
        """What `measure` found; None before two U-Net calls have been changed."""
        return None if self._measurement is None else self._measurement.measured

    def note(self, reason: str) -> None:
        """Count a reason for leaving a call to the host, and log it the first time."""
        if reason not in self.notes:
            log.info("self-attention left to the host: %s", reason)
        self.notes[reason] += 1

    def partition(self, config: AgentConfig, height: int, width: int, device: torch.device) -> Partition:
        """Return the partition of a height × width grid at the current timestep, on `device`."""
        key = (config.use_rand, height, width, config.sx, config.sy, device)
        if key not in self.moment.partitions:
            seed = None
            if config.use_rand:
                seed = partition_seed(config.seed, self.moment.timestep, height, width, config.sx, config.sy)
            self.moment.partitions[key] = partition(height, width, config.sx, config.sy, seed).to(device)
        return self.moment.partitions[key]

    def match(self, config: AgentConfig, x: Tensor, size: tuple[int, int], r: int, agent_r: int) -> Matching:
        """Return the clusters of a block's tokens x."""
        return match(x, self.partition(config, *size, x.device), r, agent_r)

    @followed
    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Prepare for a call of the U-Net with these arguments; its pre-hook.

        Whoever installs the patch in another pre-hook of the U-Net calls this as well: PyTorch has listed the hooks of
        that call already. For the same reason it still calls one that was removed there, but without `kwargs`.
        """
        if kwargs is None:
            return
        latent = read_size(args, kwargs)
        if not compiling():
            self._enter(Moment(latent, find_timestep(args, kwargs)))
        elif self._watched or self._timed or self._matches:
            self._begin_outside_graph(unet, args, kwargs)
        else:
            # the length of a range is a number even where that of a tensor is a symbol
            self._enter(Moment(latent and tuple(len(range(side)) for side in latent)))

    @not_compiled
    def _begin_outside_graph(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        self.begin_call(unet, args, kwargs)

    def _enter(self, moment: Moment) -> None:
        """Begin a U-Net call."""
        moment.active = moment.latent is not None and (not self._timed or self._enter_part(moment))
        if moment.active:
            moment.key = f"{moment.latent[0]} {moment.latent[1]} {moment.part}"
        self.moment = moment
        if self.meter is not None:
            self.meter.begin_call()

    @property
    def _watched(self) -> bool:
        """Whether anything looks at the answers, which no graph contains."""
        return self.observer is not None or self.meter is not None or self.timing is not None

    @followed
    def _end(self, unet: nn.Module, args: Any, output: Any) -> None:
        if not compiling():
            for layer in self._layers:
                layer.notice()
            if self.timing is not None:
                self.timing.end_call()
                if self.timing.measured is not None:
                    self.timing = None

    def _enter_part(self, moment: Moment) -> bool:
        """Find the part of the diffusion that a call belongs to; return False if there is none."""
        progress = moment.progress
        if progress is None or not 0.0 <= progress <= 1.0:
            t = moment.timestep
            self.note(f"the U-Net was given timestep {t}, and stages and rules need one from 0 to {MAX_TIMESTEP}")
            return False
        moment.part = self._parts[bisect_right(self._parts, progress) - 1]
        return True

    @cached_property
    def _parts(self) -> list[float]:
        return [since for since, _ in self.config.parts()]

    def _note_idle_rules(self) -> None:
        """Note rules that match no block of this U-Net."""
        places = [layer.site.place for layer in self._layers]
        for number, rule in enumerate(self.config.rules, 1):
            anywhere = replace(rule, downsample=())  # a block of unknown level may turn out to match
            if not any((anywhere if place.downsample is None else rule).names(place) for place in places):
                self.note(f"rule {number} names no block of this model")


def patch_of(unet: nn.Module) -> Patch | None:
    """Find the patch on a U-Net, which owns it through a hook: both are freed together and deep-copied together."""
    owners = (getattr(hook, "__self__", None) for hook in unet._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Patch)), None)
