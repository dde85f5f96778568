"""The patch: an object that owns its hooks and the modules it changed, and can take all of it back."""

from __future__ import annotations

import logging
import math
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .config import MAX_TIMESTEP, SETTINGS, AgentConfig, Rule, Stage, check_names
from .eager import not_compiled
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
from .methods import UNTOUCHED, LayerPlan, SelfAttention, method_of
from .plan import merged_tokens, plan_block

log = logging.getLogger("agentsd")

Model = TypeVar("Model")
KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerReport:
    """What the patch has done to one block.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens in the last call; None before the first.
        plan: what was to be done there in the last call; None before the first or where full attention was left.
        calls: number of self-attention calls by what was done: "agents", "merge", "pool", "corrected" … or
            "untouched".
    """

    name: str
    size: tuple[int, int] | None
    plan: LayerPlan | None
    calls: dict[str, int]


class _Moment:
    """What holds during one call of the U-Net.

    Attributes:
        latent: (height, width) of the latent; None before the first call.
        part: the progress at which the current part of the diffusion begins: within one, no setting changes.
        active: whether anything may be changed in this call.
        partitions: the partitions drawn so far.
    """

    def __init__(self, latent: tuple[int, int] | None = None, t: Any = None) -> None:
        self.latent, self._t = latent, t
        self.part: float | None = None
        self.active = False
        self.partitions: dict[Any, Partition] = {}

    @cached_property
    def timestep(self) -> float | None:
        """That of the U-Net's call; read only if somebody asks, since a device is waited for."""
        t, self._t = self._t, None
        return read_timestep(t)

    @property
    def progress(self) -> float | None:
        """The fraction of the diffusion that is done."""
        # the quotient of whole numbers, which is the very float of `until`; 1 − t / 1000 is not
        return None if self.timestep is None else (MAX_TIMESTEP - self.timestep) / MAX_TIMESTEP


@dataclass(frozen=True)
class Answer:
    """A self-attention call that the patch has answered, for `Patch.observer`.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens.
        plan: what was done.
        matching: the clusters that were used; None where there were none.
        latent: (height, width) of the latent.
        timestep: that of the U-Net's call; None where it gave none.
        moment: the same object for all blocks of one call of the U-Net.
    """

    name: str
    size: tuple[int, int]
    plan: LayerPlan
    matching: Matching | None
    latent: tuple[int, int]
    timestep: float | None
    moment: object


def _still_holds(made: _Moment, now: _Moment, config: AgentConfig) -> bool:
    """Whether clusters made then may be used now.

    A later call must be at a smaller timestep: at the same one it may be the other half of cond and uncond, or the
    beginning of another image.
    """
    if made is now:
        return config.share_match
    if not config.reuse_match or made.timestep is None or now.timestep is None:
        return False
    return 0 < (made.timestep - now.timestep) / MAX_TIMESTEP < config.reuse_match


