"""Agent attention on one clone of a ComfyUI model.

ComfyUI lets a clone (`ModelPatcher`) answer self-attention in place of its blocks: a function that is given projected
queries, keys and values. No module is touched, so nothing reaches another branch of the graph, and a model that has not
passed through a node is as if there were none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..app.decision import Decision, Hint, Program, SamplingPass, decide
from ..app.kept_tunings import Kept
from ..app.last_run import PassReport
from ..app.preview import Line
from ..attention.merging import Matching
from ..attention.tensors import Kernel, attention_by, join_heads, split_heads
from ..config import AgentConfig
from ..eager import not_compiled
from ..hosts import Call, find_unet, read_size
from ..methods import SelfAttention
from ..patching.call import Planned
from ..patching.layer import Answerer, Layer
from ..patching.patch import Patch
from ..schedule import Timesteps
from ..settings import to_config
from ..settings.tunings import FIRST
from ..tuning.result import Tuning
from ..words import ascii_of, error_of_ours

log = logging.getLogger("agentsd.comfy")

KEY, OPTIONS = "agent_attention", "transformer_options"
NOT_CALLED = "another node calls the U-Net's blocks itself, or skips the U-Net"
OFF = "Agent Attention is off: this model has not passed through its node, or other nodes answer everywhere."
MERGED = " Of merged models, only the first keeps its nodes: put ours behind the merge."
# The library's name of a block: part of the U-Net, number there, number of the block in its transformer
_NAME = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d+)?\.transformer_blocks\.(\d+)")


class Slot(Program):
    """What answers for a clone and for the clones made of it; `hints` are what its node has to say on its inputs."""

    def __init__(self, unet: nn.Module, values: Mapping[str, Any], hints: Sequence[str] = ()) -> None:
        self._unet, self.values, self.hints = unet, values, hints
        self.patch = ClonePatch(unet, to_config(values))
        self.tuning: Tuning | None = None  # the one to use
        self.last = PassReport(name="sampling")  # that goes on, or else the last one
        self._sampling: Any = None  # size and steps of it; None before the first

    def __deepcopy__(self, memo: Any) -> Slot:
        return self  # a clone of the clone has a copy of its options, and so of our methods

    def unet(self) -> nn.Module:
        return self._unet

    def kept(self, sampling: SamplingPass) -> Kept | None:
        return None if self.tuning is None else Kept("", FIRST, self.tuning)

    @property
    def acts(self) -> bool:
        """Whether anything may be changed in this sampling."""
        return self.last.made is None or self.last.made.patches

    def sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a sampling of the host; by then it has loaded the model, with what other nodes do to its weights."""
        self.last, self._sampling = PassReport(name="sampling"), _sampling(args)
        self.patch.restart_report()
        try:
            return executor(*args, **kwargs)
        finally:
            if self.acts:
                self.last.add(self.patch, None if self.tuning else self.values["since"])
            log.info("Agent Attention: %s", ascii_of(self.last.line().to_dict()["text"]))

    def call(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer in a call of the U-Net; what is done is decided at the first one of a sampling."""
        size = read_size(args, kwargs)
        if self.last.made is None and size is not None:
            latent, moments = self._sampling or (None, None)
            sampling = SamplingPass(latent or size, FIRST, moments)
            try:
                self.last.made = made = self.decide(sampling, args, kwargs)
                if made.patches and made.config != self.patch.config:
                    self.patch = ClonePatch(self._unet, made.config)
            except Exception as error:  # an error of ours costs no image
                log.debug("nothing could be decided", exc_info=True)
                self.last.made = Decision(sampling, reason=Hint(error_of_ours(error)), refused=True)
        self.last.see(size)
        if not self.acts:
            return executor(*args, **kwargs)
        self.patch.begin_call(self._unet, args, kwargs)
        try:
            output = executor(*args, **kwargs)
        except BaseException:
            self.patch.end()
            raise
        self.patch.end_call()
        return output

    def decide(self, sampling: SamplingPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Decision:
        """Decide what is done in a sampling, given the arguments of its first U-Net call."""
        return decide(self.values, sampling, len(args[0]), self)

    @not_compiled
    def answer(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Answer the self-attention of a block, from its queries, keys and values (B, N, C) and the host's options."""
        call, called = _ProjectedCall(q, k, v, options), self.patch.call() is not None
        if self.acts and not called:
            self.patch.note(NOT_CALLED)
        layer = self.patch.at.get((options.get("block"), options.get("block_index")))
        if layer is None or not layer.acts or not called or "activations_shape" not in options:
            return call.proceed()
        layer.image.see(tuple(options["activations_shape"][-2:]))
        layer.match(k)
        return layer.answer(call)

    def describe(self, word: Callable[[Line], str]) -> str:
        """Describe the last sampling; `word` words a line of a report."""
        if self._sampling is None:
            return "Agent Attention is on. Nothing was sampled with this model yet."
        return "\n".join([word(self.last.line()), *self.hints])


def _sampling(args: tuple[Any, ...]) -> tuple[tuple[int, int] | None, tuple[float, ...] | None]:
    """Return (height, width) of the latent that is sampled, and the progress at each step; None where not known."""
    try:
        guider, sigmas, _, _, noise, *_ = args
        timesteps = guider.model_patcher.model.model_sampling.timestep(sigmas[:-1]).tolist()
        moments = tuple(map(Timesteps().progress, timesteps))
        return tuple(noise.shape[-2:]), None if None in moments else moments
    except Exception:  # another version of the host
        log.debug("the steps of a sampling are not known", exc_info=True)
        return None, None


def attach(model: Any, make: Callable[[nn.Module], Slot]) -> Any:
    """Return a clone of a ModelPatcher with a slot, instead of an earlier node's; raises as `find_unet`."""
    clone = model.clone()
    slot = make(find_unet(clone.model))  # may raise, before anything has been changed
    replaced = _replaced(clone)
    for block in dict.fromkeys(block for block, _ in slot.patch.at):
        # what another node has put there stays; a report says so
        if block not in replaced or is_ours(replaced[block]):
            clone.set_model_attn1_replace(slot.answer, *block)
    return wrapped(clone, diffusion_model=slot.call, sampler_sample=slot.sample)


def wrapped(clone: Any, **by_kind: Callable[..., Any]) -> Any:
    """Wrap parts of a clone, by the names in the host's WrappersMP; return it.

    In the options rather than by add_wrapper_with_key: a clone with other wrappers counts as one with other weights,
    and the host would load the model again whenever it changes from one branch of the graph to the other.
    """
    wrappers = clone.model_options["transformer_options"].setdefault("wrappers", {})
    for kind, wrapper in by_kind.items():
        wrappers.setdefault(kind, {})[KEY] = [wrapper]
    return clone


def _replaced(model: Any) -> Mapping[Any, Any]:
    """Who answers self-attention, by block."""
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})


