"""Agent attention on one clone of a ComfyUI model.

ComfyUI lets a clone (`ModelPatcher`) answer self-attention in place of its blocks: a function that is given projected
queries, keys and values. No module is touched, so nothing reaches another branch of the graph, and a model that has not
passed through a node is as if there were none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..app.last_run import PassReport
from ..attention.merging import Matching
from ..attention.tensors import Kernel, attention_by, join_heads, split_heads
from ..config import AgentConfig
from ..eager import not_compiled
from ..hosts import Call, find_unet
from ..methods import SelfAttention
from ..patching.call import Planned
from ..patching.closeness import Watch
from ..patching.finite import FiniteCheck
from ..patching.layer import Answerer, Layer
from ..patching.patch import Patch
from ..plan import plan_block
from ..words import ascii_of

log = logging.getLogger("agentsd.comfy")

# Name of our entries in a clone's options
KEY = "agent_attention"
_WRAPPERS = ("diffusion_model", "sampler_sample")  # comfy.patcher_extension.WrappersMP
# The library's name of a block: part of the U-Net, number there, number of the block in its transformer
_NAME = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d+)?\.transformer_blocks\.(\d+)")

# Where ComfyUI says it is: ("input", 4), and the number of the block in its transformer
Position = tuple[tuple[str, int], int]


class Slot:
    """What answers for a clone, and for the clones made of it.

    Attributes:
        patch: the patch in force.
        hints: what its node has to say about its inputs.
    """

    def __init__(self, patch: ClonePatch, hints: Sequence[str] = ()) -> None:
        self.patch, self.hints = patch, hints

    def sample(self, executor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a sampling of the host; by then it has loaded the model, with what other nodes do to its weights."""
        self.patch.begin_sampling()
        try:
            return executor(*args, **kwargs)
        finally:
            self.patch.end_sampling()  # which may be another one by then

    def begin_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for a call of the U-Net."""
        self.patch.begin_call(unet, args, kwargs)
        self.patch.sampled.see(self.patch.last_call.latent)

    def describe(self) -> str:
        """Describe the last sampling."""
        report = self.patch.last
        if report is None:
            return "Agent Attention is on. Nothing was sampled with this model yet."
        return "\n".join([str(report.line()), *self.hints])


def attach(model: Any, config: AgentConfig, since: float = 0.0, hints: Sequence[str] = ()) -> Any:
    """Put agent attention on a clone of a model, instead of what an earlier node has put on it.

    Args:
        model: a ModelPatcher of ComfyUI.
        config: the settings.
        since: where the agents begin, for the report.
        hints: what else to say in reports.

    Returns:
        The clone.

    Raises:
        UnsupportedModelError: the model is no U-Net with transformer blocks.
    """
    return attach_slot(model, lambda unet: Slot(ClonePatch(unet, config, since), hints))


def attach_slot(model: Any, make: Callable[[nn.Module], Slot]) -> Any:
    """As `attach`, with the slot that `make` makes for the model's U-Net."""
    clone = model.clone()
    unet = find_unet(clone.model)  # may raise, before anything has been changed
    slot = make(unet)

    # Closures, because clone() copies the options deeply: objects and their methods would be copied with all they hold
    def attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        return slot.patch.answer(q, k, v, options)

    def unet_call(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        slot.begin_call(unet, args, kwargs)
        try:
            output = executor(*args, **kwargs)
        except BaseException:
            slot.patch.end()
            raise
        slot.patch.end_call()
        return output

    def sampling(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return slot.sample(executor, args, kwargs)

    attention.slot = slot
    replaced = _replaced(clone)
    for block in slot.patch.blocks():
        # what another node has put there stays; a report says so
        if block not in replaced or is_ours(replaced[block]):
            clone.set_model_attn1_replace(attention, *block)
    # In the options rather than by add_wrapper_with_key: a clone with other wrappers counts as one with other weights,
    # and the host would load the model again whenever it changes from one branch of the graph to the other.
    wrappers = clone.model_options["transformer_options"].setdefault("wrappers", {})
    for kind, wrapper in zip(_WRAPPERS, (unet_call, sampling), strict=True):
        wrappers.setdefault(kind, {})[KEY] = [wrapper]
    return clone


def _replaced(model: Any) -> Mapping[Any, Any]:
    """Who answers self-attention, by block."""
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})


def is_ours(function: Any) -> bool:
    """Whether a function among the host's options is one of `attach`."""
    return isinstance(getattr(function, "slot", None), Slot)


def slot_of(model: Any) -> Slot | None:
    """Return what answers for a model of ComfyUI; None if we have no part in it."""
    return next((function.slot for function in _replaced(model).values() if is_ours(function)), None)


def patch_of(model: Any) -> ClonePatch | None:
    """Return the patch in force on a model of ComfyUI, if any."""
    slot = slot_of(model)
    return None if slot is None else slot.patch


