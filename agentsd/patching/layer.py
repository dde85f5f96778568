"""One patched block: what is done in its self-attention now, in a graph or outside, and what the host keeps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Matching
from ..config import AgentConfig
from ..eager import compiler_loaded, compiling, followed, not_compiled
from ..hosts import Call, Site, read_tokens
from ..methods import UNTOUCHED, LayerPlan, SelfAttention
from ..plan import deepest_level, merged_tokens, plan_block
from .call import UNPLANNED, Answer, ModelCall, Planned
from .closeness import Watch

if TYPE_CHECKING:
    from .patch import Patch

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
    """Plans the blocks of a patch and answers their self-attention. `Patch` takes a subclass that does it otherwise."""

    # whether it only tries what it plans, beside the host's attention: outside of graphs, with clusters of its own
    tries = False

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

    def __init__(self, patch: Patch, module: nn.Module) -> None:
        self.patch, self.module = patch, module
        self.layers: list[Layer] = []
        self.looks = False  # whether it is looked at; not where no layer ever acts
        self._plans: dict[Any, dict[Layer, Planned]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plans": {}}

    @followed
    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the blocks for tokens of the size that the module's arguments tell; its pre-hook."""
        if not compiling():
            self.read(args, kwargs)
        elif self.patch.sized_outside or self.patch.stays_outside:
            self._read_outside_graph(args, kwargs)
        else:
            size, key = self.patch.read_size(args, kwargs), self.patch.key
            # the length of a range is a number even where that of a tensor is a symbol
            sides = None if size is None or key is None else (len(range(size[0])), len(range(size[1])))
            for layer in self.layers:
                layer.traced = "" if sides is None else _foreseen(layer, key, *sides)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the blocks for tokens of the size that the module's arguments tell."""
        try:
            size = self.patch.read_size(args, kwargs)
        except Exception as error:
            self.patch.note_error(error)
            size = None
        self.see(size)

    _read_outside_graph = not_compiled(read)

    def see(self, size: tuple[int, int] | None) -> None:
        """Plan the blocks for (height, width) tokens in the U-Net call that is going on."""
        call = self.patch.call()
        if call is None or not self.looks:
            return
        before = call.plans.get(self.layers[0])
        if before is None or before.size != size:  # the first, or another, part of the image
            call.plans.update(self.planned(call, size and Grid(*size)))
        if compiler_loaded():  # each block may be a graph by itself
            for layer in self.layers:
                layer.traced = call.plans[layer].name

    def planned(self, call: ModelCall, size: Grid | None) -> dict[Layer, Planned]:
        """Plan the blocks for a U-Net call, in which they have `size` tokens."""
        key = call.part, call.latent, size
        if call.active and size is not None and key not in self._plans:
            try:
                plans = {layer: _planned(layer.answerer.plan(layer, call, size), size) for layer in self.layers}
                self._plans[key] = plans
            except Exception as error:
                self.patch.note_error(error)
        found = self._plans.get(key) if call.active else None
        return found or dict.fromkeys(self.layers, Planned(size=size))