def is_ours(function: Any) -> bool:
    """Whether a function among the host's options is one of `attach`."""
    return isinstance(getattr(function, "__self__", None), Slot)


def slot_of(model: Any) -> Slot | None:
    """Return what answers for a model of ComfyUI; None if we have no part in it."""
    return next((function.__self__ for function in _replaced(model).values() if is_ours(function)), None)


def report_on(model: Any, word: Callable[[Line], str] = str) -> str:
    """Describe what was done in the last sampling with a model of ComfyUI; `word` words a line."""
    slot = slot_of(model)
    if slot is not None:
        return slot.describe(word)
    # weights out of another model are listed, those of a LoRA are objects or tuples
    merged = any(isinstance(added[1], list) for every in getattr(model, "patches", {}).values() for added in every)
    return OFF + MERGED if merged else OFF


class ClonePatch(Patch):
    """A patch whose attention is called by the host: no hooks, and nothing to remove."""

    def __init__(self, unet: nn.Module, config: AgentConfig) -> None:
        super().__init__(unet, config, answerer=_CloneAnswerer())
        self.active = True
        # by where ComfyUI says it is: (("input", 4), number of the block in its transformer)
        self.at: dict[Any, Layer] = {}
        for layer in self._layers:
            layer.seam.obstacle = "another node answers self-attention in its place"  # if it isn't asked
            if found := _NAME.search(layer.site.name):
                part, number, index = found.groups()
                # the host counts one middle, the library numbers the modules inside it
                self.at[(part, 0 if part == "middle" else int(number)), int(index)] = layer

    def end_call(self) -> None:
        call = self.call()
        for layer in self.at.values() if call is not None and call.active else ():
            if layer.acts and layer not in call.plans:  # it was not asked, which would have told its size
                layer.image.see(call.latent.at(layer.site.downsample))
        super().end_call()


class _ProjectedCall(Call):
    """A call that the host has made the projections of.

    The keys stand for the tokens, which are not known here. Token merging was first done by them (Bolya et al., "Token
    Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
        self.projected, self.options, self.heads = (q, k, v), options, options["n_heads"]
        alike = q.shape == k.shape == v.shape
        told = {} if alike else {"queries and keys of different numbers, as by token merging or HyperTile": True}
        super().__init__(k, None, None, told, partial(_attention, q, k, v, self.heads, options))


def kernel_of(options: Mapping[str, Any]) -> Kernel:
    """Return what the user chose in the host to compute attention by."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1]
        return split_heads(_attention(join_heads(q), join_heads(k), join_heads(v), heads, options), heads)

    return kernel


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: Mapping[str, Any]) -> Tensor:
    """The host's own attention of (B, N, C), just as its blocks call it: with the override in the options, if any."""
    from comfy.ldm.modules.attention import optimized_attention

    precision = options.get("attn_precision")
    return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)


class _CloneAnswerer(Answerer):
    """Answers from the projections that the host has made, with the kernel that the user chose there."""

    def answer(self, layer: Layer, host: Any, planned: Planned, *given: Any) -> Tensor:
        exact = planned.config.attn_precision is not None  # which the host's kernel may not honour
        with nullcontext() if exact else attention_by(kernel_of(host.options)):
            return super().answer(layer, host, planned, *given)

    def attention(self, layer: Layer, host: Any, planned: Planned, matching: Matching | None) -> SelfAttention:
        what = planned.plan, planned.config, planned.size, host.heads, matching
        return SelfAttention.projected(host.projected, what, host.proceed)