class Patch:
    """Agent attention on one U-Net. Made by `apply_patch`; `remove` takes it back.

    Args:
        unet: the U-Net (LDM, sgm, Forge or diffusers).
        config: the settings.
        kv_context: what keys and values are computed from, given the attention module and its input (B, N, C): a
            host's hypernetworks, say. None: the input itself.

    Attributes:
        config: the settings.
        notes: each reason for which a layer was left to the host, with the number of its calls.
        observer: called after every patched attention; None (the default) costs nothing. It must keep no tensor of
            an answer.

    Raises:
        UnsupportedModelError: the U-Net has no block that could be patched.
    """

    def __init__(self, unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None) -> None:
        self.config = config
        self.kv_context = kv_context
        self.notes: Counter[str] = Counter()
        self.observer: Callable[[Answer], None] | None = None
        self.moment = _Moment()
        self._kept: dict[Any, tuple[_Moment, Matching]] = {}
        self._unet = weakref.ref(unet)
        self._layers = [_Layer(self, site) for site in find_sites(unet)]
        self._handles: list[Any] = []
        if not self._layers:
            raise UnsupportedModelError(f"{type(unet).__name__} has no transformer blocks to patch")

    @property
    def active(self) -> bool:
        """Whether the patch is installed."""
        return bool(self._handles)

    def install(self) -> None:
        """Install hooks and replace the self-attentions, all or nothing. A patch that is there already is removed."""
        unet = self._unet()
        if unet is None or self.active:
            return
        old = _patch_on(unet)
        if old is not None:
            old.remove()
        try:
            self._handles.append(unet.register_forward_pre_hook(self._begin, with_kwargs=True))
            for layer in self._layers:
                self._handles += layer.install()
        except BaseException:
            self.remove()
            raise
        self._note_idle_rules()

    def remove(self) -> None:
        """Take everything back. Doing it again changes nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()
        for layer in self._layers:
            layer.remove()

    def report(self) -> list[LayerReport]:
        """What was done to each block so far, in the order of the U-Net."""
        return [LayerReport(s.site.name, s.size, s.plan, dict(s.calls)) for s in self._layers]

    def explain(
        self, height: int, width: int, progress: float | None = None, *, done: float | None = None
    ) -> list[tuple[str, LayerPlan | None]]:
        """What will be done to each block for a latent of `height` × `width`, without running anything.

        Args:
            height: rows of the latent (image height / 8).
            width: columns of the latent.
            progress: fraction of the diffusion done, 0–1; needed only where settings differ over the diffusion.
            done: the same, by its older name.

        Returns:
            (name of the block, its plan) for each block; the plan is None where a stage or a rule leaves full
            attention, or the block's place in the U-Net is unknown.
        """
        progress = done if progress is None else progress
        plans = [plan_block(self.config, layer.site.place, (height, width), progress) for layer in self._layers]
        return [
            (layer.site.name, None if found is None else found[1])
            for layer, found in zip(self._layers, plans, strict=True)
        ]

    def note(self, reason: str) -> None:
        """Remember why a call was left to the host, and log it the first time."""
        if reason not in self.notes:
            log.info("agent attention stands down: %s", reason)
        self.notes[reason] += 1

    def partition(self, config: AgentConfig, height: int, width: int, device: torch.device) -> Partition:
        """The partition of a height × width grid at this moment's timestep, on `device`."""
        key = (config.use_rand, height, width, config.sx, config.sy, device)
        if key not in self.moment.partitions:
            seed = None
            if config.use_rand:
                seed = partition_seed(config.seed, self.moment.timestep, height, width, config.sx, config.sy)
            self.moment.partitions[key] = partition(height, width, config.sx, config.sy, seed).to(device)
        return self.moment.partitions[key]

    def match(self, config: AgentConfig, name: str, x: Tensor, size: tuple[int, int], r: int, agent_r: int) -> Matching:
        """The clusters of the block `name` for its tokens x; those that are kept, where the settings allow it."""
        key = ("" if config.share_match else name, x.shape[:2], size, x.device, r, agent_r, config.sx, config.sy)
        made, matching = self._kept.get(key, (None, None))
        if made is not None and _still_holds(made, self.moment, config):
            return matching
        matching = match(x, self.partition(config, *size, x.device), r, agent_r)
        if config.share_match or config.reuse_match:
            self._kept[key] = self.moment, matching
        return matching

    @not_compiled
    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config, moment = self.config, _Moment(read_size(args, kwargs), find_timestep(args, kwargs))
        moment.active = moment.latent is not None and (not config.timed or self._enter_part(moment))
        reuses = config.ever("reuse_match")
        if reuses and moment.active:
            _ = moment.timestep  # read now: a later call compares with it, when the tensor may hold another
        else:
            self._kept.clear()
        self.moment = moment
        for layer in self._layers:
            layer.forget()

    def _enter_part(self, moment: _Moment) -> bool:
        """Find the part of the diffusion that a call belongs to; False where it belongs to none."""
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
        """Say which rules name no block of this U-Net."""
        places = [layer.site.place for layer in self._layers]
        for number, rule in enumerate(self.config.rules, 1):
            if not any(rule.names(place) for place in places):
                self.note(f"rule {number} names no block of this model")


