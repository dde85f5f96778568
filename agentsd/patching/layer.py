"""One patched block: what is done in its self-attention now, in a graph or outside, and what the host keeps."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Clusters, Matching
from ..config import AgentConfig
from ..eager import compiler_loaded, compiling, constant, followed, not_compiled
from ..hosts import Call, Site, read_size, read_tokens
from ..methods import UNTOUCHED, LayerPlan, SelfAttention
from ..plan import deepest_level, merged_tokens, plan_block
from .call import Answer, BlockCall, KVContext, ModelCall, Planned, Shared
from .closeness import Watch

log = logging.getLogger("agentsd")

UNPLANNED = Planned()
# Levels of a U-Net, and those that something which shrinks the latent on the way may lead to
_LEVELS = (1, 2, 4, 8, 16, 32)


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
    size: Grid | None
    plan: LayerPlan | None
    calls: dict[str, int]


class Answerer:
    """Plans the blocks of a patch and answers their self-attention. `Patch` takes a subclass that does it otherwise.

    Attributes:
        clusters_first: whether an answer needs the clusters of the block's tokens, as planned, to be made before it.
        traceable: whether torch.compile may make answers part of a graph.
    """

    clusters_first = True
    traceable = True

    def settings(self, config: AgentConfig, site: Site) -> Iterable[AgentConfig]:
        """Yield the settings under which a block may ever act; none where full attention always stays."""
        place = site.place
        for since, _ in config.parts():
            for level in _LEVELS:
                settings = config.at(since, replace(place, downsample=level))
                reached = settings is not None and level <= deepest_level(settings, place.largest_level)
                if reached and (place.downsample is None or level >= place.downsample):
                    yield settings

    def plan(self, layer: Layer, call: ModelCall, size: Grid) -> tuple[AgentConfig, LayerPlan] | None:
        """Plan a block of `size` tokens: the settings in force and the plan; None where full attention stays."""
        return plan_block(call.shared.config, layer.site.place, call.latent, call.part, size)

    def answer(
        self, layer: Layer, host: Call, planned: Planned, matching: Matching | None, watch: Watch | None = None
    ) -> Tensor:
        """Answer a call of self-attention. Where this raises, the host does.

        Args:
            layer: the block.
            host: the call.
            planned: what is done; it acts.
            matching: the clusters of the block's tokens; None if there are none.
            watch: compares the answer with full attention; None if nothing does.
        """
        attention = self.attention(layer, host, planned, matching)
        if watch is None:
            return planned.plan.method.attend(attention)
        return watch.attend(layer.site.name, planned.plan.method, attention)

    def attention(self, layer: Layer, host: Call, planned: Planned, matching: Matching | None) -> SelfAttention:
        """Describe a call of self-attention to its method; the arguments are those of `answer`."""
        attn = layer.seam.attn
        return SelfAttention(
            x=host.x,
            plan=planned.plan,
            settings=planned.config,
            size=planned.size,
            heads=attn.heads,
            matching=matching,
            wrapped=layer.site.wrapped,
            project=partial(_projected, attn, layer.shared.kv_context),
            project_q=lambda x: attn.to_q(x),
            project_out=layer.seam.project_out,
            proceed=host.proceed,
        )


def _projected(attn: nn.Module, kv_context: KVContext | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens x to queries, keys and values."""
    context_k, context_v = (x, x) if kv_context is None else kv_context(attn, x)
    return attn.to_q(x), attn.to_k(context_k), attn.to_v(context_v)


class Image:
    """The module around some blocks, which sees their tokens as an image.

    Attributes:
        module: the module.
        layers: its blocks.
    """

    def __init__(self, shared: Shared, module: nn.Module) -> None:
        self.shared, self.module = shared, module
        self.layers: list[Layer] = []

    @followed
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not compiling():
            self.see(read_size(args, kwargs))
        elif self.shared.stays_outside:
            self._look(args, kwargs)
        else:
            self._foresee(read_size(args, kwargs))

    @not_compiled
    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.see(read_size(args, kwargs))

    def see(self, size: tuple[int, int] | None) -> None:
        """Keep the size of the tokens for this U-Net call."""
        call = self.shared.call()
        if call is None:
            return
        size = None if size is None else Grid(*size)
        if call.sizes.setdefault(self, size) != size:  # another part of the image
            call.sizes[self] = size
            for layer in self.layers:
                call.blocks.pop(layer, None)
        if compiler_loaded():  # each block may be a graph by itself
            for layer in self.layers:
                layer.traced = layer.block_call(call).planned.name

    def _foresee(self, size: tuple[int, int] | None) -> None:
        """The same while the compiler traces."""
        key = self.shared.key
        if key is None or size is None:
            for layer in self.layers:
                layer.traced = ""
            return
        # the length of a range is a number even where that of a tensor is a symbol
        height, width = len(range(size[0])), len(range(size[1]))
        for layer in self.layers:
            layer.traced = _foreseen(layer, key, height, width)


