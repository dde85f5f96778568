"""One patched block: what is done in its self-attention now, in a graph or outside, and what the host keeps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Matching
from ..config import AgentConfig
from ..eager import compiler_loaded, compiling, constant, followed, not_compiled
from ..hosts import Call, Site, read_tokens
from ..methods import UNTOUCHED, LayerPlan, SelfAttention
from ..plan import deepest_level, merged_tokens, plan_block
from .call import COUNTING, UNPLANNED, Answer, BlockCall, ModelCall, PatchState, Planned
from .closeness import Watch

# Levels of a U-Net, and those that something which shrinks the latent on the way may lead to
_LEVELS = (1, 2, 4, 8, 16, 32)
# Calls in a row that something else takes, after which no tokens are matched for it: more than cond and uncond
_PATIENCE = 3


@dataclass(frozen=True)
class LayerReport:
    """What the patch has done to one block so far."""

    name: str  # the block's name in the U-Net
    size: Grid | None  # (height, width) of its tokens in the last call; None before the first
    plan: LayerPlan | None  # the block's plan in the last call; None before the first, or where full attention stayed
    # number of self-attention calls by action: "agents", "merge", "pool", "corrected" … or "untouched". What
    # torch.compile made part of a graph is not counted.
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
        return plan_block(call.patch.config, layer.site.place, call.latent, call.part, size)

    def answer(
        self, layer: Layer, host: Call, planned: Planned, matching: Matching | None, watch: Watch | None = None
    ) -> Tensor:
        """Answer the call `host` of a block's self-attention, as `planned`. Where this raises, the host does.

        `matching` has the clusters of the block's tokens, if any; `watch` compares the answer with full attention.
        """
        attention, method = self.attention(layer, host, planned, matching), planned.plan.method
        attention.chosen = host.chosen
        return method.attend(attention) if watch is None else watch.attend(layer.site.name, method, attention)

    def attention(self, layer: Layer, host: Call, planned: Planned, matching: Matching | None) -> SelfAttention:
        """Describe a call of self-attention to its method; the arguments are those of `answer`."""
        what = host.x, planned.plan, planned.config, planned.size, layer.seam.attn.heads, matching
        how = layer.site.wrapped, layer.project, layer.project_q, layer.seam.project_out, host.proceed
        return SelfAttention(*what, *how)


class Image:
    """The module around some blocks, its layers, which sees their tokens as an image."""

    def __init__(self, patch: PatchState, module: nn.Module) -> None:
        self.patch, self.module = patch, module
        self.layers: list[Layer] = []
        self._plans: dict[Any, dict[Layer, Planned]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plans": {}}

    @followed
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the size of the tokens for this U-Net call; the module's pre-hook."""
        if not compiling():
            self.read(args, kwargs)
        elif self.patch.sized_outside or self.patch.stays_outside:
            self._read_outside_graph(args, kwargs)
        else:
            self._foresee(self.patch.read_size(args, kwargs))

    @not_compiled
    def _read_outside_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.read(args, kwargs)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the size of the tokens that the module's arguments tell."""
        try:
            size = self.patch.read_size(args, kwargs)
        except Exception as error:
            self.patch.note_error(error)
            size = None
        self.see(size)

    def see(self, size: tuple[int, int] | None) -> None:
        """Keep the size of the tokens for this U-Net call."""
        call = self.patch.call()
        if call is None:
            return
        size = None if size is None else Grid(*size)
        if self not in call.sizes or call.sizes[self] != size:  # the first, or another, part of the image
            call.sizes[self] = size
            call.plans.update(dict.fromkeys(self.layers, UNPLANNED) if size is None else self.planned(call, size))
            for layer in self.layers if call.blocks else ():
                call.blocks.pop(layer, None)
        if compiler_loaded():  # each block may be a graph by itself
            for layer in self.layers:
                layer.traced = call.plans[layer].name

    def _foresee(self, size: tuple[int, int] | None) -> None:
        """The same while the compiler traces."""
        key = None if size is None else self.patch.key
        # the length of a range is a number even where that of a tensor is a symbol
        sides = None if key is None else (len(range(size[0])), len(range(size[1])))
        for layer in self.layers:
            layer.traced = "" if sides is None else _foreseen(layer, key, *sides)

    def planned(self, call: ModelCall, size: Grid) -> dict[Layer, Planned]:
        """Plan the blocks for a U-Net call, in which they have `size` tokens."""
        if not call.active:
            return dict.fromkeys(self.layers, UNPLANNED)
        key = (call.part, call.latent, size)
        if key not in self._plans:
            try:
                plans = {layer: _planned(layer.answerer.plan(layer, call, size), size) for layer in self.layers}
            except Exception as error:
                self.patch.note_error(error)
                return dict.fromkeys(self.layers, UNPLANNED)
            self._plans[key] = plans
        return self._plans[key]


