"""Differences between hosts and their versions: AUTOMATIC1111 WebUI, Forge, reForge.

The only file that imports the WebUI, apart from the script itself. A feature that a host lacks counts as off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from modules import scripts, sd_models, shared
from modules.ui_components import InputAccordion
from PIL import Image
from torch import Tensor, nn

from ..config import AgentConfig
from ..hosts import UnsupportedModelError, find_sites, find_unet
from ..panel.host import Busy, Hint
from ..settings import table

__all__ = [
    "HOST",
    "InputAccordion",
    "config_of",
    "current_unet",
    "first_image",
    "kv_context",
    "loaded_unet",
    "obstacles",
    "replaced_blocks",
    "xyz_grids",
]

TOKEN_MERGING = "the WebUI's own token merging is on"
HYPERTILE = "HyperTile is on"


def current_unet() -> nn.Module | None:
    """Return the U-Net of the current checkpoint; a refiner replaces it in the middle of a pass."""
    try:
        return find_unet(shared.sd_model)
    except UnsupportedModelError:
        return None


def loaded_unet() -> nn.Module | None:
    """Return the U-Net of the current checkpoint; None if none is loaded yet. Never loads one."""
    return None if getattr(sd_models.model_data, "sd_model", None) is None else current_unet()


def kv_context() -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None:
    """Return AUTOMATIC1111's hypernetworks as a `kv_context`; None if none are loaded."""
    if not getattr(shared, "loaded_hypernetworks", None):
        return None
    from modules.hypernetworks.hypernetwork import apply_hypernetworks

    # without the attention module, on which it would leave its networks as attributes
    return lambda attn, x: apply_hypernetworks(shared.loaded_hypernetworks, x)


def upcasts() -> bool:
    """Whether the host's options upcast attention to float32."""
    return bool(_option("upcast_attn"))


def config_of(values: Mapping[str, Any], *, hires: bool) -> AgentConfig | None:
    """Make the config of a pass, respecting the host's own options; None if the pass is to be left alone."""
    config = table.to_config(values, hires=hires)
    if config is None or not upcasts():
        return config
    return replace(config, attn_precision="fp32")


def obstacles(p: Any, hires: bool) -> Iterator[str]:
    """Yield the reasons why a pass cannot be patched: other changes to the same layers, or models that bypass them."""
    if _active_sd_unet() is not None:
        yield "an SD Unet (such as TensorRT) replaces the U-Net"
    if _token_merging_ratio(p, hires) > 0:
        yield TOKEN_MERGING
    if _hypertile(hires):
        yield HYPERTILE


def _hypertile(hires: bool) -> bool:
    return bool(_option("hypertile_enable_unet") or (hires and _option("hypertile_enable_unet_secondpass")))


def replaced_blocks(unet: nn.Module) -> bool:
    """Whether another extension (ControlNet's reference, say) has replaced the forward of a transformer block."""
    return any({"forward", "_forward"} & vars(site.block).keys() for site in find_sites(unet))


def first_image(p: Any, processed: Any) -> Image.Image | None:
    """Return the first image of a generation, or its inpainted region; None if there is no image."""
    images = processed.images[processed.index_of_first_image :]
    if not images or not isinstance(images[0], Image.Image):
        return None
    region = getattr(p, "paste_to", None)  # "Inpaint area: only masked"
    if region is None:
        return images[0].convert("RGB")
    x, y, width, height = region
    return images[0].convert("RGB").crop((x, y, x + width, y + height))


class _WebUI:
    """The WebUI as the host of the panel: see `agentsd.panel.host.PanelHost`."""

    def unet(self) -> nn.Module | None:
        return loaded_unet()

    def config(self, values: Mapping[str, Any], hires: bool) -> AgentConfig | None:
        return config_of(values, hires=hires)

    def obstacle(self, hires: bool, img2img: bool) -> Hint | None:
        """Like `obstacles`, but before generation: judged by the options alone."""
        if _hypertile(hires):
            return Hint(HYPERTILE, ("Settings → HyperTile",))
        ratio = _option("token_merging_ratio_hr") if hires else img2img and _option("token_merging_ratio_img2img")
        if (ratio or _option("token_merging_ratio") or 0) > 0:
            return Hint(TOKEN_MERGING, ("Settings → Optimizations",))
        return None

    def advice(self, values: Mapping[str, Any]) -> list[Hint]:
        """Advise 32 bits where half precision may overflow."""
        if values["fp32"] or not (upcasts() or _is_sd2()):
            return []
        sd2 = "attention of SD 2 models can overflow in half precision"
        reason = "the host's upcast option is on" if upcasts() else sd2
        return [Hint(f"{reason}: 32 bits are advised", ("fp32",))]

    def at_rest(self) -> AbstractContextManager[tuple[nn.Module, Any]]:
        return _model_at_rest()


HOST = _WebUI()


def _is_sd2() -> bool:
    return bool(getattr(sd_models.model_data.sd_model, "is_sd2", False))


@contextmanager
def _model_at_rest() -> Iterator[tuple[nn.Module, Any]]:
    """Reserve the current U-Net and its `kv_context` for a `with` block while nothing is generated.

    Raises:
        Busy: an image is being generated, or no model is loaded.
    """
    from modules import devices
    from modules.call_queue import queue_lock

    unet = loaded_unet()
    if unet is None:
        raise Busy("No Stable Diffusion model is loaded.")
    if not queue_lock.acquire(blocking=False):
        raise Busy("An image is being generated: try again when it is done.")
    try:
        _bring_to_device()
        with torch.no_grad(), devices.autocast():
            yield unet, kv_context()
    finally:
        queue_lock.release()


def _bring_to_device() -> None:
    """Load Forge's U-Net to the device: it stays on the CPU until sampling."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    if objects is not None:
        from backend import memory_management

        memory_management.load_model_gpu(objects.unet)


def xyz_grids() -> list[Any]:
    """List the modules of the X/Y/Z plot script, where axes are registered."""
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
