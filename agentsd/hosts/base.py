"""Interface of a host: a family of models whose U-Nets share classes and call signatures.

A host is one file in this folder: a subclass of `Host`, listed in `agentsd.hosts.families.HOSTS`. Transformers are one
`Transformer` a family, all in `transformers.py`. No other file of the core knows their class names, call signatures or
dtypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """The model has neither a Stable Diffusion U-Net with transformer blocks to patch nor a known transformer."""


@dataclass
class Call:
    """One self-attention call, as made by the host."""

    x: Tensor  # tokens (B, N, C)
    context: Tensor | None  # input of the key and value projections; None means x
    mask: Any  # the attention mask, if any
    extras: Mapping[str, Any]  # other arguments that are neither None nor empty, by name
    # makes the host's original call; given tokens, makes the same call with these in place of x
    proceed: Callable[..., Tensor]
    wanted: Any = None  # what the seam's `wants` returned for it

    def veto(self, tokens: int) -> str:
        """Say why this is no plain self-attention of so many tokens; empty if it is."""
        if self.mask is not None:
            return "self-attention was given a mask"
        if self.extras:
            return f"self-attention was given {', '.join(sorted(self.extras))}"
        if self.context is not None and self.context is not self.x:
            return "self-attention was given a context of its own"
        shape = self.x.shape
        if len(shape) != 3 or shape[1] != tokens:
            return "self-attention got another number of tokens than the layer has"
        return ""


Handler = Callable[[Call], Tensor]


def always() -> bool:
    """Want every call."""
    return True


class Seam(ABC):
    """Replacement point in one attention module, through which a handler answers its calls."""

    obstacle = ""  # why its calls can't be answered; empty if they can

    def __init__(self, attn: Any) -> None:
        self.attn = attn

    @abstractmethod
    def install(self, handler: Handler, wants: Callable[[], Any] = always) -> None:
        """Send calls to `handler` while `wants()` returns something, the others on unread; at most once per seam."""

    def refresh(self) -> None:  # noqa: B027
        """See whether the host computes the attention in another way since, and go on answering if that can be."""

    @abstractmethod
    def remove(self) -> None:
        """Restore the module."""

    @abstractmethod
    def project_out(self, x: Tensor) -> Tensor:
        """Apply the attention's output projection."""


class ExampleCall(NamedTuple):
    """Arguments for calling a U-Net, on its device and in the dtype that its host computes in."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Host(ABC):
    """A family of models."""

    # dotted attributes under which a model of this family may hold its U-Net
    paths: tuple[str, ...]
    # names of the argument that holds an image-shaped tensor (B, C, height, width), tokens (B, N, C), or the timestep
    images: tuple[str, ...]
    tokens: tuple[str, ...]
    timesteps: tuple[str, ...]
    # names of modules whose transformer blocks attend over frames
    temporal: tuple[str, ...] = ()
    # by class name of a resampling module, the downsample at which it convolves, relative to that of its stage
    resamplers: Mapping[str, float]

    @abstractmethod
    def owns(self, attn: nn.Module) -> bool:
        """Whether this attention module belongs to this family."""

    @abstractmethod
    def seam(self, attn: nn.Module) -> Seam:
        """Make a seam in this attention module."""

    @abstractmethod
    def stages(self, unet: Any) -> Iterator[tuple[str, int]]:
        """Yield (name, downsample) of each stage of the U-Net; nothing if its layout is another family's."""

    @abstractmethod
    def example_call(self, unet: Any, noise: Callable[..., Tensor], size: tuple[int, int], t: Tensor) -> ExampleCall:
        """Make arguments for calling the U-Net on noise.

        `noise` makes a tensor of the given shape, the batch first; `size` is (height, width) of the latent; t (B,).
        """

    def dtype(self, unet: nn.Module) -> torch.dtype:
        """Return the dtype in which the host computes this U-Net."""
        return weight_of(unet).dtype


def weight_of(module: nn.Module) -> Tensor:
    """Return the first floating-point parameter, for its device and dtype."""
    return next(p for p in module.parameters() if p.is_floating_point())


def is_set(value: Any) -> bool:
    """Whether an argument can change the result: it is neither None, empty, zero nor False."""
    # bool of a tensor would wait for the device, or raise
    return bool(value) if isinstance(value, (bool, int, float, str, dict, list, tuple)) else value is not None


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Map the arguments of a call to names, given the names of the positional ones."""
    more = {f"argument {i}": value for i, value in enumerate(args[len(names) :])}
    return {**dict(zip(names, args, strict=False)), **kwargs, **more}


def is_block(module: nn.Module) -> bool:
    """Whether this is a BasicTransformerBlock with self-attention, by names, since every host has its own class."""
    if not any(cls.__name__ == "BasicTransformerBlock" for cls in type(module).__mro__):
        return False
    parts = ("to_q", "to_k", "to_v", "to_out", "heads")
    # in most blocks of the x4 upscaler both attentions are to the prompt
    to_prompt = getattr(module, "only_cross_attention", False) or getattr(module, "disable_self_attn", False)
    return not to_prompt and all(hasattr(getattr(module, "attn1", None), name) for name in parts)
