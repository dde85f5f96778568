"""Finding a model's U-Net and its transformer blocks, or its transformer and the attentions in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..schedule import Block
from .base import Host, Seam, UnsupportedModelError, is_block
from .families import HOSTS, downsamples, host_of
from .transformers import FAMILIES, Transformer, family_of

_TEMPORAL = {name for host in HOSTS for name in host.temporal}


@dataclass
class Site:
    """One transformer block that can be patched; in a transformer, one attention of a block."""

    block: Any  # attn1, attn2 and ff
    parent: nn.Module  # the module around it that sees the tokens as an image
    place: Block  # its name and its level, read off the U-Net's structure
    host: Host | Transformer  # the family that its self-attention belongs to
    attn: Any  # its self-attention

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def downsample(self) -> int | None:
        return self.place.downsample

    @property
    def heads(self) -> int:
        return self.attn.heads

    @property
    def channels(self) -> int:
        """C, the width of a token."""
        return self.attn.to_q.in_features

    def seam(self) -> Seam:
        return self.host.seam(self.attn)

    def wrapped(self) -> bool:
        """Whether another extension wraps this instance's projections and may rely on seeing all N tokens."""
        attn = self.attn
        return "forward" in attn.to_q.__dict__ or "forward" in attn.to_k.__dict__ or "forward" in attn.to_v.__dict__


def find_unet(model: Any) -> nn.Module:
    """Find the U-Net of an LDM, sgm or Forge model, or of a diffusers pipeline; a U-Net is returned as it is.

    Raises:
        UnsupportedModelError: the model has no U-Net with transformer blocks.
    """
    unet = find_model(model)
    if family_of(unet) is None:
        return unet
    raise UnsupportedModelError(f"model must be a U-Net here, got {type(unet).__name__}, which apply_patch alone takes")


def find_model(model: Any) -> nn.Module:
    """As `find_unet`, or the transformer of a diffusers pipeline that has one instead."""
    for path in (*(path for host in HOSTS for path in host.paths), "transformer", ""):
        found = model
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        found = getattr(found, "_orig_mod", found)  # torch.compile
        if isinstance(found, nn.Module) and (family_of(found) is not None or any(_blocks(found))):
            return found
    raise UnsupportedModelError(
        f"model must be a Stable Diffusion model (LDM, sgm or diffusers), its U-Net with transformer blocks, or a "
        f"transformer that is one of {', '.join(FAMILIES)}, got {type(model).__name__}"
    )


def _blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield (name, parent, block); none of a transformer by itself, whose input is no image."""
    for name, module in unet.named_modules():
        for child_name, block in module.named_modules() if name and hasattr(module, "transformer_blocks") else ():
            full = f"{name}.{child_name}"
            if is_block(block) and not _TEMPORAL.intersection(full.split(".")):
                yield full, module, block


def find_sites(unet: nn.Module) -> list[Site]:
    """List all transformer blocks of the U-Net, in the order of its modules."""
    family = family_of(unet)
    if family is not None:
        return sites_of(unet, family)
    levels, sites = dict(downsamples(unet)), []
    for name, parent, block in _blocks(unet):
        level = next((d for prefix, d in levels.items() if name.startswith(prefix + ".")), None)
        sites.append(Site(block, parent, Block(name, level), host_of(block.attn1), block.attn1))
    largest = min((site.downsample for site in sites if site.downsample), default=1)
    for site in sites:
        site.place = replace(site.place, largest_level=largest)
    return sites


def sites_of(model: nn.Module, family: Transformer) -> list[Site]:
    """List the attentions of a transformer that see the image, in the order in which they run."""
    modules = dict(model.named_modules())
    return [
        Site(modules[name.rpartition(".")[0]], model, Block(name, 1), family, attn)
        for name, attn in family.names(model)
    ]
