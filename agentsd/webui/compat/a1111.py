"""AUTOMATIC1111's WebUI, whose ways the other WebUIs inherit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from modules import scripts, sd_models, shared
from PIL import Image
from torch import Tensor, nn

from ...app.host import Hint
from ...app.kept_tunings import Kept, Store
from ...config import AgentConfig
from ...hosts import UnsupportedModelError, find_sites, find_unet
from ...settings import schema
from ..settings_page import CLOSENESS

TOKEN_MERGING = "the WebUI's own token merging is on"
SHARED_PACKAGE = "the extension {} has a package of the same name as ours, and its panel now runs on ours"
HYPERTILE = "HyperTile is on"


def option(name: str) -> Any:
    """Return one of the host's options; None if it has no such option."""
    return getattr(shared.opts, name, None)


def unet_of(model: Any) -> nn.Module | None:
    """Return a model's U-Net; None if it has none that can be patched."""
    try:
        return find_unet(model)
    except UnsupportedModelError:
        return None


def _module(name: str) -> Any:
    """Import one of the host's modules; None if it has none of that name."""
    try:
        return import_module(f"modules.{name}")
    except ImportError:
        return None


def _replaced(module: nn.Module, name: str) -> bool:
    """Whether a method on the instance is another than its class's. ControlNet leaves the original there when done."""
    own = vars(module).get(name)
    if own is None:
        return False
    original = getattr(own, "__func__", None) is getattr(type(module), name, None)
    return not (original and own.__self__ is module)


