"""What the hosts' U-Nets look like: LDM, sgm, Forge and diffusers. No other file of the core knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class UnsupportedModelError(ValueError):
    """The model has no Stable Diffusion U-Net, or its U-Net has no transformer block that could be patched."""


@dataclass
class Call:
    """One call of a self-attention, as the host made it.

    Attributes:
        x: tokens (B, N, C).
        context: what keys and values come from; None means x.
        mask: the attention mask, if any.
        extras: whatever else was passed and is neither None nor empty, by name.
        proceed: makes the call that the host made; given a tensor, the same call with these tokens for x.
    """

    x: Tensor
    context: Tensor | None
    mask: Any
    extras: Mapping[str, Any]
    proceed: Callable[..., Tensor]


Handler = Callable[[Call], Tensor]


class ForwardSeam:
    """Replaces the `forward` of one LDM, sgm or Forge attention module, on the instance."""

    # Parameters of a host's attention that change nothing when we answer in its place: Forge's transformer_options
    # carries patches that its block applies around attn1.
    _HARMLESS = ("transformer_options",)

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn
        self._names = _positional_names(type(attn).forward)
        self._previous: Callable[..., Tensor] | None = None
        self._forward: Callable[..., Tensor] | None = None
        self._handler: Handler | None = None

    def install(self, handler: Handler) -> None:
        """Send every call to `handler`; once in the life of a seam."""
        self._handler, self._previous = handler, self.attn.__dict__.get("forward")
        # a bound method and not a closure: a deep copy of the model then gets a seam of its own
        self._forward = self.attn.forward = self._answer

    def remove(self) -> None:
        """Put back what was there. What others have put on top of us since stays, and no longer meets us."""
        ours, self._forward, self._handler = self._forward, None, None
        if ours is None or self.attn.__dict__.get("forward") != ours:  # equal, not the same, in a deep copy
            return
        if self._previous is None:
            del self.attn.forward
        else:
            self.attn.forward = self._previous

    def project_out(self, x: Tensor) -> Tensor:
        return self.attn.to_out(x)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._handler is None:  # removed, but somebody kept a reference to this method
            return self._original(*args, **kwargs)
        return self._handler(self._read(args, kwargs))

    def _original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.attn).forward(self.attn, *args, **kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = dict(zip(self._names, args, strict=False), **kwargs)
        given.update({f"argument {i}": value for i, value in enumerate(args[len(self._names) :])})
        x, context, mask = (given.pop(name, None) for name in (self._names[0], "context", "mask"))

        def proceed(tokens: Tensor | None = None) -> Tensor:
            if tokens is None:
                return self._original(*args, **kwargs)
            rest = given if context is None else {"context": tokens, **given}
            return self._original(tokens, **rest)

        extras = {name: value for name, value in given.items() if _says_something(value) and name not in self._HARMLESS}
        return Call(x, context, mask, extras, proceed)


def _positional_names(method: Callable[..., Any]) -> list[str]:
    """Names of a method's positional parameters, self aside; LDM's where a wrapper hides them."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return names or ["x", "context", "mask"]


class ProcessorSeam:
    """Replaces the processor of one diffusers attention module."""

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn
        self._previous = _host_processor(attn)
        self._processor: _Processor | None = None

    def install(self, handler: Handler) -> None:
        """Send every call to `handler`."""
        if isinstance(self._previous, nn.Module):
            return  # its weights would leave the module tree, out of reach of to() and of state_dict()
        self._processor = _Processor(self._previous, handler)
        self.attn.set_processor(self._processor)

    def remove(self) -> None:
        """Put the processor back, unless somebody has set another one since."""
        if self._processor is None:
            return
        self._processor.handler = None
        if self.attn.processor is self._processor:
            self.attn.set_processor(self._processor.previous)

    def project_out(self, x: Tensor) -> Tensor:
        for module in self.attn.to_out:
            x = module(x)
        return x


class _Processor:
    """A diffusers attention processor that asks a handler first.

    Whoever asks is told the class and the parameters of the processor underneath: diffusers chooses by the class (and
    makes a new one of it when an IP-Adapter is loaded), and passes only the arguments that `__call__` names.
    """

    _NAMES = ("encoder_hidden_states", "attention_mask", "temb")

    def __init__(self, previous: Callable[..., Tensor], handler: Handler | None) -> None:
        self.previous, self.handler = previous, handler
        self.__call__ = wraps(previous.__call__)(partial(type(self).__call__, self))

    @property
    def __class__(self) -> type:
        return self.previous.__class__

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(self._NAMES, args, strict=False), **kwargs)
        given.update({f"argument {i}": value for i, value in enumerate(args[len(self._NAMES) :])})
        context, mask = (given.pop(name, None) for name in self._NAMES[:2])

        def proceed(tokens: Tensor | None = None) -> Tensor:
            if tokens is None:
                return self.previous(attn, hidden_states, *args, **kwargs)
            rest = given if context is None else {"encoder_hidden_states": tokens, **given}
            return self.previous(attn, tokens, **rest)

        if self.handler is None:
            return proceed()
        extras = {name: value for name, value in given.items() if _says_something(value)}
        return self.handler(Call(hidden_states, context, mask, extras, proceed))


def _host_processor(attn: nn.Module) -> Any:
    """The processor of a diffusers attention, without those of ours that were removed but are kept by others."""
    processor = attn.processor
    while type(processor) is _Processor and processor.handler is None:
        processor = processor.previous
    return processor


def _says_something(value: Any) -> bool:
    if value is None:
        return False
    return bool(value) if isinstance(value, (bool, int, float, str, dict, list, tuple)) else True


