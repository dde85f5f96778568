"""What differs between hosts and their versions: AUTOMATIC1111 WebUI, Forge, reForge.

The only file that imports the WebUI, apart from the script itself. Whatever a host does not have counts as not in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from modules import scripts, sd_models, shared
from modules.ui_components import InputAccordion
from torch import Tensor, nn

from agentsd.hosts import UnsupportedModelError, find_sites, find_unet

__all__ = ["InputAccordion", "current_unet", "first_downsample", "kv_context", "obstacles", "upcasts", "xyz_grids"]


def current_unet() -> nn.Module | None:
    """The U-Net of the checkpoint that is in use now; a refiner changes it in the middle of a pass."""
    try:
        return find_unet(shared.sd_model)
    except UnsupportedModelError:
        return None


def loaded_unet() -> nn.Module | None:
    """The same; None where no checkpoint is loaded yet. Loads none."""
    return None if getattr(sd_models.model_data, "sd_model", None) is None else current_unet()


def first_downsample(unet: nn.Module) -> int:
    """How far down the U-Net its largest self-attention layers are: 1 in SD 1 and 2, 2 in SDXL."""
    return min((site.downsample for site in find_sites(unet) if site.downsample), default=1)


def current_first_downsample() -> int | None:
    """The same for the checkpoint in use; None where none is loaded. Loads none."""
    unet = loaded_unet()
    return None if unet is None else first_downsample(unet)


def kv_context() -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None:
    """What AUTOMATIC1111's attention makes keys and values of: its hypernetworks, where some are loaded."""
    if not getattr(shared, "loaded_hypernetworks", None):
        return None
    from modules.hypernetworks.hypernetwork import apply_hypernetworks

    return lambda attn, x: apply_hypernetworks(shared.loaded_hypernetworks, x, attn)


def upcasts() -> bool:
    """Whether the host is told to compute attention in float32."""
    return bool(_option("upcast_attn"))


def obstacles(p: Any, hires: bool) -> Iterator[str]:
    """Why a pass cannot be patched: others that change the same layers, or models that never reach them."""
    if _active_sd_unet() is not None:
        yield "a SD Unet (such as TensorRT) is active and takes the U-Net's place"
    if _token_merging_ratio(p, hires) > 0:
        yield "the WebUI's own token merging is on"
    if _option("hypertile_enable_unet") or (hires and _option("hypertile_enable_unet_secondpass")):
        yield "HyperTile is on"


def replaced_blocks(unet: nn.Module) -> bool:
    """Whether another extension has put a forward of its own on a transformer block (ControlNet's reference, say)."""
    return any({"forward", "_forward"} & vars(site.block).keys() for site in find_sites(unet))


def xyz_grids() -> list[Any]:
    """The modules of the X/Y/Z plot script, where axes are registered."""
    names = ("xyz_grid.py", "scripts.xyz_grid")
    return [data.module for data in scripts.scripts_data if data.script_class.__module__ in names]


def _option(name: str) -> Any:
    return getattr(shared.opts, name, None)


def _active_sd_unet() -> Any:
    try:
        from modules import sd_unet
    except ImportError:
        return None
    return getattr(sd_unet, "current_unet", None)


def _token_merging_ratio(p: Any, hires: bool) -> float:
    ratio = getattr(p, "get_token_merging_ratio", None)
    return (ratio(for_hr=hires) if ratio else 0) or 0