class Layer:
    """One patched block."""

    def __init__(self, patch: PatchState, answerer: Answerer, site: Site, image: Image) -> None:
        self.patch, self.answerer, self.site, self.image = patch, answerer, site, image
        image.layers.append(self)
        self.seam = site.seam()
        self.calls: Counter[str] = Counter()  # of self-attention, by action
        # Name of what is `Planned` here, as a compiled graph reads it: blocks of one plan share a graph. It is no part
        # of a `ModelCall`, which the compiler doesn't follow.
        self.traced = ""
        self._compiled: Any = None
        self._checked: Any = None
        self._vetoed = 0  # calls in a row that something else took
        ever = list(answerer.settings(patch.config, site))  # whatever is in force here at any time
        self.acts = any(settings.merge_attn or settings.merge_crossattn or settings.merge_mlp for settings in ever)
        self._merging = [
            (switch, part)
            for switch, part in (("merge_crossattn", "attn2"), ("merge_mlp", "ff"))
            if getattr(site.block, part, None) is not None and any(getattr(settings, switch) for settings in ever)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None, "_checked": None, "traced": ""}

    def install(self) -> Iterator[Any]:
        """Install the block's hooks, yielding each handle at once, so that none is lost if a later hook fails."""
        self.seam, self._vetoed = self.site.seam(), 0
        if not self.acts:
            return
        block = self.site.block
        if self.patch.outside:
            yield block.register_forward_pre_hook(self._begin_block, with_kwargs=True)
            yield block.register_forward_hook(self._end_block)
        for switch, part in self._merging:
            module = getattr(block, part)
            yield module.register_forward_pre_hook(partial(self._merge, switch), with_kwargs=True)
            yield module.register_forward_hook(partial(self._unmerge, switch), with_kwargs=True)
        # also where self-attention stays as it is: the compiler looks at hooks only where something else changes
        self.seam.install(self._attention, self._wants)

    def remove(self) -> None:
        """Undo what isn't undone by the handles."""
        self.seam.remove()
        self.traced = ""
        self._put_back()

    def set_aside(self) -> None:
        """Run a block that was compiled by itself uncompiled, while no graph can contain what is done in it."""
        if not self.patch.stays_outside:
            self._put_back()
        elif self.acts and (compiled := vars(self.site.block).pop("_compiled_call_impl", None)) is not None:
            self._compiled = compiled
            self.patch.say_once("compiled blocks run uncompiled while their tokens are matched or watched")

    def _put_back(self) -> None:
        if self._compiled is not None:
            self.site.block._compiled_call_impl, self._compiled = self._compiled, None

    def end_call(self, call: ModelCall) -> None:
        """Take stock of a U-Net call: where this block's self-attention did not come by, note who may have it."""
        block = call.blocks.get(self)
        if (block is not None and block.asked) or call.sizes.get(self.image) is None:
            return
        if getattr(self.site.block, "_compiled_call_impl", None) is None:
            if call.plans.get(self, UNPLANNED).name:
                self._vetoed += 1
                self.patch.note(self.seam.obstacle or "something else answers self-attention in its place")
            else:
                self._count(UNTOUCHED)

    def report(self) -> LayerReport:
        """Report what was done in the last U-Net call."""
        call = self.patch.last_call
        planned = getattr(_TRACED, self.traced, UNPLANNED) if call is None else call.plans.get(self, UNPLANNED)
        size = planned.size if call is None else call.sizes.get(self.image)
        return LayerReport(self.site.name, size, planned.plan, dict(self.calls))

    def _count(self, action: str) -> None:
        with COUNTING:
            self.calls[action] += 1

    def _current(self) -> BlockCall | None:
        """Return what the block does in the U-Net call that is going on."""
        call = self.patch.call()
        if call is None:
            return None
        block = call.blocks.get(self)
        if block is None:
            block = call.blocks[self] = BlockCall(call.plans.get(self, UNPLANNED))
        return block

    # Hooks on the block, where it may need clusters of its tokens

    @not_compiled
    def _begin_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.match(read_tokens(args, kwargs))

    def match(self, x: Any) -> None:
        """Match the block's tokens x (B, N, C), where its plan needs clusters."""
        call, block = self.patch.call(), self._current()
        if block is None:
            return
        block.matching = None
        config, plan, size = block.planned.config, block.planned.plan, block.planned.size
        r, agent_r = (0, 0) if plan is None else (merged_tokens(config, plan), plan.agent_r)
        unused = self._vetoed >= _PATIENCE and not self._merging
        if unused or not (r or agent_r):
            return
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != plan.tokens:
            self.patch.note("a block got tokens that do not form the grid of its layer", f"{size}")
            return
        try:
            block.matching = self._timed("clusters", partial(call.match, config, x, size, r, agent_r), None, x.device)
        except Exception as error:
            self._note_error(error)

    @not_compiled
    def _end_block(self, module: nn.Module, args: Any, output: Any) -> None:
        block = self._current()
        if block is not None and not torch.is_grad_enabled():  # gradient checkpointing may run the inside again
            block.matching = None

    # Self-attention

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens x to queries, keys and values."""
        attn, kv_context = self.seam.attn, self.patch.kv_context
        context_k, context_v = (x, x) if kv_context is None else kv_context(attn, x)
        return attn.to_q(x), attn.to_k(context_k), attn.to_v(context_v)

    def project_q(self, x: Tensor) -> Tensor:
        """Project tokens x to queries."""
        return self.seam.attn.to_q(x)

    def answer(self, host: Call) -> Tensor:
        """Answer a call of self-attention, as planned in the U-Net call that is going on."""
        host.wanted = self._wants()
        return self._attention(host) if host.wanted else host.proceed()

    @followed
    def _wants(self) -> BlockCall | bool | None:
        """Look whether a call of self-attention is answered: it isn't where the block is left alone."""
        if compiling():
            return self.traced != ""
        block = self._current()
        if block is None:
            return None
        block.asked = True
        if block.planned.name:
            return block
        self._count(UNTOUCHED)
        return None

    @followed
    def _attention(self, host: Call) -> Tensor:
        """Answer a call that is wanted."""
        block = host.wanted
        return self._attend_in_graph(host) if block is True else self._attend(host, block.planned, block.matching)

    def _attend_in_graph(self, host: Call) -> Tensor:
        """Attend while the compiler traces; it has to break its graph where something else than usual happens."""
        planned = getattr(_TRACED, self.traced)
        if self.patch.stays_outside or host.veto(planned.plan.tokens):
            return self._attend_outside_graph(host)
        try:
            return self.answerer.answer(self, host, planned, None)
        except Exception:  # again, where it is noted
            return self._attend_outside_graph(host)

    @not_compiled
    def _attend_outside_graph(self, host: Call) -> Tensor:
        call = self.patch.call()
        if call is not None and self.image in call.sizes:
            return self.answer(host)
        return self._attend(host, getattr(_TRACED, self.traced), None)

    def _attend(self, host: Call, planned: Planned, matching: Matching | None) -> Tensor:
        patch, plan = self.patch, planned.plan
        reason, shape = host.veto(plan.tokens), None if matching is None else matching.shape
        unmatched, self._vetoed = self._vetoed >= _PATIENCE, self._vetoed + 1 if reason else 0
        if not planned.clustered:
            matching = None
        elif not reason and self.answerer.clusters_first and shape != tuple(host.x.shape[:2]):
            reason = "self-attention got other tokens than the block was given"
            if unmatched:
                reason = "self-attention is plain again and its tokens are matched from the next call on"
        self._count(UNTOUCHED if reason else plan.action)
        if reason:
            patch.note(reason, f"{tuple(host.x.shape)} in a layer of {plan.tokens} tokens")
            return host.proceed()
        try:
            if self._checked is patch.finite and not patch.watched:  # nearly every call
                return self.answerer.answer(self, host, planned, matching)
            return self._attend_looked_at(host, planned, matching)
        except Exception as error:  # whatever went wrong, the host's own attention can still make the image
            self._note_error(error)
            return host.proceed()

    def _attend_looked_at(self, host: Call, planned: Planned, matching: Matching | None) -> Tensor:
        """Answer a call, and time, compare, tell of and check the answer where that is asked for."""
        patch, call = self.patch, self.patch.call()
        finite, watch = patch.finite, None if call is None else call.watch
        host.chosen = None if patch.observer is None else []
        answer = partial(self.answerer.answer, self, host, planned, matching, watch)
        out = self._timed("self-attention", answer, host.proceed, host.x.device)
        if patch.observer is not None and call is not None:
            told = self.site.name, planned.size, planned.plan, matching, call.latent, call.timestep, call, host.chosen
            try:
                patch.observer(Answer(*told))
            except Exception as error:
                self._note_error(error)
        self._checked = finite
        return finite.answer(self.site.name, out, host.proceed)

    def _timed(self, part: str, ours: Callable[[], Any], host: Callable[[], Any] | None, device: torch.device) -> Any:
        """Return what `ours` returns, timed beside the host's answer while the patch measures."""
        timing = self.patch.timing
        return ours() if timing is None else timing.time(self.site.name, part, ours, host, device)

    def _note_error(self, error: Exception) -> None:
        self.patch.note_error(error, self.site.name)

    # Hooks that merge tokens before cross-attention or the feed-forward layer, and unmerge them after it

    @not_compiled
    def _merge(self, switch: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block, x = self._current(), args[0] if args else None
        matching = None if block is None else block.matching
        if matching is None or matching.merged is None or not getattr(block.planned.config, switch):
            return None
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != matching.shape:
            return None
        try:
            merged = matching.merged.merge(x)
        except Exception as error:  # too little memory, say
            self._note_error(error)
            return None
        block.merged = {**(block.merged or {}), switch: (matching.merged, x)}
        return (merged, *args[1:]), kwargs

    @not_compiled
    def _unmerge(
        self, switch: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        block = self._current()
        merged = {} if block is None else block.merged or {}
        clusters, x = merged.pop(switch, (None, None))
        if clusters is None:
            return None
        if self.patch.timing is None:
            return clusters.unmerge(output)

        def host() -> Tensor:
            return module.forward(x, *args[1:], **kwargs)

        def ours() -> Tensor:
            return clusters.unmerge(module.forward(clusters.merge(x), *args[1:], **kwargs))

        return self._timed(switch, ours, host, x.device)


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
    """Name what is planned for a block of height × width tokens; `key` as in `PatchState`."""
    *latent, part = key.split()
    call = ModelCall(layer.patch, Grid(*map(int, latent)), part=None if part == "None" else float(part))
    return layer.image.planned(call, Grid(height, width))[layer].name