class WebUI:
    """The program that we are installed in; also the panel's host, see `agentsd.app.host.PanelHost`.

    Attributes:
        name: what it is called.
        announces_passes: whether it calls `process_before_every_sampling`. Where it announces batches only, passes are
            recognised by the calls of its `unets`, and `is_hires` tells which one it is.
        plots: names of the modules of its X/Y/Z plot.
    """

    name = "AUTOMATIC1111"
    announces_passes = True
    plots: tuple[str, ...] = ("xyz_grid.py", "scripts.xyz_grid")

    @classmethod
    def is_running(cls) -> bool:
        """Whether this is the WebUI that imports us."""
        return True

    # The model

    def current_unet(self) -> nn.Module | None:
        """Return the U-Net of the current checkpoint; a refiner replaces it in the middle of a pass."""
        return unet_of(shared.sd_model)

    def unet(self) -> nn.Module | None:
        """Return the U-Net of the current checkpoint; None if none is loaded yet. Never loads one."""
        return None if getattr(sd_models.model_data, "sd_model", None) is None else self.current_unet()

    def checkpoint(self) -> str:
        """Return the name of the current checkpoint; empty if none is loaded. Never loads one."""
        model = getattr(sd_models.model_data, "sd_model", None)
        return str(getattr(getattr(model, "sd_checkpoint_info", None), "name", ""))

    def checkpoint_hash(self) -> str:
        """Return the short hash of the current checkpoint; empty if none is loaded or it is not known."""
        model = getattr(sd_models.model_data, "sd_model", None)
        return str(getattr(getattr(model, "sd_checkpoint_info", None), "shorthash", None) or "")

    def kv_context(self) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None:
        """Return AUTOMATIC1111's hypernetworks as a `kv_context`; None if none are loaded."""
        if not getattr(shared, "loaded_hypernetworks", None):
            return None
        from modules.hypernetworks.hypernetwork import apply_hypernetworks

        # without the attention module, on which it would leave its networks as attributes
        return lambda attn, x: apply_hypernetworks(shared.loaded_hypernetworks, x)

    def replaced_blocks(self, unet: nn.Module) -> bool:
        """Whether another extension (ControlNet's reference, say) has replaced the forward of a transformer block."""
        return any(_replaced(site.block, name) for site in find_sites(unet) for name in ("forward", "_forward"))

    # A pass

    def on_end(self, callback: Callable[[Any], None]) -> None:
        """Have `callback(p)` called when a generation has ended in whatever way, where passes are not announced."""

    def unets(self) -> list[nn.Module]:
        """List the U-Nets that may be called next."""
        return [unet for unet in (self.unet(),) if unet is not None]

    def task(self) -> str:
        """Return the host's id of the request that it is working on; empty if it has none."""
        return str(getattr(_module("progress"), "current_task", None) or "")

    def is_hires(self, p: Any) -> bool:
        """Whether `p` is in its hires pass."""
        return bool(getattr(p, "is_hr_pass", False))

    def config(self, values: Mapping[str, Any], hires: bool) -> AgentConfig | None:
        """Make the config of a pass, respecting the host's own options; None if the pass is to be left alone."""
        config = schema.to_config(values, hires=hires)
        if config is None or not self.upcasts():
            return config
        return replace(config, attn_precision="fp32")

    def upcasts(self) -> bool:
        """Whether the host's options upcast attention to float32."""
        return bool(option("upcast_attn"))

    def observes_closeness(self) -> bool:
        """Whether runs are to say how close attention was to full attention: unless the user has switched it off."""
        return option(CLOSENESS) is not False

    def obstacles(self, p: Any, hires: bool) -> Iterator[str]:
        """Yield why a pass cannot be patched: other changes to the same layers, or models that bypass them."""
        if _active_sd_unet() is not None:
            yield "an SD Unet (such as TensorRT) replaces the U-Net"
        if _token_merging_ratio(p, hires) > 0:
            yield TOKEN_MERGING
        if self._hypertile(hires):
            yield HYPERTILE

    def first_image(self, p: Any, processed: Any) -> Image.Image | None:
        """Return the first image of a generation, or its inpainted region; None if there is no image."""
        images = processed.images[processed.index_of_first_image :]
        if not images or not isinstance(images[0], Image.Image):
            return None
        region = getattr(p, "paste_to", None)  # "Inpaint area: only masked"
        if region is None:
            return images[0].convert("RGB")
        x, y, width, height = region
        return images[0].convert("RGB").crop((x, y, x + width, y + height))

    # Tuning

    @cached_property
    def tunings(self) -> Store:
        """The tunings in the host's cache of facts about checkpoints; where it has none, those of this process."""
        return Store(self.cache)

    def cache(self, section: str) -> MutableMapping[str, Any]:
        """Return a section of that cache."""
        try:
            from modules.cache import cache
        except ImportError:
            return self._facts.setdefault(section, {})
        return cache(section)

    @cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        return {}

    def was_stopped(self) -> bool:
        """Whether the user has pressed Skip or Interrupt, or asked for the end of the batch."""
        return any(getattr(shared.state, name, False) for name in ("skipped", "interrupted", "stopping_generation"))

    @contextmanager
    def progress_bar(self) -> Iterator[Callable[[int, int, str], bool]]:
        """Add a job to the host's progress bar for a `with` block, which gets a function of (done, total, text).

        It returns False once the user has pressed Skip or Interrupt. These end the block's work, and not the image that
        it belongs to: after Interrupt, no further image is made.
        """
        state = shared.state
        before = {name: getattr(state, name, None) for name in ("sampling_step", "sampling_steps", "textinfo")}
        if state.job_count > 0:
            state.job_count += 1
        state.nextjob()

        def show(done: int, total: int, text: str) -> bool:
            state.sampling_step, state.sampling_steps, state.textinfo = done, total, text
            return not self.was_stopped()

        try:
            yield show
        finally:
            for name, value in before.items():
                setattr(state, name, value)
            if state.interrupted:
                state.interrupted, state.stopping_generation = False, True
            state.skipped = False

    # The panel

    def kept(self, of: str, size: tuple[int, int]) -> Kept | None:
        """Return the tuning that is kept for the current checkpoint and a pass of a latent of (height, width)."""
        return self.tunings.find(self.checkpoint(), of, size)

    def obstacle(self, hires: bool, img2img: bool) -> Hint | None:
        """Like `obstacles`, but before generation: judged by the options alone."""
        if self._hypertile(hires):
            return Hint(HYPERTILE, ("Settings → HyperTile",))
        ratio = option("token_merging_ratio_hr") if hires else img2img and option("token_merging_ratio_img2img")
        if (ratio or option("token_merging_ratio") or 0) > 0:
            return Hint(TOKEN_MERGING, ("Settings → Optimizations",))
        return None

    def advice(self, values: Mapping[str, Any]) -> list[Hint]:
        """Advise against another extension's panel on our package, and 32 bits where half precision may overflow."""
        return [*self._shared_package(), *self._half_precision(values)]

    def _shared_package(self) -> Iterator[Hint]:
        if name := self.namesake():
            yield Hint(SHARED_PACKAGE.format(name), ("Extensions",))

    def _half_precision(self, values: Mapping[str, Any]) -> list[Hint]:
        if values["fp32"] or not (self.upcasts() or self.is_sd2()):
            return []
        sd2 = "attention of SD 2 models can overflow in half precision"
        reason = "the host's upcast option is on" if self.upcasts() else sd2
        return [Hint(f"{reason}: 32 bits are advised", ("fp32",))]

    def xyz_grids(self) -> list[Any]:
        """List the modules of the X/Y/Z plot script, where axes are registered."""
        return [data.module for data in scripts.scripts_data if data.script_class.__module__ in self.plots]

    def category(self) -> Callable[[str, str], Any] | None:
        """Return what registers a category of the settings page by its id and label; None before the host had them."""
        return getattr(getattr(_module("options"), "categories", None), "register_category", None)

    def namesake(self) -> str:
        """Return the name of another active extension that ships a package called agentsd; empty if none does."""
        ours = Path(__file__).resolve().parents[3]
        for other in getattr(_module("extensions"), "active", list)():
            folder = Path(other.path).resolve()
            if folder != ours and (folder / "agentsd" / "__init__.py").is_file():
                return str(other.name)
        return ""

    def pasted(self, reader: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
        """Adapt the reader of a setting, from an infotext's entries to its value or None, to the host's paste."""
        return reader

    def paragraph(self, text: str) -> Any:
        """Make a paragraph between the options of the settings page."""
        return shared.OptionHTML(text)

    def is_sd2(self) -> bool:
        """Whether the loaded model is of Stable Diffusion 2."""
        return bool(getattr(sd_models.model_data.sd_model, "is_sd2", False))

    def _hypertile(self, hires: bool) -> bool:
        return bool(option("hypertile_enable_unet") or (hires and option("hypertile_enable_unet_secondpass")))


def _active_sd_unet() -> Any:
    try:
        from modules import sd_unet
    except ImportError:
        return None
    return getattr(sd_unet, "current_unet", None)


def _token_merging_ratio(p: Any, hires: bool) -> float:
    ratio = getattr(p, "get_token_merging_ratio", None)
    return (ratio(for_hr=hires) if ratio else 0) or 0
