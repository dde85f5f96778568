"""Which model a tuning belongs to: the structure of its blocks, and a cheap checksum of some weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..hosts import Site, downsamples, find_sites

# Every so many values of a weight count.
_STRIDE = 16


def ordered_sites(unet: nn.Module) -> list[Site]:
    """List the transformer blocks in the order in which the U-Net runs them, the same for every family of models."""
    stages = [prefix + "." for prefix, _ in downsamples(unet)]

    def stage(site: Site) -> int:
        return next((i for i, prefix in enumerate(stages) if site.name.startswith(prefix)), len(stages))

    return sorted(find_sites(unet), key=stage)


def structure_of(sites: Sequence[Site]) -> str:
    """Return a fingerprint of the blocks: their levels, channels and heads. The same for LDM and diffusers."""
    return _digest([repr([(site.downsample, site.channels, site.heads) for site in sites]).encode()])[:8]


@torch.no_grad()
def weights_of(unet: nn.Module) -> str:
    """Return a checksum of some of the U-Net's weights; empty if they are not in memory.

    The first convolution, the first layer of the timestep's embedding and the norms of the blocks: fine-tuning changes
    all of them, LoRA none. Compared as float16, so that a float32 copy of a half-precision model is the same model.
    """
    weights = list(_weights(unet))
    if any(weight.is_meta for weight in weights):
        return ""
    return _digest(w.detach().flatten()[::_STRIDE].to("cpu", torch.float16).numpy().tobytes() for w in weights)


def _weights(unet: nn.Module) -> Iterator[Tensor]:
    first = (next((m for m in unet.modules() if isinstance(m, kind)), None) for kind in (nn.Conv2d, nn.Linear))
    norms = (getattr(site.block, "norm1", None) for site in ordered_sites(unet))
    for module in (*first, *norms):
        values = (getattr(module, name, None) for name in ("weight", "bias"))
        yield from (value for value in values if isinstance(value, Tensor))


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