@dataclass
class Site:
    """One transformer block that can be patched.

    Attributes:
        name: the block's name in the U-Net.
        block: the block: attn1, attn2 and ff.
        parent: the module around it that sees the tokens as an image.
        downsample: how far down the U-Net it is (1, 2, 4 …) by the U-Net's structure; None where that is unknown.
        obstacle: why its self-attention can't be answered by us; empty where it can.
    """

    name: str
    block: nn.Module
    parent: nn.Module
    downsample: int | None
    obstacle: str = ""
    heads: int = field(init=False)

    def __post_init__(self) -> None:
        self.heads = self.block.attn1.heads

    def seam(self) -> ForwardSeam | ProcessorSeam:
        return ProcessorSeam(self.block.attn1) if _is_diffusers(self.block.attn1) else ForwardSeam(self.block.attn1)

    def wrapped(self) -> bool:
        """Whether somebody wraps the projections of this very instance and may count on seeing all N tokens."""
        return any("forward" in getattr(self.block.attn1, name).__dict__ for name in _PROJECTIONS[:3])


def find_unet(model: Any) -> nn.Module:
    """The U-Net of an LDM or sgm model, of a Forge model, of a diffusers pipeline, or the U-Net itself.

    Raises:
        UnsupportedModelError: there is none with transformer blocks.
    """
    paths = ("forge_objects.unet.model.diffusion_model", "model.diffusion_model", "diffusion_model", "unet", "")
    for path in paths:
        unet = _follow(model, path)
        unet = getattr(unet, "_orig_mod", unet)  # torch.compile
        if isinstance(unet, nn.Module) and any(is_block(module) for module in unet.modules()):
            return unet
    raise UnsupportedModelError(
        f"model must be a Stable Diffusion model (LDM, sgm or diffusers) or its U-Net with transformer blocks, "
        f"got {type(model).__name__}"
    )


def _follow(model: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        model = getattr(model, name, None)
    return model


def is_block(module: nn.Module) -> bool:
    """Whether this is a BasicTransformerBlock with a self-attention that we can read.

    Told by the class's name and parts, since every host has a class of its own.
    """
    if not any(cls.__name__ == "BasicTransformerBlock" for cls in type(module).__mro__):
        return False
    attn1 = getattr(module, "attn1", None)
    return attn1 is not None and all(hasattr(attn1, name) for name in (*_PROJECTIONS, "heads"))


def find_sites(unet: nn.Module) -> list[Site]:
    """All blocks of the U-Net that can be patched, in the order of their names in it."""
    levels = dict(downsamples(unet))
    sites = []
    for name, module in unet.named_modules():
        if not hasattr(module, "transformer_blocks"):
            continue
        for child_name, block in module.named_modules():
            if is_block(block):
                full = f"{name}.{child_name}".lstrip(".")
                sites.append(Site(full, block, module, _of_prefix(full, levels), _obstacle(block.attn1)))
    return sites


def _of_prefix(name: str, levels: Mapping[str, int]) -> int | None:
    return next((d for prefix, d in levels.items() if name.startswith(prefix + ".")), None)


def downsamples(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """(name of a stage of the U-Net, its downsample), for the two layouts that there are."""
    d = 1
    if hasattr(unet, "input_blocks"):  # LDM, sgm, Forge
        for i, stage in enumerate(unet.input_blocks):
            d *= 2 if _has(stage, "Downsample") else 1
            yield f"input_blocks.{i}", d
        yield "middle_block", d
        for i, stage in enumerate(unet.output_blocks):
            yield f"output_blocks.{i}", d
            d //= 2 if _has(stage, "Upsample") else 1
    elif hasattr(unet, "down_blocks"):  # diffusers
        for i, stage in enumerate(unet.down_blocks):
            yield f"down_blocks.{i}", d
            d *= 2 if getattr(stage, "downsamplers", None) else 1
        yield "mid_block", d
        for i, stage in enumerate(unet.up_blocks):
            yield f"up_blocks.{i}", d
            d //= 2 if getattr(stage, "upsamplers", None) else 1


def first_downsample(unet: nn.Module) -> int:
    """How far down the U-Net its largest self-attention layers are: 1 in SD 1 and 2, 2 in SDXL."""
    return min((site.downsample for site in find_sites(unet) if site.downsample), default=1)


def _has(stage: nn.Module, class_name: str) -> bool:
    return any(type(module).__name__ == class_name for module in stage.modules())


def _is_diffusers(attn: nn.Module) -> bool:
    return hasattr(attn, "processor") and hasattr(attn, "set_processor")


# The processors that compute plain attention, each by another kernel.
_PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
)


def _obstacle(attn: nn.Module) -> str:
    # by __class__, and not by type(): one of ours that is still at work says what is underneath
    processor = _host_processor(attn).__class__.__name__ if _is_diffusers(attn) else None
    if processor is not None and processor not in _PLAIN_PROCESSORS:
        return f"its attention processor is {processor}"
    for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(attn, name, None) is not None:
            return f"its attention has {name}"
    if getattr(attn, "residual_connection", False) or getattr(attn, "rescale_output_factor", 1) != 1:
        return "its attention rescales its output"
    return ""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> Any:
    """The first positional argument, or the first keyword of `names` that was given."""
    return args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)


def read_timestep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """The largest timestep of the batch that a U-Net was given; None where there is none."""
    names = ("timesteps", "timestep", "t")
    t = args[1] if len(args) > 1 else next((kwargs[name] for name in names if name in kwargs), None)
    if isinstance(t, Tensor):
        return float(t.detach().max()) if t.numel() else None
    return float(t) if isinstance(t, (int, float)) else None


def read_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the image-shaped tensor (B, C, height, width) that a module was given."""
    x = first_tensor(args, kwargs, "x", "sample", "hidden_states")
    return tuple(x.shape[-2:]) if isinstance(x, torch.Tensor) and x.dim() == 4 else None
