"""Finding a model's U-Net and its transformer blocks, or its transformer and the attentions in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..schedule import Block
from . import diffusers, ldm
from .base import Seam, UnsupportedModelError
from .transformers import FAMILIES, Transformer, family_of

# Dotted attributes under which models hold their U-Net or transformer
_PATHS = ("forge_objects.unet.model.diffusion_model", "model.diffusion_model", "diffusion_model", "unet", "transformer")
# Of LDM's and of diffusers' U-Nets: stages on the way down, in the middle and on the way up, what halves the grid and
# what doubles it again in a stage, and whether it is halved before a stage's blocks or behind
_STAGES = (
    ("input_blocks", "middle_block", "output_blocks", {"Downsample"}, {"Upsample"}, True),
    # ControlNet-XS has a second name for it
    ("down_blocks", "mid_block", "up_blocks", {"downsamplers", "base_downsamplers"}, {"upsamplers"}, False),
)
# Names of modules whose transformer blocks attend over frames
_TEMPORAL = {"time_stack", "motion_modules", "temp_attentions", "transformer_in"}


@dataclass
class Site:
    """One transformer block that can be patched; in a transformer, one attention of a block."""

    block: Any  # attn1, attn2 and ff
    parent: nn.Module  # the module around it that sees the tokens as an image
    place: Block  # its name and its level, read off the U-Net's structure
    attn: Any  # its self-attention
    family: Transformer | None = None  # of the transformer that it is in; None in a U-Net

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
        return getattr(self.attn, "query_dim", None) or self.attn.to_q.in_features

    @property
    def patch(self) -> int:
        """Side in positions of the latent of what a token at level 1 stands for."""
        return 1 if self.family is None else self.family.patch

    def seam(self) -> Seam:
        if self.family is not None:
            return self.family.seam(self.attn)
        return (diffusers.ProcessorSeam if hasattr(self.attn, "set_processor") else ldm.ForwardSeam)(self.attn)

    def wrapped(self) -> bool:
        """Whether another extension wraps this instance's projections and may rely on seeing all N tokens."""
        return any("forward" in vars(part) for part in (self.attn.to_q, self.attn.to_k, self.attn.to_v))


def find_unet(model: Any) -> nn.Module:
    """Find the U-Net of an LDM, sgm or Forge model, or of a diffusers pipeline; a U-Net is returned as it is.

    Raises:
        UnsupportedModelError: the model has no U-Net with transformer blocks.
    """
    unet = find_model(model)
    if family_of(unet) is None:
        return unet
    raise UnsupportedModelError(f"model must be a U-Net here, got the transformer {type(unet).__name__}")


def find_model(model: Any) -> nn.Module:
    """As `find_unet`, or the transformer of a diffusers pipeline that has one instead."""
    for path in (*_PATHS, ""):
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


def downsamples(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, downsample) of each stage of the U-Net; nothing if its layout is unknown."""
    for down, middle, up, halving, doubling, at_once in _STAGES:
        if not hasattr(unet, down):
            continue
        d = 1
        for i, stage in enumerate(getattr(unet, down)):
            halved = 2 * d if _has(stage, halving) else d
            yield f"{down}.{i}", halved if at_once else d
            d = halved
        yield middle, d
        for i, stage in enumerate(getattr(unet, up, ())):  # a ControlNet has none
            yield f"{up}.{i}", d
            d //= 2 if _has(stage, doubling) else 1


def _has(stage: nn.Module, names: set[str]) -> bool:
    """Whether a stage has an attribute or a module of a class with one of these names."""
    return any(getattr(stage, name, None) for name in names) or any(type(m).__name__ in names for m in stage.modules())


def is_block(module: nn.Module) -> bool:
    """Whether this is a BasicTransformerBlock with self-attention, by names, since every host has its own class."""
    if not any(cls.__name__ == "BasicTransformerBlock" for cls in type(module).__mro__):
        return False
    parts = ("to_q", "to_k", "to_v", "to_out", "heads")
    # in most blocks of the x4 upscaler both attentions are to the prompt
    to_prompt = getattr(module, "only_cross_attention", False) or getattr(module, "disable_self_attn", False)
    return not to_prompt and all(hasattr(getattr(module, "attn1", None), name) for name in parts)


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
    blocks, stages = list(_blocks(unet)), dict(downsamples(unet))
    levels = [next((d for at, d in stages.items() if name.startswith(at + ".")), None) for name, _, _ in blocks]
    largest, placed = min(filter(None, levels), default=1), zip(blocks, levels, strict=True)
    return [Site(b, parent, Block(name, level, largest), b.attn1) for (name, parent, b), level in placed]


def sites_of(model: nn.Module, family: Transformer) -> list[Site]:
    """List the attentions of a transformer that see the image, in the order in which they run."""
    modules = dict(model.named_modules())
    named = ((name, modules[name.rpartition(".")[0]], attn) for name, attn in family.names(model))
    return [Site(block, model, Block(name, 1), attn, family) for name, block, attn in named]
