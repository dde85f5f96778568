"""Agent attention on one clone of a ComfyUI model.

ComfyUI lets a clone (`ModelPatcher`) answer self-attention in place of its blocks: a function that is given projected
queries, keys and values. No module is touched, so nothing reaches another branch of the graph, and a model that has not
passed through a node is as if there were none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..config import AgentConfig
from ..eager import not_compiled
from ..hosts import Call, Site, find_unet
from ..merging import Matching
from ..methods import LayerPlan, SelfAttention
from ..panel.report import PassReport
from ..patch import Image, Layer, Patch
from ..plan import plan_block
from ..tensors import attention_by, join_heads, split_heads

log = logging.getLogger("agentsd.comfy")

# Name of our entries in a clone's options
KEY = "agent_attention"
_WRAPPERS = ("diffusion_model", "outer_sample")  # comfy.patcher_extension.WrappersMP
# The library's name of a block: part of the U-Net, number there, number of the block in its transformer
_NAME = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d+)?\.transformer_blocks\.(\d+)")

# Where ComfyUI says it is: ("input", 4), and the number of the block in its transformer
Position = tuple[tuple[str, int], int]


class SamplingReport(PassReport):
    """Report of one sampling; a graph may have any number of them."""

    name = "sampling"


def attach(model: Any, config: AgentConfig, since: float = 0.0) -> Any:
    """Put agent attention on a clone of a model, instead of what an earlier node has put on it.

    Args:
        model: a ModelPatcher of ComfyUI.
        config: the settings.
        since: where the agents begin, for the report.

    Returns:
        The clone.

    Raises:
        UnsupportedModelError: the model is no U-Net with transformer blocks.
    """
    clone = model.clone()
    patch = ClonePatch(find_unet(clone.model), config, since)  # may raise, before anything has been changed

    # Closures, because clone() copies the options deeply: objects and their methods would be copied with all they hold
    def attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        return patch.answer(q, k, v, options)

    def unet_call(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patch.begin_unet_call(args, kwargs)
        output = executor(*args, **kwargs)
        patch.end_call()
        return output

    def sampling(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patch.begin_sampling()
        try:
            return executor(*args, **kwargs)
        finally:
            patch.end_sampling()

    attention.patch = patch
    options = clone.model_options["transformer_options"]
    replaced = options.get("patches_replace", {}).get("attn1", {})
    for block in patch.blocks():
        # what another node has put there stays; a report says so
        if block not in replaced or _patch_behind(replaced[block]) is not None:
            clone.set_model_attn1_replace(attention, *block)
    # In the options rather than by add_wrapper_with_key: a clone with other wrappers counts as one with other weights,
    # and the host would load the model again whenever it changes from one branch of the graph to the other.
    wrappers = clone.model_options["transformer_options"].setdefault("wrappers", {})
    for kind, wrapper in zip(_WRAPPERS, (unet_call, sampling), strict=True):
        wrappers.setdefault(kind, {})[KEY] = [wrapper]
    return clone


def patch_of(model: Any) -> ClonePatch | None:
    """Return the patch on a model of ComfyUI, if any."""
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    return next(filter(None, map(_patch_behind, replaced.values())), None)


def report_on(model: Any) -> str:
    """Describe what was done in the last sampling with a model of ComfyUI."""
    patch = patch_of(model)
    if patch is None:
        return (
            "Agent Attention is off: this model has not passed through one of its nodes, or others answer everywhere."
        )
    if patch.last is None:
        return "Agent Attention is on. Nothing was sampled with this model yet."
    notes = [f"left to the host: {reason} ({n} calls)" for reason, n in patch.last.notes.items()]
    return "\n".join([patch.last.sentence(), *notes])


def _patch_behind(function: Any) -> ClonePatch | None:
    return getattr(function, "patch", None) if isinstance(getattr(function, "patch", None), ClonePatch) else None


class ClonePatch(Patch):
    """A patch whose attention is called by the host: no hooks, and nothing to remove.

    Attributes:
        last: report of the last sampling; None before it has ended.
    """

    def __init__(self, unet: nn.Module, config: AgentConfig, since: float = 0.0) -> None:
        self._said: set[str] = set()
        super().__init__(unet, config)
        self.since = since
        self.last: SamplingReport | None = None
        positions = {_position(layer.site.name): layer for layer in self._layers}
        self._at: dict[Position, _CloneLayer] = {p: layer for p, layer in positions.items() if p is not None}

    def _layer(self, site: Site, image: Image) -> _CloneLayer:
        return _CloneLayer(self, site, Image(self, image.module))  # each call tells its own size

    def blocks(self) -> list[tuple[str, int]]:
        """List the parts of the U-Net that have transformer blocks, by the host's names."""
        return list(dict.fromkeys(block for block, _ in self._at))

    def note(self, reason: str) -> None:
        if reason in self._said:  # in an earlier sampling, perhaps
            self.notes[reason] += 1
        else:
            self._said.add(reason)
            super().note(reason)

    def begin_sampling(self) -> None:
        """Start the counts of a report."""
        self.notes.clear()
        self._note_idle_rules()
        for layer in self._layers:
            layer.calls.clear()

    def end_sampling(self) -> None:
        """Make the report."""
        self.last = SamplingReport(hires=False)
        self.last.add(self, self.since)
        log.info("Agent Attention: %s", self.last.sentence())
        self.begin_unet_call((), {})  # without a latent: whoever asks outside of a sampling gets full attention

    def begin_unet_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read the latent's size and the timestep off a call of the U-Net."""
        self.begin_call(self._unet(), args, kwargs)

    def end_call(self) -> None:
        """Note the blocks where somebody else has answered in our place."""
        for layer in self._at.values():
            layer.note_if_not_asked()

    @not_compiled
    def answer(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Answer the self-attention of a block, from its queries, keys and values (B, N, C) and the host's options."""
        call = _ProjectedCall(q, k, v, options)
        layer = self._at.get((options["block"], options["block_index"]))
        return call.proceed() if layer is None else layer.answer(call)


def _position(name: str) -> Position | None:
    found = _NAME.search(name)
    if found is None:
        return None
    part, number, index = found.groups()
    # the host counts one middle, the library numbers the modules inside it
    return (part, 0 if part == "middle" else int(number)), int(index)


@dataclass
class _ProjectedCall(Call):
    """A call that the host has made the projections of.

    The keys stand for the tokens, which are not known here: what similar tokens are, token merging decides by them too
    (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any]

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options
        extras = {}
        if not q.shape == k.shape == v.shape:
            extras = {f"{q.shape[1]} queries for {k.shape[1]} keys, as by token merging or HyperTile": True}
        super().__init__(k, None, None, extras, partial(_attention, q, k, v, options["n_heads"], options))

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention of (B, H, N, d) by what the user chose in the host."""
        heads = q.shape[1]
        return split_heads(_attention(*map(join_heads, (q, k, v)), heads, self.options), heads)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Mapping[str, Any]) -> Tensor:
    """The host's own attention of (B, N, C), just as its blocks call it: with the override in the options, if any."""
    from comfy.ldm.modules import attention

    precision = options.get("attn_precision")
    return attention.optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)