def report_on(model: Any) -> str:
    """Describe what was done in the last sampling with a model of ComfyUI."""
    slot = slot_of(model)
    if slot is None:
        return "Agent Attention is off: this model has not passed through its node, or other nodes answer everywhere."
    return slot.describe()


class ClonePatch(Patch):
    """A patch whose attention is called by the host: no hooks, and nothing to remove.

    Attributes:
        last: report of the last sampling; None before it has ended.
    """

    def __init__(self, unet: nn.Module, config: AgentConfig, since: float = 0.0, outcome: str = "") -> None:
        super().__init__(unet, config, answerer=_CloneAnswerer())
        self.active, self.since, self.outcome = True, since, outcome
        self.last: PassReport | None = None
        self.sampled = PassReport(name="sampling")
        positions = {_position(layer.site.name): layer for layer in self._layers}
        self._at: dict[Position, Layer] = {p: layer for p, layer in positions.items() if p is not None}

    def blocks(self) -> list[tuple[str, int]]:
        """List the parts of the U-Net that have transformer blocks, by the host's names."""
        return list(dict.fromkeys(block for block, _ in self._at))

    def begin_sampling(self) -> None:
        """Start the counts of a report."""
        self.notes.clear()
        self.sampled = PassReport(name="sampling", tuned=self.outcome)
        self.finite = FiniteCheck()
        self._note_idle_rules()
        for layer in self._layers:
            layer.calls.clear()

    def end_sampling(self) -> None:
        """Make the report."""
        self.last = self.sampled
        self.last.add(self, self.since)
        log.info("Agent Attention: %s", ascii_of(self.last.line().to_dict()["text"]))

    def end_call(self) -> None:
        """Note the blocks where somebody else has answered in our place."""
        call = self.call()
        for layer in self._at.values() if call is not None and call.active else ():
            # a block that was not asked has not told its size
            planned = plan_block(self.config, layer.site.place, call.latent, call.part)
            if layer.image not in call.sizes and planned is not None and planned[1].acts:
                self.note("another node answers self-attention in its place")
        super().end_call()

    @not_compiled
    def answer(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Answer the self-attention of a block, from its queries, keys and values (B, N, C) and the host's options."""
        call = _ProjectedCall(q, k, v, options)
        layer = self._at.get((options["block"], options["block_index"]))
        if layer is None or self.call() is None:  # nobody patches outside of a sampling
            return call.proceed()
        layer.image.see(tuple(options["activations_shape"][-2:]))
        layer.match(k)
        return layer.answer(call)


def _position(name: str) -> Position | None:
    found = _NAME.search(name)
    if found is None:
        return None
    part, number, index = found.groups()
    # the host counts one middle, the library numbers the modules inside it
    return (part, 0 if part == "middle" else int(number)), int(index)


class _ProjectedCall(Call):
    """A call that the host has made the projections of.

    The keys stand for the tokens, which are not known here. Token merging was first done by them (Bolya et al., "Token
    Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options
        extras = {}
        if not q.shape == k.shape == v.shape:
            extras = {f"{q.shape[1]} queries for {k.shape[1]} keys, as by token merging or HyperTile": True}
        super().__init__(k, None, None, extras, partial(_attention, q, k, v, options["n_heads"], options))


def kernel_of(options: Mapping[str, Any]) -> Kernel:
    """Return what the user chose in the host to compute attention by."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        return split_heads(_attention(*map(join_heads, (q, k, v)), heads, options), heads)

    return kernel


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Mapping[str, Any]) -> Tensor:
    """The host's own attention of (B, N, C), just as its blocks call it: with the override in the options, if any."""
    from comfy.ldm.modules.attention import optimized_attention

    precision = options.get("attn_precision")
    return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)


class _CloneAnswerer(Answerer):
    """Answers from the projections that the host has made, with the kernel that the user chose there."""

    def answer(
        self,
        layer: Layer,
        host: _ProjectedCall,
        planned: Planned,
        matching: Matching | None,
        watch: Watch | None = None,
    ) -> Tensor:
        if planned.config.attn_precision is not None:  # which the host's kernel may not honour
            return super().answer(layer, host, planned, matching, watch)
        with attention_by(kernel_of(host.options)):
            return super().answer(layer, host, planned, matching, watch)

    def attention(
        self, layer: Layer, host: _ProjectedCall, planned: Planned, matching: Matching | None
    ) -> SelfAttention:
        return SelfAttention(
            x=host.x,
            plan=planned.plan,
            settings=planned.config,
            size=planned.size,
            heads=host.options["n_heads"],
            matching=matching,
            wrapped=lambda: True,  # all tokens are projected already
            project=lambda x: (host.q, host.k, host.v),
            project_q=lambda x: host.q,
            project_out=lambda x: x,  # the host's, afterwards
            proceed=host.proceed,
        )
