"""ComfyUI's ways with a U-Net, made to the signatures of v0.3.64 around real LDM blocks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import transformers_of
from torch import Tensor, nn

from agentsd.attention.tensors import join_heads, split_heads


class Attention:
    """`comfy.ldm.modules.attention.optimized_attention`, which counts its calls: (queries, keys) of each."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def plain(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **kwargs: Any) -> Tensor:
        self.calls.append((q.shape[1], k.shape[1]))
        return join_heads(F.scaled_dot_product_attention(*(split_heads(t, heads) for t in (q, k, v))))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        return self.plain(*args, **kwargs) if override is None else override(self.plain, *args, **kwargs)


def install(monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Put the host's modules where they are imported from, and return its attention."""
    attention = Attention()
    modules = {name: ModuleType(name) for name in ("comfy", "comfy.ldm", "comfy.ldm.modules")}
    modules["comfy.ldm.modules.attention"] = inner = ModuleType("comfy.ldm.modules.attention")
    inner.optimized_attention = attention
    modules["comfy.ldm.modules"].attention = inner
    modules["comfy.model_management"] = management = ModuleType("comfy.model_management")
    management.InterruptProcessingException = type("InterruptProcessingException", (Exception,), {})
    management.throw_exception_if_processing_interrupted = lambda: None
    modules["comfy.utils"] = utils = ModuleType("comfy.utils")
    utils.ProgressBar = lambda total: SimpleNamespace(update_absolute=lambda done, total: None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return attention


class ModelPatcher:
    """A clone of a model: options of its own, the model shared."""

    def __init__(self, unet: nn.Module) -> None:
        # here a sigma is a timestep
        self.model = SimpleNamespace(diffusion_model=unet, model_sampling=SimpleNamespace(timestep=lambda sigma: sigma))
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches: dict[str, list[Any]] = {}  # of the weights

    def clone(self) -> ModelPatcher:
        new = copy.copy(self)
        new.model_options = copy.deepcopy(self.model_options)
        new.patches = {key: [*added] for key, added in self.patches.items()}
        return new

    def set_model_attn1_replace(self, patch: Any, block_name: str, number: int, transformer_index: Any = None) -> None:
        replace = self.options.setdefault("patches_replace", {}).setdefault("attn1", {})
        replace[(block_name, number) if transformer_index is None else (block_name, number, transformer_index)] = patch

    def set_model_attn1_patch(self, patch: Any) -> None:
        self.options.setdefault("patches", {}).setdefault("attn1_patch", []).append(patch)

    @property
    def options(self) -> dict[str, Any]:
        return self.model_options["transformer_options"]


def wrapped(kind: str, options: dict[str, Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` inside all wrappers of a kind."""
    for wrappers in options.get("wrappers", {}).get(kind, {}).values():
        for wrapper in wrappers:
            call = partial(wrapper, call)
    return call


def comfy_unet(unet: nn.Module) -> nn.Module:
    """Have an LDM U-Net's blocks ask the options who answers self-attention, as ComfyUI's do."""
    state: dict[str, Any] = {}
    unet.comfy_state = state
    unet.forward = partial(_unet_forward, unet, type(unet).forward)
    positions = [("input", i, m) for i, m in enumerate(unet.input_blocks)]
    positions += [("middle", 0, unet.middle_block)] + [("output", i, m) for i, m in enumerate(unet.output_blocks)]
    for part, number, stage in positions:
        for transformer in transformers_of(stage):

            def see(module: nn.Module, args: Any) -> None:
                state["activations_shape"] = list(args[0].shape)

            transformer.register_forward_pre_hook(see)
            for index, block in enumerate(transformer.transformer_blocks):
                block.attn1.__class__ = _attention_class(type(block.attn1))
                block.attn1.comfy_state = state
                block._forward = partial(_block, block, state, (part, number), index)
    return unet


def _unet_forward(unet: nn.Module, original: Any, x: Tensor, timesteps: Tensor, **kwargs: Any) -> Tensor:
    options = kwargs["transformer_options"]

    def call(x: Tensor, t: Tensor, context: Tensor, y: Any, control: Any, transformer_options: Any) -> Tensor:
        unet.comfy_state["options"] = transformer_options
        return original(unet, x, t, context=context)

    return wrapped("diffusion_model", options, call)(x, timesteps, kwargs["context"], None, None, options)


def _attention_class(base: type) -> type:
    class CrossAttention(base):
        def forward(self, x: Tensor, context: Any = None, value: Any = None, mask: Any = None, **kwargs: Any) -> Tensor:
            context = x if context is None else context
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
            return self.to_out(self.comfy_state["attention"](q, k, v, self.heads, attn_precision=None, **kwargs))

    return CrossAttention


def _block(block: nn.Module, state: Any, at: Any, index: int, x: Tensor, context: Any = None) -> Tensor:
    options, attn1 = state["options"], block.attn1
    extra = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
    extra |= {"block": at, "block_index": index, "n_heads": attn1.heads, "attn_precision": None}
    extra |= {"activations_shape": state["activations_shape"]}
    n, keys, values = block.norm1(x), None, None
    for patch in options.get("patches", {}).get("attn1_patch", []):
        n, keys, values = patch(n, n if keys is None else keys, n if values is None else values, extra)
    replace = options.get("patches_replace", {}).get("attn1", {})
    answer = replace.get((*at, index), replace.get(at))
    if answer is None:
        n = attn1(n, context=keys, value=values, transformer_options=options)
    else:
        keys, values = (n if t is None else t for t in (keys, values))
        n = attn1.to_out(answer(attn1.to_q(n), attn1.to_k(keys), attn1.to_v(values), extra))
    for patch in options.get("patches", {}).get("attn1_output_patch", []):
        n = patch(n, extra)
    x = n + x
    x = block.attn2(block.norm2(x), context=context) + x
    return block.ff(block.norm3(x)) + x


@torch.no_grad()
def sample(
    model: ModelPatcher, attention: Attention, x: Tensor, timesteps: Any, context: Tensor, tile: int = 0, area: int = 0
) -> Tensor:
    """Call the U-Net at each timestep, inside the wrappers of a sampling; return the last output.

    With a `tile`, call it on squares of that side, as Tiled Diffusion does; with an `area`, on one square before.
    """
    options = copy.deepcopy(model.model_options)["transformer_options"]
    unet = model.model.diffusion_model
    unet.comfy_state["attention"] = attention

    def steps(guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Tensor, *rest: Any) -> Tensor:
        out = noise
        for t in timesteps:
            parts = [part[..., : tile or None, :] for part in noise.split(tile or noise.shape[-1], dim=-1)]
            given = {"context": context, "transformer_options": dict(options)}
            outs = [
                unet(part, torch.full((len(x),), float(t)), **given)
                for part in [noise[..., :area, :area]] * bool(area) + parts
            ]
            out = torch.cat(outs[bool(area) :], dim=-1)
        return out

    sigmas = torch.tensor([*map(float, timesteps), 0.0])
    guider = SimpleNamespace(model_patcher=model)
    return wrapped("sampler_sample", options, steps)(guider, sigmas, {}, None, x, None, None, False)
