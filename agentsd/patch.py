"""The patch: an object that owns its hooks and the changes it made to modules, and can undo all of them."""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .closeness import Closeness, ClosenessMeter
from .config import MAX_TIMESTEP, SETTINGS, AgentConfig, Rule, SettingError, Stage, check_names
from .eager import compiling, constant, followed, keep_out, not_compiled
from .hosts import (
    Call,
    Site,
    UnsupportedModelError,
    find_sites,
    find_timestep,
    find_unet,
    read_size,
    read_timestep,
    read_tokens,
)
from .merging import Clusters, Matching, Partition, match, partition, partition_seed
from .methods import UNTOUCHED, LayerPlan, Method, SelfAttention, method_of
from .plan import grid_of, may_match, merged_tokens, plan_block

if TYPE_CHECKING:
    from .tuning.data import Tuning

log = logging.getLogger("agentsd")

Model = TypeVar("Model")
KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerReport:
    """What the patch has done to one block so far.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens in the last call; None before the first.
        plan: the block's plan in the last call; None before the first, or where full attention stayed.
        calls: number of self-attention calls by action: "agents", "merge", "pool", "corrected" … or "untouched". What
            torch.compile made part of a graph is not counted.
    """

    name: str
    size: tuple[int, int] | None
    plan: LayerPlan | None
    calls: dict[str, int]


