"""The families of models, and what is asked of whichever a model belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..schedule import timestep_at
from .base import ExampleCall, Host, is_block, weight_of
from .diffusers import Diffusers
from .ldm import LDM

HOSTS: tuple[Host, ...] = (LDM(), Diffusers())


def host_of(attn: nn.Module) -> Host:
    """Return the family that an attention module belongs to."""
    return next(host for host in HOSTS if host.owns(attn))


def downsamples(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, downsample) of each stage of the U-Net, by the first family whose layout matches."""
    yield from next(filter(None, (list(host.stages(unet)) for host in HOSTS)), ())


def example_call(unet: nn.Module, height: int, width: int, progress: float, rows: int = 2) -> ExampleCall:
    """Make arguments for calling a U-Net on noise, the same every time, at `progress` 0–1 of the diffusion.

    The latent has `height` × `width` positions; the batch has `rows`, two for cond and uncond.
    """
    block: Any = next(filter(is_block, unet.modules()))
    host, weight = host_of(block.attn1), weight_of(unet)
    generator, dtype = torch.Generator().manual_seed(0), host.dtype(unet)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, dtype)

    t = torch.full((rows,), timestep_at(progress), device=weight.device)
    return host.example_call(unet, noise, (height, width), t)