class Layer:
    """One patched block.

    Attributes:
        shared: what it shares with the other blocks of the patch.
        site: the block.
        image: the module around it.
        seam: through which its self-attention is answered.
        calls: number of self-attention calls by action.
        traced: name of what is `Planned` for it, as a compiled graph reads it: blocks of one plan share a graph. It is
            no part of a `ModelCall`, which the compiler doesn't follow.
    """

    def __init__(self, shared: Shared, answerer: Answerer, site: Site, image: Image) -> None:
        self.shared, self.answerer, self.site, self.image = shared, answerer, site, image
        image.layers.append(self)
        self.seam = site.seam()
        self.calls: Counter[str] = Counter()
        self.traced = ""
        self._plans: dict[Any, Planned] = {}
        self._compiled: Any = None
        self._checked: Any = None
        ever = list(answerer.settings(shared.config, site))
        self.acts = any(settings.merge_attn or settings.merge_crossattn or settings.merge_mlp for settings in ever)
        self._merging = [
            _MergeAround(self, switch, part)
            for switch, part in (("merge_crossattn", "attn2"), ("merge_mlp", "ff"))
            if getattr(site.block, part, None) is not None and any(getattr(settings, switch) for settings in ever)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plans": {}, "_compiled": None, "_checked": None, "traced": ""}

    def install(self) -> Iterator[Any]:
        """Install the block's hooks, yielding each handle at once, so that none is lost if a later hook fails."""
        self.seam = self.site.seam()
        if not self.acts:
            return
        if self.shared.outside:
            yield self.site.block.register_forward_pre_hook(self._begin_block, with_kwargs=True)
            yield self.site.block.register_forward_hook(self._end_block)
        for merging in self._merging:
            yield from merging.install()
        # also where self-attention stays as it is: the compiler looks at hooks only where something else changes
        self.seam.install(self._attention, self._wants)

    def remove(self) -> None:
        self.seam.remove()
        self.traced = ""
        self._put_back()

    def set_aside(self) -> None:
        """Run a block that was compiled by itself uncompiled, while no graph can contain what is done in it."""
        if not self.shared.stays_outside:
            self._put_back()
        elif self.acts and (compiled := vars(self.site.block).pop("_compiled_call_impl", None)) is not None:
            self._compiled = compiled
            self.shared.warn("compiled blocks run uncompiled while their tokens are matched or watched")

    def _put_back(self) -> None:
        if self._compiled is not None:
            self.site.block._compiled_call_impl, self._compiled = self._compiled, None

    def note_if_bypassed(self, call: ModelCall) -> None:
        """Note, at the end of a U-Net call in which this block's self-attention did not come by, who may have it."""
        if call.sizes.get(self.image) is None or getattr(self.site.block, "_compiled_call_impl", None) is not None:
            return
        if not self.block_call(call).planned.name:
            self.shared.count(self.calls, UNTOUCHED)
        else:
            self.shared.note(self.seam.obstacle or "something else answers self-attention in its place")

    def report(self) -> LayerReport:
        """Report what was done in the last U-Net call."""
        call = self.shared.last
        planned = getattr(_TRACED, self.traced, UNPLANNED) if call is None else self.block_call(call).planned
        size = planned.size if call is None else call.sizes.get(self.image)
        return LayerReport(self.site.name, size, planned.plan, dict(self.calls))

    def block_call(self, call: ModelCall) -> BlockCall:
        """Return what the block does in a U-Net call, planning it if need be."""
        block = call.blocks.get(self)
        if block is None:
            size = call.sizes.get(self.image)
            planned = UNPLANNED if size is None or not call.active else self._planned(call, size)
            block = BlockCall(planned)
            if size is not None:
                call.blocks[self] = block
        return block

    def _planned(self, call: ModelCall, size: Grid) -> Planned:
        key = (call.part, call.latent, size)
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plans[key] = _planned(self.answerer.plan(self, call, size), size)
        return planned

    # Hooks on the block, where it may need clusters of its tokens

    @not_compiled
    def _begin_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.match(read_tokens(args, kwargs))

    def match(self, x: Any) -> None:
        """Match the block's tokens x (B, N, C), where its plan needs clusters."""
        call = self.shared.call()
        if call is None:
            return
        block = self.block_call(call)
        block.matching = None
        config, plan, size = block.planned.config, block.planned.plan, block.planned.size
        if plan is None:
            return
        r, agent_r = merged_tokens(config, plan), plan.agent_r
        if not r and not agent_r:
            return
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != plan.tokens:
            self.shared.note("a block got tokens that do not form the grid of its layer", f"{size}")
            return
        match = partial(call.match, config, x, size, r, agent_r)
        block.matching = self._safely(lambda: self.timed("clusters", match, None, x.device), lambda: None)

    @not_compiled
    def _end_block(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.shared.call()
        if call is not None and not torch.is_grad_enabled():  # gradient checkpointing may run the inside again
            self.block_call(call).matching = None

    # Self-attention

    def answer(self, host: Call) -> Tensor:
        """Answer a call of self-attention, as planned in the U-Net call that is going on."""
        return self._attention(host) if self._wants() else host.proceed()

    @followed
    def _wants(self) -> bool:
        """Whether a call of self-attention is to be looked at: it isn't where the block is left alone."""
        if compiling():
            return self.traced != ""
        call = self.shared.call()
        if call is None:
            return False
        block = call.blocks.get(self) or self.block_call(call)
        block.asked = True
        if block.planned.name:
            return True
        self.shared.count(self.calls, UNTOUCHED)
        return False

    @followed
    def _attention(self, host: Call) -> Tensor:
        if compiling():
            return self._attend_in_graph(host)
        block = self.shared.call().blocks[self]  # by `_wants`
        return self._attend(host, block.planned, block.matching)

    def _attend_in_graph(self, host: Call) -> Tensor:
        """Attend while the compiler traces; it has to break its graph where something else than usual happens."""
        planned = getattr(_TRACED, self.traced)
        if self.shared.stays_outside or self._veto(host, planned.plan):
            return self._attend_outside_graph(host)
        try:
            return self.answerer.answer(self, host, planned, None)
        except Exception:  # again, where it is noted
            return self._attend_outside_graph(host)

    @not_compiled
    def _attend_outside_graph(self, host: Call) -> Tensor:
        call = self.shared.call()
        if call is not None and self.image in call.sizes:
            return self.answer(host)
        return self._attend(host, getattr(_TRACED, self.traced), None)

    def _attend(self, host: Call, planned: Planned, matching: Matching | None) -> Tensor:
        matching = matching if planned.clustered else None
        reason = self._veto(host, planned.plan)
        if not reason and planned.clustered and self.answerer.clusters_first:
            shape = None if matching is None else matching.shape
            if shape != tuple(host.x.shape[:2]):
                reason = "self-attention got other tokens than the block was given"
        if reason:
            self.shared.note(reason, f"{tuple(host.x.shape)} in a layer of {planned.plan.tokens} tokens")
            self.shared.count(self.calls, UNTOUCHED)
            return host.proceed()
        shared = self.shared
        shared.count(self.calls, planned.plan.action)
        plain = shared.observer is None and shared.meter is None and shared.timing is None
        if plain and self._checked is shared.finite:  # nearly every call
            return self._safely(lambda: self.answerer.answer(self, host, planned, matching), host.proceed)
        return self._safely(lambda: self._attend_looked_at(host, planned, matching), host.proceed)

    def _veto(self, host: Call, plan: LayerPlan) -> str:
        """Return why this call is left to the host; empty if it isn't."""
        if host.mask is not None:
            return "self-attention was given a mask"
        if host.extras:
            return f"self-attention was given {', '.join(sorted(host.extras))}"
        if host.context is not None and host.context is not host.x:
            return "self-attention was given a context of its own"
        shape = host.x.shape
        if len(shape) != 3 or shape[1] != plan.tokens:
            return "self-attention got another number of tokens than the layer has"
        return ""

    def _safely(self, action: Callable[[], Any], fallback: Callable[[], Any]) -> Any:
        """Return what `action` returns, or `fallback` if it fails. A bug of ours must never cost the user an image."""
        try:
            return action()
        except Exception as error:  # whatever went wrong, the host's own attention can still make the image
            self.shared.note(f"an error of ours: {type(error).__name__}: {error}")
            log.debug("agent attention failed in %s", self.site.name, exc_info=True)
            return fallback()

    def _attend_looked_at(self, host: Call, planned: Planned, matching: Matching | None) -> Tensor:
        """Answer a call, and time, compare, tell of and check the answer where that is asked for."""
        call, finite = self.shared.call(), self.shared.finite
        answer = partial(self.answerer.answer, self, host, planned, matching, call and call.watch)
        out = self.timed("self-attention", answer, host.proceed, host.x.device)
        if self.shared.observer is not None and call is not None:
            self._safely(partial(self._notify_observer, call, planned, matching), lambda: None)
        self._checked = finite
        return finite.answer(self.site.name, out, host.proceed)

    def timed(self, part: str, ours: Callable[[], Any], host: Callable[[], Any] | None, device: torch.device) -> Any:
        """Return what `ours` returns, timed beside the host's answer while the patch measures."""
        timing = self.shared.timing
        return ours() if timing is None else timing.time(self.site.name, part, ours, host, device)

    def _notify_observer(self, call: ModelCall, planned: Planned, matching: Matching | None) -> None:
        """Pass the answer just given to the patch's observer."""
        answer = Answer(self.site.name, planned.size, planned.plan, matching, call.latent, call.timestep, call)
        self.shared.observer(answer)


class _Traced:
    """What is planned, by its name: attributes, which the compiler follows and which never change."""


_TRACED = _Traced()


def _planned(settings_and_plan: tuple[AgentConfig, LayerPlan] | None, size: Grid) -> Planned:
    if settings_and_plan is None:
        return Planned(size=size)
    config, plan = settings_and_plan
    planned = Planned(config, plan, size, plan.method.merges and bool(plan.r or plan.agent_r))
    if not plan.acts:
        return planned
    # equal plans have one name, whatever block they are for
    name = f"plan_{hashlib.sha256(repr((config, plan, size)).encode()).hexdigest()[:24]}"
    return vars(_TRACED).setdefault(name, planned._replace(name=name))


@constant
def _foreseen(layer: Layer, key: str, height: int, width: int) -> str:
    """Name what is planned for a block of height × width tokens; `key` as in `Shared`."""
    *latent, part = key.split()
    call = ModelCall(layer.shared, Grid(*map(int, latent)))
    call.part = None if part == "None" else float(part)
    return layer._planned(call, Grid(height, width)).name


class _MergeAround:
    """Hooks that merge tokens before cross-attention or the feed-forward layer, and unmerge them after it."""

    def __init__(self, layer: Layer, switch: str, part: str) -> None:
        self.layer, self.switch, self.part = layer, switch, part

    def install(self) -> Iterator[Any]:
        module = getattr(self.layer.site.block, self.part)
        yield module.register_forward_pre_hook(self._before, with_kwargs=True)
        yield module.register_forward_hook(self._after, with_kwargs=True)

    @not_compiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.layer.shared.call()
        if call is None or not args:
            return None
        block = self.layer.block_call(call)
        clusters = self._clusters(block, args[0])
        if clusters is None:
            return None
        block.merged = {**(block.merged or {}), self.switch: (clusters, args[0])}
        return (clusters.merge(args[0]), *args[1:]), kwargs

    @not_compiled
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        call = self.layer.shared.call()
        merged = None if call is None else (self.layer.block_call(call).merged or {}).pop(self.switch, None)
        if merged is None:
            return None
        clusters, x = merged
        if self.layer.shared.timing is None:
            return clusters.unmerge(output)
        again = partial(module.forward, **kwargs)
        ours = partial(lambda: clusters.unmerge(again(clusters.merge(x), *args[1:])))
        return self.layer.timed(self.switch, ours, lambda: again(x, *args[1:]), x.device)

    def _clusters(self, block: BlockCall, x: Any) -> Clusters | None:
        config, matching = block.planned.config, block.matching
        if config is None or not getattr(config, self.switch) or matching is None or not isinstance(x, Tensor):
            return None
        return matching.merged if x.dim() == 3 and x.shape[:2] == matching.shape else None