class _Moment:
    """State of one U-Net call.

    Attributes:
        latent: (height, width) of the latent; None before the first call.
        part: progress at which the current part of the diffusion begins; no setting changes within a part.
        active: whether anything may be patched in this call.
        key: what plans depend on beside the block: latent and part, as text, since torch.compile takes a number that
            changes for a dynamic one. None while inactive.
        partitions: the partitions drawn so far.
    """

    def __init__(self, latent: tuple[int, int] | None = None, t: Any = None) -> None:
        self.latent, self._t = latent, t
        self.part: float | None = None
        self.active = False
        self.key: str | None = None
        self.partitions: dict[Any, Partition] = {}

    @cached_property
    def timestep(self) -> float | None:
        """Timestep of the U-Net call; read on demand only, since that waits for the device."""
        t, self._t = self._t, None
        return read_timestep(t)

    @property
    def progress(self) -> float | None:
        """The fraction of the diffusion that is done."""
        # a quotient of whole numbers equals the float that `until` holds; 1 − t / 1000 may not
        return None if self.timestep is None else (MAX_TIMESTEP - self.timestep) / MAX_TIMESTEP


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
        moment: an object shared by all blocks of one U-Net call.
    """

    name: str
    size: tuple[int, int]
    plan: LayerPlan
    matching: Matching | None
    latent: tuple[int, int]
    timestep: float | None
    moment: object


def _still_holds(earlier: _Moment, now: _Moment, config: AgentConfig) -> bool:
    """Whether clusters of an earlier moment may be reused now.

    The timestep must have fallen since: at the same one the call may be the other half of cond and uncond, or the start
    of another image.
    """
    if earlier is now:
        return config.share_match
    if not config.reuse_match or earlier.timestep is None or now.timestep is None:
        return False
    return 0 < (earlier.timestep - now.timestep) / MAX_TIMESTEP < config.reuse_match


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
        self.moment = _Moment()
        self.meter: ClosenessMeter | None = None
        self._kept: dict[Any, tuple[_Moment, Matching]] = {}
        self._unet = weakref.ref(unet)
        self._timed, self._reuses, self._matches = config.timed, config.ever("reuse_match"), may_match(config)
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
        old = _patch_on(unet)
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
        self._kept.clear()
        for layer in self._layers:
            layer.remove()

    def report(self) -> list[LayerReport]:
        """Report what was done to each block so far, in U-Net order."""
        return [layer.report() for layer in self._layers]

    def explain(
        self, height: int, width: int, progress: float | None = None, *, done: float | None = None
    ) -> list[tuple[str, LayerPlan | None]]:
        """Plan each block for a latent of `height` × `width`, without running anything.

        Args:
            height: rows of the latent (image height / 8).
            width: columns of the latent.
            progress: fraction of the diffusion done, 0–1; needed only where settings vary over the diffusion.
            done: deprecated name of `progress`.

        Returns:
            (name, plan) of each block; the plan is None where a stage or a rule means full attention, or the block's
            level in the U-Net is unknown.
        """
        progress = done if progress is None else progress
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

    def match(self, config: AgentConfig, name: str, x: Tensor, size: tuple[int, int], r: int, agent_r: int) -> Matching:
        """Return the clusters of the block `name` for its tokens x, reusing kept ones where the settings allow it."""
        partitioning = config.sx, config.sy, config.use_rand
        key = ("" if config.share_match else name, x.shape[:2], size, x.device, r, agent_r, partitioning)
        earlier, matching = self._kept.get(key, (None, None))
        if earlier is not None and _still_holds(earlier, self.moment, config):
            return matching
        matching = match(x, self.partition(config, *size, x.device), r, agent_r)
        if config.share_match or config.reuse_match:
            self._kept[key] = self.moment, matching
        return matching

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
            self._enter(_Moment(latent, find_timestep(args, kwargs)))
        elif self._watched or self._timed or self._matches:
            self._begin_outside_graph(unet, args, kwargs)
        else:
            # the length of a range is a number even where that of a tensor is a symbol
            self._enter(_Moment(latent and tuple(len(range(side)) for side in latent)))

    @not_compiled
    def _begin_outside_graph(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        self.begin_call(unet, args, kwargs)

    def _enter(self, moment: _Moment) -> None:
        """Begin a U-Net call."""
        moment.active = moment.latent is not None and (not self._timed or self._enter_part(moment))
        if moment.active:
            moment.key = f"{moment.latent[0]} {moment.latent[1]} {moment.part}"
        if not self._reuses or not moment.active:
            self._kept.clear()
        else:
            _ = moment.timestep  # read it now: a later call compares with it, and by then the tensor may have changed
        self.moment = moment
        if self.meter is not None:
            self.meter.begin_call()

    @property
    def _watched(self) -> bool:
        """Whether anything looks at the answers, which no graph contains."""
        return self.observer is not None or self.meter is not None

    @followed
    def _end(self, unet: nn.Module, args: Any, output: Any) -> None:
        if not compiling():
            for layer in self._layers:
                layer.notice()

    def _enter_part(self, moment: _Moment) -> bool:
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


class Image:
    """The module around some blocks, which sees their tokens as an image.

    Attributes:
        module: the module.
        size: (height, width) of its last input.
        moment: the U-Net call that this was in.
    """

    def __init__(self, patch: Patch, module: nn.Module) -> None:
        self.patch, self.module = patch, module
        self.size: tuple[int, int] | None = None
        self.moment: _Moment | None = None

    @followed
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.see(read_size(args, kwargs))

    def see(self, size: tuple[int, int] | None) -> None:
        """Keep the size of the tokens in this U-Net call."""
        self.size, self.moment = size, self.patch.moment


class Layer:
    """One patched block."""

    def __init__(self, patch: Patch, site: Site, image: Image) -> None:
        self.patch, self.site, self.image = patch, site, image
        self.calls: Counter[str] = Counter()
        self.forget()
        self._seam = site.seam()
        self._planned: dict[Any, tuple[AgentConfig, LayerPlan] | None] = {}

    def forget(self) -> None:
        self.config: AgentConfig | None = None
        self.plan: LayerPlan | None = None
        self.matching: Matching | None = None
        # the U-Net calls in which it was planned, and asked for self-attention
        self.planned: _Moment | None = None
        self.asked: _Moment | None = None

    def install(self) -> Iterator[Any]:
        """Install the block's hooks, yielding each handle at once, so that none is lost if a later hook fails."""
        block, config = self.site.block, self.patch.config
        self._seam = self.site.seam()
        if self.patch._matches:
            yield block.register_forward_pre_hook(self._begin_block, with_kwargs=True)
            yield block.register_forward_hook(self._end_block)
        if config.ever("merge_crossattn") and getattr(block, "attn2", None) is not None:
            yield from _MergeAround(self, "merge_crossattn").install(block.attn2)
        if config.ever("merge_mlp"):
            yield from _MergeAround(self, "merge_mlp").install(block.ff)
        if config.ever("merge_attn"):
            self._seam.install(self._attention, self._wants)

    def remove(self) -> None:
        self._seam.remove()
        self.forget()

    def report(self) -> LayerReport:
        """Report what was done in the last U-Net call."""
        size = self.image.size if self.image.moment is self.patch.moment else None
        if self.planned is not self.patch.moment:
            self._make_plan()
        return LayerReport(self.site.name, size, self.plan, dict(self.calls))

    def notice(self) -> None:
        """Note, at the end of a U-Net call, if this block's self-attention did not come by."""
        moment = self.patch.moment
        if self.asked is moment or self.image.moment is not moment or not moment.active:
            return
        self._make_plan()
        if self.plan is not None and self.plan.acts:
            self.patch.note(self.site.obstacle or "something else answers self-attention in its place")

    def _make_plan(self) -> None:
        """Plan the block for the U-Net call that is going on."""
        self.planned = moment = self.patch.moment
        size = self.image.size if self.image.moment is moment else None
        settings_and_plan = self._plan(moment, size) if moment.active and size is not None else None
        self.config, self.plan = (None, None) if settings_and_plan is None else settings_and_plan

    def _plan(self, moment: _Moment, size: tuple[int, int]) -> tuple[AgentConfig, LayerPlan] | None:
        key = (moment.part, moment.latent, size)
        if key not in self._planned:
            self._planned[key] = plan_block(self.patch.config, self.site.place, moment.latent, moment.part, size)
        return self._planned[key]

    # Hooks on the block, where it may need clusters of its tokens

    @not_compiled
    def _begin_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.match(read_tokens(args, kwargs))

    def match(self, x: Any) -> None:
        """Match the block's tokens x (B, N, C), where its plan needs clusters."""
        self.matching = None
        self._make_plan()
        if self.plan is None:
            return
        r, agent_r = merged_tokens(self.config, self.plan), self.plan.agent_r
        if not r and not agent_r:
            return
        size = self.image.size
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != self.plan.tokens:
            self.patch.note(f"a block got tokens that do not form a {size[1]}×{size[0]} grid")
            return
        self.matching = self._safely(
            lambda: self.patch.match(self.config, self.site.name, x, size, r, agent_r), lambda: None
        )

    @not_compiled
    def _end_block(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # gradient checkpointing may run the inside of the block again
            self.matching = None

    # Self-attention

    @followed
    def _wants(self) -> bool:
        """Whether a call of self-attention is to be looked at: it isn't where the block is left alone."""
        if compiling():
            return self.patch.moment.key is not None and self._wants_in_graph()
        moment = self.patch.moment
        self.asked = moment
        if self.planned is not moment:
            self._make_plan()
        if self.plan is not None and self.plan.acts:
            return True
        self.calls[UNTOUCHED] += 1
        return False

    def _wants_in_graph(self) -> bool:
        foreseen = getattr(self, _foresee(self, self.patch.moment.key))
        return foreseen.acts or foreseen.size != self.image.size

    @followed
    def _attention(self, call: Call) -> Tensor:
        return self._attend_in_graph(call) if compiling() else self._attend_or_proceed(call)

    def _attend_or_proceed(self, call: Call) -> Tensor:
        reason = self._veto(call, self.plan) or self._unmatched(call)
        if reason:
            self.patch.note(reason)
            self.calls[UNTOUCHED] += 1
            return call.proceed()
        self.calls[self.plan.action] += 1
        return self._safely(lambda: self._attend(call), call.proceed)

    def _attend_in_graph(self, call: Call) -> Tensor:
        """The same while the compiler traces; it has to break its graph where something else than usual happens."""
        foreseen = getattr(self, _foresee(self, self.patch.moment.key))
        plain = foreseen.method and foreseen.size == self.image.size and not self.patch._watched
        if not plain or self._veto(call, foreseen.plan):
            return self._attend_outside_graph(call)
        try:
            return foreseen.method.attend(self._for_method(call, foreseen.config, foreseen.plan, foreseen.size))
        except Exception:  # again, where it is noted
            return self._attend_outside_graph(call)

    @not_compiled
    def _attend_outside_graph(self, call: Call) -> Tensor:
        return self._attend_or_proceed(call) if self._wants() else call.proceed()

    def _veto(self, call: Call, plan: LayerPlan) -> str:
        """Return why this call is left to the host; empty if it isn't."""
        if self.site.obstacle:
            return self.site.obstacle
        if call.mask is not None:
            return "self-attention was given a mask"
        if call.extras:
            return f"self-attention was given {', '.join(sorted(call.extras))}"
        if call.context is not None and call.context is not call.x:
            return "self-attention was given a context of its own"
        if call.x.dim() != 3 or call.x.shape[1] != plan.tokens:
            return f"self-attention got {tuple(call.x.shape)} where the layer has {plan.tokens} tokens"
        return ""

    def _unmatched(self, call: Call) -> str:
        """Return why the clusters that there are don't fit this call; empty if they do, or none are needed."""
        if _matched(self.plan) and (self.matching is None or self.matching.shape != tuple(call.x.shape[:2])):
            return f"self-attention got {tuple(call.x.shape)}, which is not what the block was given"
        return ""

    def _safely(self, action: Callable[[], Any], fallback: Callable[[], Any]) -> Any:
        """Return what `action` returns, or `fallback` if it fails. A bug of ours must never cost the user an image."""
        try:
            return action()
        except Exception as error:  # whatever went wrong, the host's own attention can still make the image
            self.patch.note(f"an error of ours: {type(error).__name__}: {error}")
            log.debug("agent attention failed in %s", self.site.name, exc_info=True)
            return fallback()

    def _attend(self, call: Call) -> Tensor:
        matching = self.matching if _matched(self.plan) else None
        attention = self._for_method(call, self.config, self.plan, self.image.size, matching)
        method, meter = method_of(self.plan.action), self.patch.meter
        if meter is not None and meter.watching:
            answer = meter.attend(self.site.name, method, attention)
        else:
            answer = method.attend(attention)
        if self.patch.observer is not None:
            self._safely(self._notify_observer, lambda: None)
        return answer

    def _for_method(
        self,
        call: Call,
        config: AgentConfig,
        plan: LayerPlan,
        size: tuple[int, int],
        matching: Matching | None = None,
    ) -> SelfAttention:
        attn = self.site.block.attn1
        return SelfAttention(
            x=call.x,
            plan=plan,
            settings=config,
            size=size,
            heads=self.site.heads,
            matching=matching,
            wrapped=self.site.wrapped(),
            project=partial(_projected, attn, self.patch.kv_context),
            project_q=attn.to_q,
            project_out=self._seam.project_out,
            proceed=call.proceed,
        )

    def _notify_observer(self) -> None:
        """Pass the answer just given to the patch's observer."""
        moment, matching = self.patch.moment, self.matching if _matched(self.plan) else None
        answer = Answer(self.site.name, self.image.size, self.plan, matching, moment.latent, moment.timestep, moment)
        self.patch.observer(answer)


class _Foreseen(NamedTuple):
    """What will be done in a block, as far as that is known before anything has run.

    Attributes:
        acts: whether its self-attention is changed.
        size: (height, width) of its tokens, by its level; None if that is unknown.
        method: what computes it; None where it works on clusters, which no graph contains.
        config: the settings in force.
        plan: the plan.
    """

    acts: bool
    size: tuple[int, int] | None = None
    method: Method | None = None
    config: AgentConfig | None = None
    plan: LayerPlan | None = None


@constant
def _foresee(layer: Layer, key: str) -> str:
    """Foresee what is done in a block, and return the name of the attribute that holds it; `key` as in `_Moment`."""
    name = f"foreseen {key}".replace(".", "_")  # a dot would be a path to the compiler
    if name not in vars(layer):
        setattr(layer, name, _foreseen(layer, key))
    return name


def _foreseen(layer: Layer, key: str) -> _Foreseen:
    height, width, part = key.split()
    latent, progress = (int(height), int(width)), None if part == "None" else float(part)
    level = layer.site.downsample
    settings_and_plan = plan_block(layer.patch.config, layer.site.place, latent, progress)
    size = None if level is None else grid_of(latent, level)
    if settings_and_plan is None or not settings_and_plan[1].acts:
        return _Foreseen(False, size)
    config, plan = settings_and_plan
    return _Foreseen(True, size, None if _matched(plan) else method_of(plan.action), config, plan)


def _matched(plan: LayerPlan) -> bool:
    """Whether self-attention works on clusters."""
    return method_of(plan.action).merges and bool(plan.r or plan.agent_r)


def _projected(attn: nn.Module, kv_context: KVContext | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens x to queries, keys and values."""
    context_k, context_v = (x, x) if kv_context is None else kv_context(attn, x)
    return attn.to_q(x), attn.to_k(context_k), attn.to_v(context_v)


class _MergeAround:
    """Hooks that merge tokens before cross-attention or the feed-forward layer, and unmerge them after it."""

    def __init__(self, layer: Layer, switch: str) -> None:
        self.layer, self.switch = layer, switch
        self.pending: Clusters | None = None

    def install(self, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(self._before, with_kwargs=True)
        yield module.register_forward_hook(self._after)

    @not_compiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.pending = self._clusters(args[0]) if args else None
        return None if self.pending is None else ((self.pending.merge(args[0]), *args[1:]), kwargs)

    @not_compiled
    def _after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        clusters, self.pending = self.pending, None
        return None if clusters is None else clusters.unmerge(output)

    def _clusters(self, x: Any) -> Clusters | None:
        config, matching = self.layer.config, self.layer.matching
        if config is None or not getattr(config, self.switch) or matching is None or not isinstance(x, Tensor):
            return None
        return matching.merged if x.dim() == 3 and x.shape[:2] == matching.shape else None


_DEFAULTS = AgentConfig()


def apply_patch(
    model: Model,
    ratio: float = _DEFAULTS.ratio,
    max_downsample: int | str = _DEFAULTS.max_downsample,
    sx: int = _DEFAULTS.sx,
    sy: int = _DEFAULTS.sy,
    agent_ratio: float = _DEFAULTS.agent_ratio,
    k_scale2: float = _DEFAULTS.k_scale2,
    k_shortcut: float = _DEFAULTS.k_shortcut,
    attn_precision: str | None = _DEFAULTS.attn_precision,
    use_rand: bool = _DEFAULTS.use_rand,
    merge_attn: bool = _DEFAULTS.merge_attn,
    merge_crossattn: bool = _DEFAULTS.merge_crossattn,
    merge_mlp: bool = _DEFAULTS.merge_mlp,
    *,
    agent_source: str = _DEFAULTS.agent_source,
    method: str = _DEFAULTS.method,
    min_tokens: int = _DEFAULTS.min_tokens,
    max_agents: int | None = _DEFAULTS.max_agents,
    seed: int = _DEFAULTS.seed,
    share_match: bool = _DEFAULTS.share_match,
    reuse_match: float = _DEFAULTS.reuse_match,
    landmarks: str = _DEFAULTS.landmarks,
    stages: Sequence[Stage] = _DEFAULTS.stages,
    rules: Sequence[Rule] = _DEFAULTS.rules,
    tuning: Tuning | None = None,
    **unknown: Any,
) -> Model:
    """Apply agent attention to a Stable Diffusion model, in place, replacing an existing patch.

    Args:
        model: an LDM or sgm model (with `.model.diffusion_model`), a diffusers pipeline, or a U-Net.
        tuning: a result of `agentsd.tune` for this model. It has settings of its own, beside which none may be given.
        **: the settings of `AgentConfig`, which documents their meanings and ranges.

    Returns:
        The model.

    Raises:
        SettingError: a setting is unknown or outside its range. The model is unchanged.
        TuningError: the tuning is for another model. The model is unchanged.
        UnsupportedModelError: the model has no transformer blocks. The model is unchanged.
    """
    settings = {k: v for k, v in locals().items() if k in SETTINGS}
    check_names(unknown, SETTINGS)
    unet, config = find_unet(model), AgentConfig(**settings)
    if tuning is not None:
        given = [name for name in SETTINGS if getattr(config, name) != getattr(_DEFAULTS, name)]
        if given:
            raise SettingError(f"a tuning has settings of its own, got {', '.join(given)} as well")
        config = tuning.config_for(unet)
    patch_unet(unet, config)
    return model


def patch_unet(unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None) -> Patch:
    """Patch a U-Net with a config, replacing an existing patch; see `Patch` for the arguments."""
    patch = Patch(unet, config, kv_context)  # may raise, before anything has been changed
    patch.install()
    return patch


def _patch_on(unet: nn.Module) -> Patch | None:
    """Find the patch on a U-Net, which owns it through a hook: both are freed together and deep-copied together."""
    owners = (getattr(hook, "__self__", None) for hook in unet._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Patch)), None)


def get_patch(model: Any) -> Patch | None:
    """Return the patch on the model, if any."""
    try:
        return _patch_on(find_unet(model))
    except UnsupportedModelError:
        return None


def remove_patch(model: Model) -> Model:
    """Remove the patch from the model, if there is one, and return the model."""
    patch = get_patch(model)
    if patch is not None:
        patch.remove()
    return model


@contextmanager
def patched(model: Model, *args: Any, **settings: Any) -> Iterator[Model]:
    """Patch the model for the length of a `with` block; takes the arguments of `apply_patch`.

    An earlier patch on the model is restored afterwards.
    """
    outer = get_patch(model)
    apply_patch(model, *args, **settings)
    inner = get_patch(model)
    try:
        yield model
    finally:
        if inner is not None:
            inner.remove()
        if outer is not None and get_patch(model) is None:  # another patch may have replaced the inner one meanwhile
            outer.install()