class _Layer:
    """One block under the patch."""

    def __init__(self, patch: Patch, site: Site) -> None:
        self.patch = patch
        self.site = site
        self.calls: Counter[str] = Counter()
        self.forget()
        self._seam = site.seam()
        self._planned: dict[Any, tuple[AgentConfig, LayerPlan] | None] = {}

    def forget(self) -> None:
        self.size: tuple[int, int] | None = None
        self._begin_block()

    def _begin_block(self) -> None:
        self.config: AgentConfig | None = None
        self.plan: LayerPlan | None = None
        self.matching: Matching | None = None
        self.attention_called = False

    def install(self) -> Iterator[Any]:
        """Install this block's hooks; yields their handles one by one, so that none is lost if a later one fails."""
        block, config = self.site.block, self.patch.config
        self._seam = self.site.seam()
        yield self.site.parent.register_forward_pre_hook(self._see_image, with_kwargs=True)
        yield block.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        yield block.register_forward_hook(self._drop_matching)
        if config.ever("merge_crossattn") and getattr(block, "attn2", None) is not None:
            yield from _MergeAround(self, "merge_crossattn").install(block.attn2)
        if config.ever("merge_mlp"):
            yield from _MergeAround(self, "merge_mlp").install(block.ff)
        if config.ever("merge_attn"):
            self._seam.install(self._attention)

    def remove(self) -> None:
        self._seam.remove()
        self.forget()

    # Hooks, in the order in which a block meets them

    @not_compiled
    def _see_image(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = read_size(args, kwargs)

    @not_compiled
    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin_block()
        moment = self.patch.moment
        if not moment.active or self.size is None:
            return
        x = read_tokens(args, kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != math.prod(self.size):
            self.patch.note(f"a block got tokens that are no {self.size[0]} × {self.size[1]} grid")
            return
        found = self._plan(moment)
        if found is None:
            return
        self.config, self.plan = found
        r, agent_r = merged_tokens(*found), self.plan.agent_r
        if r or agent_r:
            self.matching = self._safely(
                lambda: self.patch.match(self.config, self.site.name, x, self.size, r, agent_r), lambda: None
            )

    def _plan(self, moment: _Moment) -> tuple[AgentConfig, LayerPlan] | None:
        key = (moment.part, moment.latent, self.size)
        if key not in self._planned:
            self._planned[key] = plan_block(self.patch.config, self.site.place, moment.latent, moment.part, self.size)
        return self._planned[key]

    @not_compiled
    def _drop_matching(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # gradient checkpointing may compute the inside of the block once more
            self.matching = None
        if self.plan is not None and self.plan.acts and not self.attention_called:
            self.patch.note(self.site.obstacle or "something else answers self-attention in its place")

    # Self-attention

    @not_compiled
    def _attention(self, call: Call) -> Tensor:
        self.attention_called = True
        reason = self._why_not(call)
        if reason is not None:
            if reason:
                self.patch.note(reason)
            self.calls[UNTOUCHED] += 1
            return call.proceed()
        self.calls[self.plan.action] += 1
        return self._safely(lambda: self._attend(call), call.proceed)

    def _why_not(self, call: Call) -> str | None:
        """Why this call is the host's: a reason worth telling, "" where it was meant to be, None if it is ours."""
        if self.plan is None or not self.plan.acts:
            return ""
        if self.site.obstacle:
            return self.site.obstacle
        if call.mask is not None:
            return "self-attention was given a mask"
        if call.extras:
            return f"self-attention was given {', '.join(sorted(call.extras))}"
        if call.context is not None and call.context is not call.x:
            return "self-attention was given a context of its own"
        if call.x.dim() != 3 or call.x.shape[1] != self.plan.tokens:
            return f"self-attention got {tuple(call.x.shape)} where the layer has {self.plan.tokens} tokens"
        if self._matched() and (self.matching is None or self.matching.shape != tuple(call.x.shape[:2])):
            return f"self-attention got {tuple(call.x.shape)}, which is not what the block was given"
        return None

    def _matched(self) -> bool:
        """Whether self-attention itself works on clusters."""
        return method_of(self.plan.action).merges and bool(self.plan.r or self.plan.agent_r)

    def _safely(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """Our answer; if it fails, the host's. A bug of ours must never cost the user an image."""
        try:
            return ours()
        except Exception as error:  # whatever it was, the host's own attention can still make the image
            self.patch.note(f"an error of ours: {type(error).__name__}: {error}")
            log.debug("agent attention failed in %s", self.site.name, exc_info=True)
            return theirs()

    def _attend(self, call: Call) -> Tensor:
        answer = method_of(self.plan.action).attend(self._as_method_sees(call))
        if self.patch.observer is not None:
            self._safely(self._tell, lambda: None)
        return answer

    def _as_method_sees(self, call: Call) -> SelfAttention:
        attn = self.site.block.attn1
        return SelfAttention(
            x=call.x,
            plan=self.plan,
            settings=self.config,
            size=self.size,
            heads=self.site.heads,
            matching=self.matching if self._matched() else None,
            wrapped=self.site.wrapped(),
            project=partial(_projected, attn, self.patch.kv_context),
            project_q=attn.to_q,
            project_out=self._seam.project_out,
            proceed=call.proceed,
        )

    def _tell(self) -> None:
        """Tell the patch's observer of the answer that was just given."""
        moment, matching = self.patch.moment, self.matching if self._matched() else None
        answer = Answer(self.site.name, self.size, self.plan, matching, moment.latent, moment.timestep, moment)
        self.patch.observer(answer)


def _projected(attn: nn.Module, kv_context: KVContext | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens x."""
    context_k, context_v = (x, x) if kv_context is None else kv_context(attn, x)
    return attn.to_q(x), attn.to_k(context_k), attn.to_v(context_v)


class _MergeAround:
    """Hooks that merge the tokens in front of cross-attention or the feed-forward layer, and unmerge them behind it."""

    def __init__(self, layer: _Layer, switch: str) -> None:
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
    stages: Sequence[Stage] = _DEFAULTS.stages,
    rules: Sequence[Rule] = _DEFAULTS.rules,
    **unknown: Any,
) -> Model:
    """Put agent attention on a Stable Diffusion model, in place. A patch that is there already is replaced.

    Args:
        model: an LDM or sgm model (with `.model.diffusion_model`), a diffusers pipeline, or a U-Net.
        **: the settings, as in `AgentConfig`, which says what each means and its range.

    Returns:
        The model.

    Raises:
        SettingError: a setting is unknown or outside its range. Nothing has been touched.
        UnsupportedModelError: the model has no transformer blocks. Nothing has been touched.
    """
    given = {k: v for k, v in locals().items() if k in SETTINGS}
    check_names(unknown, SETTINGS)
    patch_unet(find_unet(model), AgentConfig(**given))
    return model


def patch_unet(unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None) -> Patch:
    """Patch a U-Net with a config, replacing a patch that is there already; see `Patch` for the arguments."""
    patch = Patch(unet, config, kv_context)  # which may raise, before anything is touched
    patch.install()
    return patch


def _patch_on(unet: nn.Module) -> Patch | None:
    """The patch on a U-Net. The U-Net owns it by its hook: both go together, and a deep copy has a copy of its own."""
    owners = (getattr(hook, "__self__", None) for hook in unet._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Patch)), None)


def get_patch(model: Any) -> Patch | None:
    """The patch that is on the model, if any."""
    try:
        return _patch_on(find_unet(model))
    except UnsupportedModelError:
        return None


def remove_patch(model: Model) -> Model:
    """Take the patch off the model, if there is one; returns the model."""
    patch = get_patch(model)
    if patch is not None:
        patch.remove()
    return model


@contextmanager
def patched(model: Model, *args: Any, **settings: Any) -> Iterator[Model]:
    """A `with` block during which the model is patched; the arguments are those of `apply_patch`.

    A patch that was on the model before is put back afterwards.
    """
    outer = get_patch(model)
    apply_patch(model, *args, **settings)
    ours = get_patch(model)
    try:
        yield model
    finally:
        if ours is not None:
            ours.remove()
        if outer is not None and get_patch(model) is None:  # unless another one has replaced ours meanwhile
            outer.install()