class Layer:
    """One patched block."""

    def __init__(self, patch: Patch, answerer: Answerer, site: Site, image: Image) -> None:
        self.patch, self.answerer, self.site, self.image = patch, answerer, site, image
        image.layers.append(self)
        self.seam = site.seam()
        self.calls: Counter[str] = Counter()  # of self-attention, by action
        # Name of what is `Planned` here, as a compiled graph reads it: blocks of one plan share a graph. It is no part
        # of a `ModelCall`, which the compiler doesn't follow.
        self.traced = ""
        self._vetoed = 0  # calls in a row that something else took
        ever = list(answerer.settings(patch.config, site))  # whatever is in force here at any time
        parts = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}
        on = {part: switch for switch, part in parts.items() if any(getattr(settings, switch) for settings in ever)}
        self.acts = bool(on)
        modules = ((switch, getattr(site.block, part, None)) for part, switch in on.items() if part != "attn1")
        self._merging = [(switch, module) for switch, module in modules if module is not None]

    def install(self) -> Iterator[Any]:
        """Install the block's hooks, yielding each handle at once, so that none is lost if a later hook fails."""
        self.seam, self._vetoed = self.site.seam(), 0
        block = self.site.block
        if self.patch.outside:
            yield block.register_forward_pre_hook(self._begin_block, with_kwargs=True)
            yield block.register_forward_hook(self._end_block)
        for switch, module in self._merging:
            yield module.register_forward_pre_hook(partial(self._merge, switch), with_kwargs=True)
            yield module.register_forward_hook(partial(self._unmerge, switch), with_kwargs=True)
        # also where self-attention stays as it is: the compiler looks at hooks only where something else changes
        self.seam.install(self._attention, self._wants)

    def remove(self) -> None:
        """Undo what isn't undone by the handles."""
        self.seam.remove()
        self.traced = ""

    def stayed(self, call: ModelCall) -> bool:
        """Whether this block, whose self-attention did not come by in a call, was to be left alone; if not, note it."""
        if getattr(self.site.block, "_compiled_call_impl", None) is not None:
            return False
        if not self.image.looks:  # not looked at; the first image tells whether the call came that far
            return bool(call.plans)
        planned = call.plans.get(self, UNPLANNED)
        if planned.size is None:
            return False
        if planned.name:
            self._vetoed += 1
            self.patch.note(self.seam.obstacle or "something else answers self-attention in its place")
        return not planned.name

    def report(self) -> LayerReport:
        """Report what was done in the last U-Net call."""
        call, level, planned = self.patch.last_call, self.site.downsample, UNPLANNED
        if call is None:
            planned = getattr(_TRACED, self.traced, UNPLANNED)
        elif self.image.looks:
            planned = call.plans.get(self, UNPLANNED)
        elif call.latent is not None and level is not None:
            planned = self.image.planned(call, call.latent.at(level))[self]
        return LayerReport(self.site.name, planned.size, planned.plan, dict(self.calls))

    # Hooks on the block, where it may need clusters of its tokens

    @not_compiled
    def _begin_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.match(read_tokens(args, kwargs))

    def match(self, x: Any) -> None:
        """Match the block's tokens x (B, N, C), where its plan needs clusters."""
        call = self.patch.call()
        if call is None:
            return
        call.matchings.pop(self, None)
        config, plan, size, *_ = call.plans.get(self, UNPLANNED)
        r, agent_r = (0, 0) if plan is None else (merged_tokens(config, plan), plan.agent_r)
        if not (r or agent_r) or (self._vetoed >= _PATIENCE and not self._merging):
            return
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != plan.tokens:
            self.patch.note("a block got tokens that do not form the grid of its layer", f"{size}")
            return
        match = partial(call.match, config, x, size, r, agent_r)
        try:
            call.matchings[self] = self._timed("clusters", match, None, x.device)
        except Exception as error:
            self.patch.note_error(error, self.site.name)

    @not_compiled
    def _end_block(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.patch.call()
        if call is not None and not torch.is_grad_enabled():  # gradient checkpointing may run the inside again
            call.matchings.pop(self, None)

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
    def _wants(self) -> ModelCall | bool | None:
        """Look whether a call of self-attention is answered: it isn't where the block is left alone."""
        if compiling():
            return self.traced != ""
        call = self.patch.call()
        if call is None or call.plans.get(self, UNPLANNED).name:
            return call
        call.answered.append((self, UNTOUCHED))
        return None

    @followed
    def _attention(self, host: Call) -> Tensor:
        """Answer a call that is wanted."""
        call = host.wanted
        if call is not True:
            return self._attend(host, call.plans[self], call)
        # while the compiler traces: its graph has to break where something else than usual happens
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
        if call is not None and self in call.plans:
            return self.answer(host)
        return self._attend(host, getattr(_TRACED, self.traced), None)

    def _attend(self, host: Call, planned: Planned, call: ModelCall | None) -> Tensor:
        patch, plan, matching = self.patch, planned.plan, None
        reason = host.veto(plan.tokens)
        unmatched, self._vetoed = self._vetoed >= _PATIENCE, self._vetoed + 1 if reason else 0
        if planned.clustered and call is not None and not reason:
            matching = call.matchings.get(self)
            missing = matching is None or matching.shape != tuple(host.x.shape[:2])
            if missing and not self.answerer.tries:
                again = "self-attention is plain again and its tokens are matched from the next call on"
                reason = again if unmatched else "self-attention got other tokens than the block was given"
        if call is not None:
            call.answered.append((self, UNTOUCHED if reason else plan.action))
        if reason:
            patch.note(reason, f"{tuple(host.x.shape)} in a layer of {plan.tokens} tokens")
            return host.proceed()
        try:
            watch = None if call is None else call.watch
            seen = self in patch.finite.answered and patch.timing is None
            if seen and watch is None and patch.observer is None:  # nearly every call
                return self.answerer.answer(self, host, planned, matching)
            host.chosen = None if patch.observer is None else []
            answer = partial(self.answerer.answer, self, host, planned, matching, watch)
            out = self._timed("self-attention", answer, host.proceed, host.x.device)
            if patch.observer is not None and call is not None:
                try:
                    patch.observer(Answer(self.site.name, planned.size, plan, matching, call, host.chosen))
                except Exception as error:
                    self.patch.note_error(error, self.site.name)
            return patch.finite.answer(self, out, host.proceed)
        except Exception as error:  # whatever went wrong, the host's own attention can still make the image
            self.patch.note_error(error, self.site.name)
            return host.proceed()

    def _timed(self, part: str, ours: Callable[[], Any], host: Callable[[], Any] | None, device: torch.device) -> Any:
        """Return what `ours` returns, timed beside the host's answer while the patch measures."""
        timing = self.patch.timing
        return ours() if timing is None else timing.time(self.site.name, part, ours, host, device)

    # Hooks that merge tokens before cross-attention or the feed-forward layer, and unmerge them after it

    @not_compiled
    def _merge(self, switch: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, x = self.patch.call(), args[0] if args else None
        matching = None if call is None else call.matchings.get(self)
        if matching is None or matching.merged is None or not getattr(call.plans[self].config, switch):
            return None
        if not isinstance(x, Tensor) or x.shape[:-1] != matching.shape:
            return None
        try:
            merged = matching.merged.merge(x)
        except Exception as error:  # too little memory, say
            self.patch.note_error(error, self.site.name)
            return None
        call.merged[self, switch] = matching.merged, x
        return (merged, *args[1:]), kwargs

    @not_compiled
    def _unmerge(
        self, switch: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        call = self.patch.call()
        clusters, x = (None, None) if call is None else call.merged.pop((self, switch), (None, None))
        if clusters is None or self.patch.timing is None:
            return None if clusters is None else clusters.unmerge(output)

        def host(x: Tensor = x) -> Tensor:
            return module.forward(x, *args[1:], **kwargs)

        return self._timed(switch, lambda: clusters.unmerge(host(clusters.merge(x))), host, x.device)


# What is planned, by its name: attributes, which the compiler follows and which never change
_TRACED = SimpleNamespace()


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


def _foreseen(layer: Layer, key: str, height: int, width: int) -> str:
    """Name what is planned for a block of height × width tokens; `key` as in `Patch`."""
    *latent, part = key.split()
    call = ModelCall(layer.patch, Grid(*map(int, latent)), part=None if part == "None" else float(part))
    return layer.image.planned(call, Grid(height, width))[layer].name


# as by `torch.compiler.assume_constant_result`, which loads the compiler
_foreseen._dynamo_marked_constant = True  # type: ignore[attr-defined]
