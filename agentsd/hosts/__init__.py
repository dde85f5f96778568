"""Host models: their U-Nets, blocks and calls. Each family of models is one file of this folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..schedule import Block, timestep_at
from .base import Call, ExampleCall, Handler, Host, Seam, Site, UnsupportedModelError, is_block, weight_of
from .diffusers import Diffusers
from .ldm import LDM

__all__ = [
    "HOSTS",
    "Call",
    "ExampleCall",
    "Handler",
    "Host",
    "Seam",
    "Site",
    "UnsupportedModelError",
    "downsamples",
    "example_call",
    "find_sites",
    "find_timestep",
    "find_unet",
    "host_of",
    "is_block",
    "output_tensor",
    "read_size",
    "read_timestep",
    "read_tokens",
]

HOSTS: tuple[Host, ...] = (LDM(), Diffusers())
_IMAGES = tuple(name for host in HOSTS for name in host.images)
_TOKENS = tuple(name for host in HOSTS for name in host.tokens)
_TIMESTEPS = tuple(name for host in HOSTS for name in host.timesteps)


def find_unet(model: Any) -> nn.Module:
    """Find the U-Net of an LDM, sgm or Forge model, or of a diffusers pipeline; a U-Net is returned as it is.

    Raises:
        UnsupportedModelError: the model has no U-Net with transformer blocks.
    """
    for path in (*(path for host in HOSTS for path in host.paths), ""):
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


def host_of(attn: nn.Module) -> Host:
    """Return the family that an attention module belongs to."""
    return next(host for host in HOSTS if host.owns(attn))


def find_sites(unet: nn.Module) -> list[Site]:
    """List all transformer blocks of the U-Net, in the order of its modules."""
    levels, sites = dict(downsamples(unet)), []
    for name, module in unet.named_modules():
        if not hasattr(module, "transformer_blocks"):
            continue
        for child_name, block in module.named_modules():
            if is_block(block):
                full = f"{name}.{child_name}".lstrip(".")
                host = host_of(block.attn1)
                place = Block(full, _of_prefix(full, levels))
                sites.append(Site(block, module, place, host, host.obstacle(block.attn1)))
    first = min((site.downsample for site in sites if site.downsample), default=1)
    for site in sites:
        site.place = replace(site.place, largest_level=first)
    return sites


def _of_prefix(name: str, levels: Mapping[str, int]) -> int | None:
    return next((d for prefix, d in levels.items() if name.startswith(prefix + ".")), None)


def downsamples(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, downsample) of each stage of the U-Net, by the first family whose layout matches."""
    for host in HOSTS:
        stages = list(host.stages(unet))
        if stages:
            yield from stages
            return


def example_call(unet: nn.Module, height: int, width: int, progress: float, rows: int = 2) -> ExampleCall:
    """Make arguments for calling a U-Net on noise; the same every time.

    Args:
        unet: the U-Net.
        height: rows of the latent.
        width: columns of the latent.
        progress: fraction of the diffusion done, 0–1.
        rows: batch size; 2 for cond and uncond.
    """
    host, weight = host_of(find_sites(unet)[0].block.attn1), weight_of(unet)
    generator, dtype = torch.Generator().manual_seed(0), host.dtype(unet)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, dtype)

    t = torch.full((rows,), timestep_at(progress), device=weight.device)
    return host.example_call(unet, noise, (height, width), t)


def output_tensor(output: Any) -> Tensor:
    """Extract the tensor from a U-Net's output: bare, first in a tuple, or in diffusers' output object."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output.sample


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)


def read_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Read the tokens (B, N, C) from a block's arguments."""
    return _first(args, kwargs, _TOKENS)


def find_timestep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Find the timesteps among a U-Net's arguments, unread; None if there are none."""
    return args[1] if len(args) > 1 else next((kwargs[name] for name in _TIMESTEPS if name in kwargs), None)


def read_timestep(t: Any) -> float | None:
    """Read the largest timestep of a batch; None if there is none. Waits for the device."""
    if isinstance(t, Tensor):
        return float(t.detach().max()) if t.numel() else None
    return float(t) if isinstance(t, (int, float)) else None


def read_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read (height, width) off the image-shaped tensor (B, C, height, width) among a module's arguments."""
    x = _first(args, kwargs, _IMAGES)
    shape = x.shape if isinstance(x, Tensor) else ()
    return (shape[2], shape[3]) if len(shape) == 4 else None
