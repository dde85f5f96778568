"""Which model a tuning belongs to: the structure of its blocks, and values of some of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Site, downsamples, find_sites

# Values kept of each group of weights, and blocks of which LoRA's share is looked at.
VALUES, BLOCKS = 16, 8
# Share of the values that have to agree: between two dtypes, a few may be rounded either way.
AGREEMENT = 0.9
_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def ordered_sites(model: nn.Module) -> list[Site]:
    """List the transformer blocks in the order in which the model runs them, the same for every family of U-Nets."""
    stages = [prefix + "." for prefix, _ in downsamples(model)]

    def stage(site: Site) -> int:
        return next((i for i, prefix in enumerate(stages) if site.name.startswith(prefix)), len(stages))

    return sorted(find_sites(model), key=stage)


def structure_of(sites: Sequence[Site]) -> str:
    """Return a fingerprint of the blocks: their levels, channels and heads. The same for LDM and diffusers."""
    levels = repr([(site.downsample, site.channels, site.heads) for site in sites])
    return hashlib.sha256(levels.encode()).hexdigest()[:8]


@torch.no_grad()
def weights_of(model: nn.Module) -> str:
    """Return values of some of the model's weights, for `agree`.

    The first convolution, the first linear layer, which is the timestep's in a U-Net, and the norms of the blocks, or
    of queries in a transformer: fine-tuning changes all of them, LoRA none.
    """
    first = (next((m for m in model.modules() if isinstance(m, kind)), None) for kind in (nn.Conv2d, nn.Linear))
    norms = [getattr(site.attn, "norm_q", None) or getattr(site.block, "norm1", None) for site in ordered_sites(model)]
    groups = [*([module] for module in first), norms]
    return " ".join(_values([getattr(module, "weight", None) for module in group]) for group in groups)


@torch.no_grad()
def adapters_of(model: nn.Module) -> str:
    """Return values of attention's weights, with LoRA added, fused or not, for `agree`."""
    sites = ordered_sites(model)
    return " ".join(
        _values([_effective(getattr(site.attn, "to_q", None))]) for site in sites[:: -(-len(sites) // BLOCKS)]
    )


def _effective(linear: Any) -> Any:
    """A linear layer's weight; peft keeps what is not fused beside it."""
    weight = getattr(linear, "weight", None)
    if not _readable(weight) or getattr(linear, "merged", False):
        return weight
    names = [name for name in getattr(linear, "active_adapters", ()) if name in getattr(linear, "lora_A", ())]
    return sum((linear.get_delta_weight(name) for name in names), weight.data)


def _readable(weight: Any) -> bool:
    """Whether a weight is there and as it was trained: neither quantised nor left on disk."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    return plain and str(weight.dtype).removeprefix("torch.") in _DTYPES


def _values(weights: Sequence[Any]) -> str:
    """Write some values of weights as text: their dtype, and 32 bits of each. "-" where they cannot be read."""
    if not weights or not all(map(_readable, weights)):
        return "-"
    each = -(-VALUES // len(weights))
    picked = [w.detach().flatten()[:: max(1, w.numel() // each)][:each].to("cpu", torch.float32) for w in weights]
    values = torch.cat(picked)[:: max(1, len(picked) * each // VALUES)][:VALUES]
    return f"{str(weights[0].dtype).removeprefix('torch.')}:{values.numpy().astype('<f4').tobytes().hex()}"


def agree(stored: str, found: str) -> bool:
    """Whether two texts of `weights_of` or `adapters_of` are of the same weights, perhaps in other dtypes.

    What could not be read in either does not count.
    """
    return all(_same(*pair) for pair in zip(stored.split(), found.split(), strict=False) if "-" not in pair)


def _same(*texts: str) -> bool:
    try:
        names, values = zip(*(text.split(":") for text in texts), strict=True)
        coarse = max((getattr(torch, _DTYPES[_DTYPES.index(name)]) for name in names), key=lambda d: torch.finfo(d).eps)
        x, y = (torch.frombuffer(bytearray.fromhex(v), dtype=torch.float32).to(coarse).float() for v in values)
        return torch.isclose(x, y, rtol=1e-5, atol=0).float().mean().item() >= AGREEMENT
    except (ValueError, RuntimeError, AttributeError):  # forged, or of a dtype that is not known here
        return False
