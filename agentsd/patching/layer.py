"""One patched block: what is done in its self-attention now, in a graph or outside, and what the host keeps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Clusters, Matching, Partition
from ..config import AgentConfig
from ..eager import compiling, constant, followed, not_compiled
from ..hosts import Call, Site, read_size, read_timestep, read_tokens
from ..methods import UNTOUCHED, LayerPlan, Method, SelfAttention, method_of
from ..plan import merged_tokens, plan_block
from ..schedule import MAX_TIMESTEP

if TYPE_CHECKING:
    from .patch import Patch

log = logging.getLogger("agentsd")

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


class Moment:
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
        self.moment: Moment | None = None

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
        self._plans_made: dict[Any, _Planned] = {}

    def forget(self) -> None:
        self.config, self.plan, self._method, self._clustered = _UNPLANNED
        self.matching: Matching | None = None
        # the U-Net calls in which it was planned, and asked for self-attention
        self.planned: Moment | None = None
        self.asked: Moment | None = None

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
        planned = _UNPLANNED
        if moment.active and size is not None:
            key = (moment.part, moment.latent, size)
            planned = self._plans_made.get(key)
            if planned is None:
                planned = self._plans_made[key] = _planned(self._plan(moment, size))
        self.config, self.plan, self._method, self._clustered = planned

    def _plan(self, moment: Moment, size: tuple[int, int]) -> tuple[AgentConfig, LayerPlan] | None:
        return plan_block(self.patch.config, self.site.place, moment.latent, moment.part, size)

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
        match = partial(self.patch.match, self.config, x, size, r, agent_r)
        self.matching = self._safely(lambda: self._timed("clusters", match, None, x.device), lambda: None)

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
        attend = partial(self._attend, call)
        return self._safely(lambda: self._timed("self-attention", attend, call.proceed, call.x.device), call.proceed)

    def _timed(self, part: str, ours: Callable[[], Any], host: Callable[[], Any] | None, device: torch.device) -> Any:
        """Return what `ours` returns, timed beside the host's answer where the patch is measuring."""
        timing = self.patch.timing
        return ours() if timing is None else timing.time(self.site.name, part, ours, host, device)

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
        shape = call.x.shape
        if len(shape) != 3 or shape[1] != plan.tokens:
            return f"self-attention got {tuple(shape)} where the layer has {plan.tokens} tokens"
        return ""

    def _unmatched(self, call: Call) -> str:
        """Return why the clusters that there are don't fit this call; empty if they do, or none are needed."""
        if self._clustered and (self.matching is None or self.matching.shape != tuple(call.x.shape[:2])):
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
        matching = self.matching if self._clustered else None
        attention = self._for_method(call, self.config, self.plan, self.image.size, matching)
        meter = self.patch.meter
        if meter is not None and meter.watching:
            answer = meter.attend(self.site.name, self._method, attention)
        else:
            answer = self._method.attend(attention)
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
        attn = self._seam.attn
        return SelfAttention(
            x=call.x,
            plan=plan,
            settings=config,
            size=size,
            heads=attn.heads,
            matching=matching,
            wrapped=self.site.wrapped,
            project=partial(_projected, attn, self.patch.kv_context),
            project_q=lambda x: attn.to_q(x),
            project_out=self._seam.project_out,
            proceed=call.proceed,
        )

    def _notify_observer(self) -> None:
        """Pass the answer just given to the patch's observer."""
        moment, matching = self.patch.moment, self.matching if self._clustered else None
        answer = Answer(self.site.name, self.image.size, self.plan, matching, moment.latent, moment.timestep, moment)
        self.patch.observer(answer)


class _Planned(NamedTuple):
    """What is done in a block, all None where full attention stays.

    Attributes:
        config: the settings in force.
        plan: the plan.
        method: what computes it.
        clustered: whether self-attention works on clusters.
    """

    config: AgentConfig | None = None
    plan: LayerPlan | None = None
    method: Method | None = None
    clustered: bool = False


_UNPLANNED = _Planned()


def _planned(settings_and_plan: tuple[AgentConfig, LayerPlan] | None) -> _Planned:
    if settings_and_plan is None:
        return _UNPLANNED
    config, plan = settings_and_plan
    return _Planned(config, plan, method_of(plan.action), _matched(plan))


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
    """Foresee what is done in a block, and return the name of the attribute that holds it; `key` as in `Moment`."""
    name = f"foreseen {key}".replace(".", "_")  # a dot would be a path to the compiler
    if name not in vars(layer):
        setattr(layer, name, _foreseen(layer, key))
    return name


def _foreseen(layer: Layer, key: str) -> _Foreseen:
    height, width, part = key.split()
    latent, progress = (int(height), int(width)), None if part == "None" else float(part)
    level = layer.site.downsample
    settings_and_plan = plan_block(layer.patch.config, layer.site.place, latent, progress)
    size = None if level is None else Grid(*latent).at(level)
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
