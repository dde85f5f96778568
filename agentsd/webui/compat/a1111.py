"""AUTOMATIC1111's WebUI, whose ways the other WebUIs inherit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from importlib import import_module
from pathlib import Path
from time import perf_counter
from types import MappingProxyType, SimpleNamespace
from typing import Any

from modules import scripts, sd_models, shared
from PIL import Image
from torch import Tensor, nn

from ...app.decision import Hint, Program, SamplingPass, Schedule, evenly
from ...app.kept_tunings import Kept, Store
from ...app.timings import Timings
from ...attention.grid import Grid
from ...clock import WALL
from ...hosts import UnsupportedModelError, find_sites, find_unet
from ...schedule import progress_of
from ...settings import infotext, tunings
from ..settings_page import EVEN_IF_SLOWER

TOKEN_MERGING = "the WebUI's own token merging is on"
SHARED_PACKAGE = "the extension {} has a package of the same name as ours, and its panel now runs on ours"
HYPERTILE = "HyperTile is on"
PLOTS = ("xyz_grid.py", "scripts.xyz_grid")  # names of the modules of the X/Y/Z plot


def unet_of(model: Any) -> nn.Module | None:
    with suppress(UnsupportedModelError):
        return find_unet(model)
    return None


def _module(name: str) -> Any:
    with suppress(ImportError):
        return import_module(f"modules.{name}")
    return None


def _replaced(module: nn.Module, name: str) -> bool:
    """Whether a method on the instance is another than its class's, which ControlNet leaves there when done."""
    own, original = vars(module).get(name), getattr(type(module), name, None)
    return own is not None and own != (original and original.__get__(module))


