"""What a host is to the library: a family of models whose U-Nets share their classes and call signatures.

A host is one file in this folder: a subclass of `Host`, and its line in `agentsd.hosts.HOSTS`. No other file of the
core knows a host's class names, call signatures or dtypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import MAX_TIMESTEP, Block

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
PROMPT_TOKENS = 77


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


class Seam(Protocol):
    """Where one attention module is cut open, so that a handler answers its calls."""

    def install(self, handler: Handler) -> None:
        """Send every call to `handler`; once in the life of a seam."""

    def remove(self) -> None:
        """Put back what was there."""

    def project_out(self, x: Tensor) -> Tensor:
        """The attention's output projection."""


@dataclass(frozen=True)
class ExampleCall:
    """Arguments that a U-Net can be called with, on its device and in the dtype that its host computes in."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Host(ABC):
    """A family of models.

    Attributes:
        paths: where a model object of this family keeps its U-Net, as dotted attributes.
        images: names of the argument that holds an image-shaped tensor (B, C, height, width).
        tokens: names of the argument that holds tokens (B, N, C).
        timesteps: names of the U-Net's argument that holds the timestep.
        resamplers: where a resampling module convolves, relative to the downsample of the stage that it is in, by the
            module's class name.
    """

    paths: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    timesteps: tuple[str, ...] = ()
    resamplers: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def owns(self, attn: nn.Module) -> bool:
        """Whether this attention module is one of this family's."""

    @abstractmethod
    def seam(self, attn: nn.Module) -> Seam:
        """A seam in this attention module."""

    @abstractmethod
    def obstacle(self, attn: nn.Module) -> str:
        """Why this self-attention can't be answered by us; empty where it can."""

    @abstractmethod
    def stages(self, unet: nn.Module) -> Iterator[tuple[str, int]]:
        """(name of a stage of the U-Net, its downsample); nothing where the U-Net is not of this family's layout."""

    @abstractmethod
    def example_call(
        self, unet: nn.Module, noise: Callable[..., Tensor], size: tuple[int, int], t: Tensor
    ) -> ExampleCall:
        """A call of the U-Net on noise.

        Args:
            unet: a U-Net of this family.
            noise: makes a tensor of a given shape; its first side is the batch.
            size: (height, width) of the latent.
            t: timesteps, one for each row of the batch.
        """

    def dtype(self, unet: nn.Module) -> torch.dtype:
        """What the host computes this U-Net in."""
        return weight_of(unet).dtype


def weight_of(module: nn.Module) -> Tensor:
    """The first floating-point parameter, which tells the device and the dtype."""
    return next(p for p in module.parameters() if p.is_floating_point())


@dataclass
class Site:
    """One transformer block that can be patched.

    Attributes:
        block: the block: attn1, attn2 and ff.
        parent: the module around it that sees the tokens as an image.
        place: its name, and how far down the U-Net it is by the U-Net's structure.
        host: the family that its self-attention is of.
        obstacle: why its self-attention can't be answered by us; empty where it can.
    """

    block: nn.Module
    parent: nn.Module
    place: Block
    host: Host
    obstacle: str = ""

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def downsample(self) -> int | None:
        return self.place.downsample

    @property
    def heads(self) -> int:
        return self.block.attn1.heads

    @property
    def channels(self) -> int:
        """C, the width of a token."""
        return self.block.attn1.to_q.in_features

    def seam(self) -> Seam:
        return self.host.seam(self.block.attn1)

    def wrapped(self) -> bool:
        """Whether somebody wraps the projections of this very instance and may count on seeing all N tokens."""
        return any("forward" in getattr(self.block.attn1, name).__dict__ for name in PROJECTIONS[:3])


def is_block(module: nn.Module) -> bool:
    """Whether this is a BasicTransformerBlock with a self-attention that we can read.

    Told by the class's name and parts, since every host has a class of its own.
    """
    if not any(cls.__name__ == "BasicTransformerBlock" for cls in type(module).__mro__):
        return False
    attn1 = getattr(module, "attn1", None)
    return attn1 is not None and all(hasattr(attn1, name) for name in (*PROJECTIONS, "heads"))


def says_something(value: Any) -> bool:
    """Whether an argument that was passed can change the result."""
    if value is None:
        return False
    return bool(value) if isinstance(value, (bool, int, float, str, dict, list, tuple)) else True


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, given the names of the positional ones."""
    given = dict(zip(names, args, strict=False), **kwargs)
    given.update({f"argument {i}": value for i, value in enumerate(args[len(names) :])})
    return given


def timestep_at(progress: float) -> float:
    """The timestep, 0–999, when the fraction `progress` of the diffusion is done."""
    return (1 - progress) * (MAX_TIMESTEP - 1)