class _CloneLayer(Layer):
    def answer(self, call: _ProjectedCall) -> Tensor:
        """Answer the block's self-attention."""
        self.image.see(tuple(call.options["activations_shape"][-2:]))
        self.match(call.k)
        output = self._attention(call) if self._wants() else call.proceed()
        self.matching = None
        return output

    def note_if_not_asked(self) -> None:
        moment = self.patch.moment
        if self.asked is moment or not moment.active:
            return
        planned = plan_block(self.patch.config, self.site.place, moment.latent, moment.part)
        if planned is not None and planned[1].acts:
            self.patch.note("another node answers self-attention in its place")

    def _attend(self, call: _ProjectedCall) -> Tensor:
        if self.config.attn_precision is not None:
            return super()._attend(call)  # which the host's kernel may not honour
        with attention_by(call.kernel):
            return super()._attend(call)

    def _for_method(
        self,
        call: _ProjectedCall,
        config: AgentConfig,
        plan: LayerPlan,
        size: tuple[int, int],
        matching: Matching | None = None,
    ) -> SelfAttention:
        return SelfAttention(
            x=call.x,
            plan=plan,
            settings=config,
            size=size,
            heads=call.options["n_heads"],
            matching=matching,
            wrapped=True,  # all tokens are projected already
            project=lambda x: (call.q, call.k, call.v),
            project_q=lambda x: call.q,
            project_out=lambda x: x,  # the host's, afterwards
            proceed=call.proceed,
        )
