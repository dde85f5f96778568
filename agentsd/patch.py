"""The patch: an object that owns its hooks and the modules it changed, and can take all of it back."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import (
    add_scaled,
    agent_attention,
    corrected_attention,
    join_heads,
    lost_by_pooling,
    no_autocast,
    pool_tokens,
    sample_tokens,
    split_heads,
)
from .config import MAX_TIMESTEP, SETTINGS, AgentConfig, LayerPlan, Stage, check_names, plan_layer
from .hosts import (
    Call,
    Site,
    UnsupportedModelError,
    find_sites,
    find_unet,
    first_tensor,
    read_size,
    read_timestep,
)
from .merging import Clusters, Partition, Plan, match, partition, partition_seed

log = logging.getLogger("agentsd")

Model = TypeVar("Model")
KVContext = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

# Hooks count calls and hold the moment's sizes. Guards on those fail with every call: torch.compile would compile with
# every call, so its graphs break there instead.
_not_compiled = torch.compiler.disable


@dataclass(frozen=True)
class LayerReport:
    """What the patch has done to one block.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens in the last call; None before the first.
        plan: what was to be done there in the last call; None before the first or while the stage is untouched.
        calls: number of self-attention calls by what was done: "agents", "merge", "pool", "corrected" or
            "untouched".
    """

    name: str
    size: tuple[int, int] | None
    plan: LayerPlan | None
    calls: dict[str, int]


@dataclass
class _Moment:
    """What holds during one call of the U-Net."""

    config: AgentConfig | None = None
    latent: tuple[int, int] | None = None
    timestep: float | None = None
    partitions: dict[Any, Partition] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A self-attention call that the patch has answered, for `Patch.observer`.

    Attributes:
        name: the block's name in the U-Net.
        size: (height, width) of its tokens.
        layer: what was done.
        clusters: the clusters that were used; None where there were none.
        latent: (height, width) of the latent.
        timestep: that of the U-Net's call; None where it gave none.
        moment: the same object for all blocks of one call of the U-Net.
    """

    name: str
    size: tuple[int, int]
    layer: LayerPlan
    clusters: Plan | None
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
    if made.timestep is None or now.timestep is None:
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
        observer: told of every answer; None (the default) costs nothing. It must keep no tensor of an answer.

    Raises:
        UnsupportedModelError: the U-Net has no block that could be patched.
    """

    def __init__(self, unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None) -> None:
        self.config = config
        self.kv_context = kv_context
        self.notes: Counter[str] = Counter()
        self.observer: Callable[[Answer], None] | None = None
        self.moment = _Moment()
        self._kept: dict[Any, tuple[_Moment, Plan]] = {}
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
        return [LayerReport(s.site.name, s.size, s.todo, dict(s.calls)) for s in self._layers]

    def explain(self, height: int, width: int, done: float | None = None) -> list[tuple[str, LayerPlan | None]]:
        """What will be done to each block for a latent of `height` × `width`, without running anything.

        Args:
            height: rows of the latent (image height / 8).
            width: columns of the latent.
            done: fraction of the diffusion done, 0–1; needed only where there are stages.

        Returns:
            (name of the block, its plan) for each block; the plan is None where the stage leaves the model untouched
            or the block's place in the U-Net is unknown.
        """
        config = self.config.at(done)
        return [(layer.site.name, layer.foresee(config, height, width)) for layer in self._layers]

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

    def match(self, name: str, x: Tensor, size: tuple[int, int], r: int, agent_r: int) -> Plan:
        """The plan of the block `name` for its tokens x; one that is kept where the settings allow it."""
        moment, config = self.moment, self.moment.config
        key = ("" if config.share_match else name, x.shape[:2], size, x.device, r, agent_r, config.sx, config.sy)
        made, plan = self._kept.get(key, (None, None))
        if made is not None and _still_holds(made, moment, config):
            return plan
        plan = match(x, self.partition(config, *size, x.device), r, agent_r)
        if config.share_match or config.reuse_match:
            self._kept[key] = moment, plan
        return plan

    @_not_compiled
    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = read_timestep(args, kwargs) if self._needs_timestep() else None
        # the quotient of whole numbers, which is the very float of `until`; 1 − t / 1000 is not
        config = self.config.at(None if t is None else (MAX_TIMESTEP - t) / MAX_TIMESTEP)
        self.moment = _Moment(config, read_size(args, kwargs), t)
        if config is None or not config.reuse_match:
            self._kept.clear()
        if self.config.stages and (t is None or not 0 <= t <= MAX_TIMESTEP):
            self.note(f"the U-Net was given timestep {t}, and stages need one from 0 to {MAX_TIMESTEP}")
        for layer in self._layers:
            layer.forget()

    def _needs_timestep(self) -> bool:
        configs = self.config.every_stage()
        if self.observer is not None:
            return True
        return bool(self.config.stages) or any(config.use_rand or config.reuse_match for config in configs)


class _Layer:
    """One block under the patch."""

    def __init__(self, patch: Patch, site: Site) -> None:
        self.patch = patch
        self.site = site
        self.calls: Counter[str] = Counter()
        self.forget()
        self._seam = site.seam()

    def forget(self) -> None:
        self.size: tuple[int, int] | None = None
        self.todo: LayerPlan | None = None
        self.plan: Plan | None = None
        self.met = False

    def install(self) -> Iterator[Any]:
        """Install this block's hooks; yields their handles one by one, so that none is lost if a later one fails."""
        block, configs = self.site.block, self.patch.config.every_stage()
        self._seam = self.site.seam()
        yield self.site.parent.register_forward_pre_hook(self._see_image, with_kwargs=True)
        yield block.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        yield block.register_forward_hook(self._drop_plan)
        if any(config.merge_crossattn for config in configs) and getattr(block, "attn2", None) is not None:
            yield from _MergeAround(self, "merge_crossattn").install(block.attn2)
        if any(config.merge_mlp for config in configs):
            yield from _MergeAround(self, "merge_mlp").install(block.ff)
        if any(config.merge_attn for config in configs):
            self._seam.install(self._attention)

    def remove(self) -> None:
        self._seam.remove()
        self.forget()

    def foresee(self, config: AgentConfig | None, height: int, width: int) -> LayerPlan | None:
        d = self.site.downsample
        if config is None or d is None:
            return None
        return plan_layer(config, -(-height // d), -(-width // d), d)

    # Hooks, in the order in which a block meets them

    @_not_compiled
    def _see_image(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = read_size(args, kwargs)

    @_not_compiled
    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.todo = self.plan = None
        self.met = False
        moment = self.patch.moment
        x = first_tensor(args, kwargs, "x", "hidden_states")
        if moment.config is None or self.size is None or moment.latent is None:
            return
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != math.prod(self.size):
            self.patch.note(f"a block got tokens that are no {self.size[0]} × {self.size[1]} grid")
            return
        self.todo = plan_layer(moment.config, *self.size, _downsample(moment.latent, self.size))
        r = self.todo.r if self._merges(moment.config) else 0
        if r or self.todo.agent_r:
            agent_r = self.todo.agent_r
            self.plan = self._safely(lambda: self.patch.match(self.site.name, x, self.size, r, agent_r), lambda: None)

    def _merges(self, config: AgentConfig) -> bool:
        return config.merge_crossattn or config.merge_mlp or self.todo.action in ("agents", "merge")

    @_not_compiled
    def _drop_plan(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # gradient checkpointing may compute the inside of the block once more
            self.plan = None
        if self.todo is not None and self.todo.action != "untouched" and not self.met:
            self.patch.note(self.site.obstacle or "something else answers self-attention in its place")

    # Self-attention

    @_not_compiled
    def _attention(self, call: Call) -> Tensor:
        self.met = True
        reason = self._why_not(call)
        if reason is not None:
            if reason:
                self.patch.note(reason)
            self.calls["untouched"] += 1
            return call.proceed()
        self.calls[self.todo.action] += 1
        return self._safely(lambda: self._attend(call), call.proceed)

    def _why_not(self, call: Call) -> str | None:
        """Why this call is the host's: a reason worth telling, "" where it was meant to be, None if it is ours."""
        if self.todo is None or self.todo.action == "untouched":
            return ""
        if self.site.obstacle:
            return self.site.obstacle
        if call.mask is not None:
            return "self-attention was given a mask"
        if call.extras:
            return f"self-attention was given {', '.join(sorted(call.extras))}"
        if call.context is not None and call.context is not call.x:
            return "self-attention was given a context of its own"
        if call.x.dim() != 3 or call.x.shape[1] != self.todo.tokens:
            return f"self-attention got {tuple(call.x.shape)} where the layer has {self.todo.tokens} tokens"
        clustered = self.todo.action in ("agents", "merge") and (self.todo.r or self.todo.agent_r)
        if clustered and (self.plan is None or self.plan.shape != tuple(call.x.shape[:2])):
            return f"self-attention got {tuple(call.x.shape)}, which is not what the block was given"
        return None

    def _safely(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """Our answer; if it fails, the host's. An image must never be lost to us."""
        try:
            return ours()
        except Exception as error:  # whatever it was, the host's own attention can still make the image
            self.patch.note(f"an error of ours: {type(error).__name__}: {error}")
            log.debug("agent attention failed in %s", self.site.name, exc_info=True)
            return theirs()

    def _attend(self, call: Call) -> Tensor:
        answer = self._answer(call)
        if self.patch.observer is not None:
            self._safely(self._tell, lambda: None)
        return answer

    def _tell(self) -> None:
        """Tell the patch's observer of the answer that was just given."""
        moment, used = self.patch.moment, self.todo.action in ("agents", "merge")
        given = (self.site.name, self.size, self.todo, self.plan if used else None)
        self.patch.observer(Answer(*given, moment.latent, moment.timestep, moment))

    def _answer(self, call: Call) -> Tensor:
        config, merged = self.patch.moment.config, self.plan.merged if self.plan else None
        if self.todo.action == "merge" and not self.site.wrapped():
            return merged.unmerge(call.proceed(merged.merge(call.x)))
        if self.todo.action == "pool":
            return self._pooled(call.x, config)
        if self.todo.action == "corrected":
            return self._corrected(call.x, config)
        q, k, v, a = self._project(call.x, merged)
        out = self._precisely(config, (q, k, v, a), self._agent_step if a is not None else self._plain_step)
        out = self._seam.project_out(out)
        return out if merged is None else merged.unmerge(out)

    def _project(self, x: Tensor, merged: Clusters | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values of the merged tokens, and agents of all tokens.

        A mean and a projection commute, since the projection is affine and the weights of a mean sum to 1: pool
        before projecting where that leaves fewer tokens to project, unless somebody who wraps the projections counts
        on seeing all tokens.
        """
        attn = self.site.block.attn1
        if merged is None or self.site.wrapped():
            q, k, v = self._qkv(x)
            a = self._agents(q)
            return (q, k, v, a) if merged is None else (merged.merge(q), merged.merge(k), merged.merge(v), a)
        a = self._agents(x)
        return *self._qkv(merged.merge(x)), None if a is None else attn.to_q(a)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.site.block.attn1
        context_k, context_v = (x, x) if self.patch.kv_context is None else self.patch.kv_context(attn, x)
        return attn.to_q(x), attn.to_k(context_k), attn.to_v(context_v)

    def _agents(self, x: Tensor) -> Tensor | None:
        if self.todo.action != "agents":
            return None
        if self.todo.cell is not None:
            return pool_tokens(x, *self.size, self.todo.cell)
        return self.plan.agents.merge(x)

    def _agent_step(self, config: AgentConfig, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        q, k, v, a = (split_heads(x, self.site.heads) for x in (q, k, v, a))
        out = agent_attention(q, k, v, a, k_scale2=config.k_scale2)
        return join_heads(add_scaled(out, v, config.k_shortcut))

    def _plain_step(self, config: AgentConfig, q: Tensor, k: Tensor, v: Tensor, a: None = None) -> Tensor:
        q, k, v = (split_heads(x, self.site.heads) for x in (q, k, v))
        return join_heads(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    def _pooled(self, x: Tensor, config: AgentConfig) -> Tensor:
        """Token downsampling: all queries, keys and values averaged over cells."""
        q, k, v = self._qkv(x)
        cell = self.todo.cell
        k, pooled = (pool_tokens(t, *self.size, cell) for t in (k, v))
        out = self._precisely(config, (q, k, pooled, None), self._plain_step)
        if config.k_shortcut:
            out = add_scaled(out, lost_by_pooling(v, pooled, *self.size, cell), config.k_shortcut)
        return self._seam.project_out(out)

    def _corrected(self, x: Tensor, config: AgentConfig) -> Tensor:
        """All queries attend to a sample of the keys, whose values are fitted at the sample's queries."""
        q, k, v = self._qkv(x)
        few = (sample_tokens(t, *self.size, self.todo.cell) for t in (q, k, v))
        return self._seam.project_out(self._precisely(config, (q, k, v, *few), self._corrected_step))

    def _corrected_step(self, config: AgentConfig, *tensors: Tensor) -> Tensor:
        return join_heads(corrected_attention(*(split_heads(x, self.site.heads) for x in tensors)))

    def _precisely(self, config: AgentConfig, tensors: Sequence[Tensor | None], step: Callable[..., Tensor]) -> Tensor:
        """Take an attention step in the precision that was asked for; the result has the tensors' own."""
        if config.attn_precision is None:
            return step(config, *tensors)
        dtype = tensors[0].dtype
        with no_autocast(tensors[0].device.type):
            return step(config, *(None if t is None else t.float() for t in tensors)).to(dtype)


class _MergeAround:
    """Hooks that merge the tokens in front of cross-attention or the feed-forward layer, and unmerge them behind it."""

    def __init__(self, layer: _Layer, switch: str) -> None:
        self.layer, self.switch = layer, switch
        self.pending: Clusters | None = None

    def install(self, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(self._before, with_kwargs=True)
        yield module.register_forward_hook(self._after)

    @_not_compiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.pending = self._clusters(args[0]) if args else None
        return None if self.pending is None else ((self.pending.merge(args[0]), *args[1:]), kwargs)

    @_not_compiled
    def _after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        clusters, self.pending = self.pending, None
        return None if clusters is None else clusters.unmerge(output)

    def _clusters(self, x: Any) -> Clusters | None:
        config, plan = self.layer.patch.moment.config, self.layer.plan
        if config is None or not getattr(config, self.switch) or plan is None or not isinstance(x, Tensor):
            return None
        return plan.merged if x.dim() == 3 and x.shape[:2] == plan.shape else None


def _downsample(latent: tuple[int, int], size: tuple[int, int]) -> int:
    """How far down the U-Net a layer is: the power of two nearest to the ratio of the sides."""
    return 2 ** max(0, round(0.5 * math.log2(math.prod(latent) / math.prod(size))))


_DEFAULTS = AgentConfig()


def apply_patch(
    model: Model,
    ratio: float = _DEFAULTS.ratio,
    max_downsample: int = _DEFAULTS.max_downsample,
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
    """A `with` block during which the model is patched; the arguments are those of `apply_patch`."""
    apply_patch(model, *args, **settings)
    patch = get_patch(model)
    try:
        yield model
    finally:
        if patch is not None:  # ours, and not one that replaced it meanwhile
            patch.remove()