class WebUI(Program):
    """The program that we are installed in."""

    p: Any = None  # the host's processing object that decisions are about; None: about what the page shows
    options: Mapping[str, Any] = MappingProxyType({})  # those of its page's override settings, by name
    clock = WALL  # times layers on an accelerator
    now = staticmethod(perf_counter)  # of U-Net calls, on a CPU
    # whether it calls `process_before_every_sampling`; otherwise passes are recognised by the calls of its `unets`
    announces_passes = True

    @classmethod
    def is_running(cls) -> bool:
        return True

    # The model

    def model(self, name: str = "sd_model") -> Any:
        """Return the loaded model; None if there is none yet. Never loads one, as `shared.sd_model` does."""
        return getattr(sd_models.model_data, name, None)

    def unet(self) -> nn.Module | None:
        return unet_of(self.model())  # a refiner's in the middle of a pass

    def unets(self) -> list[nn.Module]:
        """List the loaded U-Nets, a refiner's too."""
        return [unet for unet in (self.unet(), unet_of(self.model("sd_refiner"))) if unet is not None]

    def checkpoint(self, what: str = "name") -> str:
        return str(getattr(getattr(self.model(), "sd_checkpoint_info", None), what, None) or "")

    def conditions(self) -> Mapping[str, str]:
        """Name the networks that the images are made with, with their weights."""
        networks = getattr(self.p, "extra_network_data", None)
        if networks is None:
            return {}
        names = (" ".join(map(str, one.items[:2])) for each in networks.values() for one in each)
        return {"lora": " + ".join(sorted(names))}

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

    def task(self) -> str:
        """Return the host's id of the request that it is working on; empty if it has none."""
        return str(getattr(_module("progress"), "current_task", None) or "")

    def is_hires(self, p: Any) -> bool:
        return bool(getattr(p, "is_hr_pass", False))

    def sampling(self, p: Any, hires: bool, size: tuple[int, int] | None = None) -> SamplingPass:
        """Describe a pass of `p`; `size` is its latent's (height, width), if the host provides the latent."""

        def given(*names: str) -> Any:
            return next(filter(None, (getattr(p, name, None) for name in names)), 0)

        # SD.Next has an empty list of images where there are none
        of = tunings.HIRES if hires else tunings.IMG2IMG if given("init_images") else tunings.FIRST
        sides = ("hr_upscale_to_y", "hr_upscale_to_x") if hires else ("height", "width")
        latent = size or Grid.of_pixels(*(int(given(side)) for side in sides))
        if not given("steps"):
            return SamplingPass(latent, of)
        sampler, scheduler = (given(f"{'hr_' * hires}{name}", name) or "" for name in ("sampler_name", "scheduler"))
        asked = map(given, ("steps", "hr_second_pass_steps", "denoising_strength"))
        return SamplingPass(latent, of, self.moments(of, *asked, self.schedule(sampler, scheduler)))  # type: ignore[call-arg]

    def schedule(self, sampler: str, scheduler: str) -> Schedule:
        try:
            made = _module("sd_samplers").create_sampler(sampler, self.model())
        except Exception:  # there is none of that name, or no model is loaded
            return Schedule()

        def progress(steps: int) -> Sequence[float]:
            try:
                return _progress(made, scheduler, steps)
            except Exception:  # another WebUI's samplers may be of another kind
                return evenly(steps)

        return Schedule(progress, 1 if hasattr(made, "get_sigmas") else -1)

    def other_checkpoint(self) -> str:
        wanted = self.options.get("sd_model_checkpoint")
        name = self._checkpoint_named(str(wanted)) if wanted else ""
        return "" if name == self.checkpoint() else name

    def _checkpoint_named(self, title: str) -> str:
        """Return the name of a checkpoint by what the page calls it."""
        find = getattr(sd_models, "get_closet_checkpoint_match", lambda title: None)
        return str(getattr(find(title), "name", title))

    def makes_all_steps(self) -> bool:
        return bool(self.option("img2img_fix_steps"))

    def rows(self, p: Any) -> int:
        return 2 * (getattr(p, "batch_size", None) or 1)  # cond and uncond of each image

    def program(self, p: Any) -> WebUI:
        """Return the program as it makes the images of `p`."""
        view = copy(self)
        view.p = p
        return view

    def with_options(self, texts: Sequence[str]) -> WebUI:
        view = copy(self)
        module = _module("infotext_utils") or _module("generation_parameters_copypaste")
        view.options = getattr(module, "create_override_settings_dict", lambda texts: {})(list(texts))
        return view

    def option(self, name: str) -> Any:
        """Return an option, as the override settings have it; None if there is none."""
        return self.options[name] if name in self.options else getattr(shared.opts, name, None)

    def upcasts(self) -> bool:
        return bool(self.option("upcast_attn"))

    def even_if_slower(self, values: Mapping[str, Any]) -> bool:
        # an image's infotext was pasted to make that image again
        return bool(self.option(EVEN_IF_SLOWER)) or infotext.was_pasted(values)

    def obstacle(self, sampling: SamplingPass) -> Hint | None:
        if getattr(_module("sd_unet"), "current_unet", None) is not None:
            return Hint("an SD Unet (such as TensorRT) replaces the U-Net", ("Settings → Stable Diffusion",))
        if self._token_merging(sampling.of) > 0:
            return Hint(TOKEN_MERGING, ("Settings → Optimizations",))
        names = ("hypertile_enable_unet", *(["hypertile_enable_unet_secondpass"] if sampling.hires else []))
        return Hint(HYPERTILE, ("Settings → HyperTile",)) if any(map(self.option, names)) else None

    def _token_merging(self, of: str) -> float:
        if self.p is not None:
            return getattr(self.p, "get_token_merging_ratio", lambda for_hr: 0)(for_hr=of == tunings.HIRES) or 0
        own = {tunings.HIRES: "token_merging_ratio_hr", tunings.IMG2IMG: "token_merging_ratio_img2img"}.get(of, "")
        overridden = of == tunings.IMG2IMG and self.options.get("token_merging_ratio")
        return overridden or (own and self.option(own)) or self.option("token_merging_ratio") or 0

    def first_image(self, p: Any, processed: Any) -> Image.Image | None:
        """Return the first image of a generation, or its inpainted region; None if there is no image."""
        images = processed.images[processed.index_of_first_image :]
        if not images or not isinstance(images[0], Image.Image):
            return None
        x, y, width, height = getattr(p, "paste_to", None) or (0, 0, *images[0].size)  # "Inpaint area: only masked"
        return images[0].convert("RGB").crop((x, y, x + width, y + height))

    # Tuning

    @cached_property
    def tunings(self) -> Store:
        """The tunings in the host's cache of facts about checkpoints; where it has none, those of this process."""
        return Store(self.cache)

    @cached_property
    def timings(self) -> Timings:  # type: ignore[override]
        return Timings(self.cache)

    def cache(self, section: str) -> MutableMapping[str, Any]:
        host = _module("cache")
        return _FACTS.setdefault(section, {}) if host is None else host.cache(section)

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
        before = state.sampling_step, state.sampling_steps, state.textinfo
        if state.job_count > 0:
            state.job_count += 1
        state.nextjob()

        def show(*told: Any) -> bool:
            state.sampling_step, state.sampling_steps, state.textinfo = told
            return not self.was_stopped()

        try:
            yield show
        finally:
            show(*before)
            if state.interrupted:
                state.interrupted, state.stopping_generation = False, True
            state.skipped = False

    # The panel

    def kept(self, sampling: SamplingPass) -> Kept | None:
        name = self._checkpoint_named(sampling.checkpoint) if sampling.checkpoint else self.checkpoint()
        return self.tunings.find(name, sampling.of, sampling.latent)

    def advice(self, values: Mapping[str, Any]) -> list[Hint]:
        """Advise against another extension's panel on our package, and 32 bits where half precision may overflow."""
        name = self.namesake()
        hints = [Hint(SHARED_PACKAGE.format(name), ("Extensions",))] if name else []
        sd2 = "attention of SD 2 models can overflow in half precision" if self.is_sd2() else ""
        reason = "the host's upcast option is on" if self.upcasts() else sd2
        if reason and not values["fp32"]:
            hints.append(Hint(f"{reason}: 32 bits are advised", ("fp32",)))
        return hints

    def xyz_grids(self) -> list[Any]:
        """List the modules of the X/Y/Z plot script, where axes are registered."""
        return [data.module for data in scripts.scripts_data if data.script_class.__module__ in PLOTS]

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

    def is_sd2(self) -> bool:
        return bool(getattr(self.model(), "is_sd2", False))


def _progress(sampler: Any, scheduler: str, steps: int) -> list[float]:
    # of a stand-in, since the sampler writes into its infotext
    p = SimpleNamespace(scheduler=scheduler or "Automatic", is_hr_pass=False, extra_generation_params={})
    p.hr_scheduler, p.sampler_noise_scheduler_override = p.scheduler, None
    if not hasattr(sampler, "get_sigmas"):  # its last timestep is where it ends
        return [progress_of(t) for t in sampler.get_timesteps(p, steps).flip(0).tolist()[:-1]]
    sigmas = sampler.get_sigmas(p, steps)[:-1]
    model = sampler.model_wrap
    return [progress_of(t) for t in model.sigma_to_t(sigmas.to(model.log_sigmas.device)).tolist()]


# In place of a host's cache, while it runs
_FACTS: dict[str, dict[str, Any]] = {}
