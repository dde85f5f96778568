"""Models of the command line: the embedded one, diffusers folders, single files and hub ids."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..hosts import find_unet
from .errors import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED = "embedded"
SINGLE_FILES = (".safetensors", ".ckpt")
# diffusers' schedulers, by the names that WebUIs have for them; others keep their own
SAMPLERS = {"PNDM": "PLMS", "EulerDiscrete": "Euler", "EulerAncestralDiscrete": "Euler a", "HeunDiscrete": "Heun"}
SAMPLERS |= {"DPMSolverMultistep": "DPM++ 2M", "LMSDiscrete": "LMS", "UniPCMultistep": "UniPC"}
NOT_CACHED = "{} is no folder and not in the local cache of the hub; --download fetches it"
NO_CONFIG = "a single file needs a configuration: --config names a diffusers folder of its kind, --download fetches one"


@dataclass(frozen=True)
class Request:
    """Picture to draw.

    Attributes:
        prompt: the text.
        seed: seed of the initial noise.
        steps: sampling steps; None for the model's default, as in the fields below.
        guidance: scale of classifier-free guidance.
        negative: the negative prompt.
        size: (height, width) in pixels.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None


class Model:
    """A text-to-image model with a U-Net.

    Attributes:
        name: name given by the user.
        pipe: the pipeline.
        unet: the U-Net.
        factor: pixels per position of the latent, along one side.
        sampler: the sampler's name, as a WebUI calls it.
        defaults: steps, guidance and size of a request that names none.
    """

    factor: int
    sampler: str
    defaults: dict[str, Any]

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe
        self.unet: nn.Module = find_unet(pipe)

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults where the request is None."""
        return replace(request, **{k: v for k, v in self.defaults.items() if getattr(request, k) is None})

    def draw(self, request: Request, step: Callable[[], Any]) -> Image:
        """Draw a complete request; `step` is called after each sampling step."""
        raise NotImplementedError


class EmbeddedModel(Model):
    """The model that ships with the library."""

    factor, sampler, defaults = 1, "DDIM", {"steps": 20, "guidance": 3.0, "size": (64, 64)}

    def __init__(self, pipe: Any) -> None:
        super().__init__(EMBEDDED, pipe)

    def draw(self, request: Request, step: Callable[[], Any]) -> Image:
        if request.negative:
            raise CommandError("the embedded model takes no negative prompt")
        height, width = request.size
        options = {"seed": request.seed, "steps": request.steps, "guidance": request.guidance}
        options |= {"height": height, "width": width, "callback": lambda number, steps: step()}
        try:
            return self.pipe(request.prompt, **options)[0]
        except ValueError as error:  # an unknown word
            raise CommandError(str(error)) from error


class DiffusersModel(Model):
    """A diffusers pipeline."""

    def __init__(self, name: str, pipe: Any) -> None:
        super().__init__(name, pipe)
        self.factor = getattr(pipe, "vae_scale_factor", 8)
        scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
        self.sampler = SAMPLERS.get(scheduler, scheduler)
        self.defaults = {"steps": 20, "guidance": 7.0, "size": (self.unet.config.sample_size * self.factor,) * 2}
        pipe.set_progress_bar_config(disable=True)

    def draw(self, request: Request, step: Callable[[], Any]) -> Image:
        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step()
            return tensors

        height, width = request.size
        return self.pipe(
            request.prompt,
            negative_prompt=request.negative or None,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=after_step,
        ).images[0]


def open_model(
    name: str, *, download: bool = False, config: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Model:
    """Load a model.

    Args:
        name: "embedded", a diffusers folder, a single-file checkpoint, or a hub id.
        download: download a hub id that is not in the local cache.
        config: for a single file, a diffusers folder or hub id of the same architecture.
        device: "auto", or a torch device.
        dtype: "auto" (float16 on a GPU, else float32), or the name of a torch dtype.

    Raises:
        CommandError: the model does not exist, or it cannot be loaded.
    """
    where = _device(device)
    kind = getattr(torch, ("float32" if where.type == "cpu" else "float16") if dtype == "auto" else dtype)
    try:
        if name == EMBEDDED:
            from .. import embedded

            return EmbeddedModel(embedded.load(where, kind))
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        # old versions support only torch_dtype, about which new ones warn
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        if Path(name).suffix in SINGLE_FILES:
            pipe = _load_single_file(Path(name), kind, config, download)
        else:
            pipe = _load_pretrained(folder_or_hub_id(name), kind, download)
        return DiffusersModel(name, pipe.to(where))
    except ImportError as error:
        raise CommandError(f"this needs {error.name}: pip install 'agentsd[diffusers]'") from error
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        found = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        return torch.device(found[0] if found else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device {name!r} cannot be used: {_first_line(error)}") from error


def _load_pretrained(name: str, dtype: torch.dtype, download: bool) -> Any:
    from diffusers import AutoPipelineForText2Image

    options = {"torch_dtype": dtype, "local_files_only": not download}
    try:
        return AutoPipelineForText2Image.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        try:  # many models on the hub have weights in half precision only
            return AutoPipelineForText2Image.from_pretrained(name, variant="fp16", **options)
        except (OSError, ValueError):
            missing = not Path(name).exists() and not download
            told = NOT_CACHED.format(name) if missing else f"{name} cannot be loaded: {_first_line(error)}"
            raise CommandError(told) from error


def folder_or_hub_id(name: str) -> str:
    """The name, if it is a diffusers folder or can be a hub id."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"{name} is no diffusers pipeline: it has no model_index.json")
    elif folder.exists():
        raise CommandError(f"{name} is neither a folder nor a {' or '.join(SINGLE_FILES)} file")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CommandError(f"there is no folder or file {name}, and it is no hub id (owner/name)")
    return name


def _load_single_file(path: Path, dtype: torch.dtype, config: str | None, download: bool) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    shapes = shapes_of(path)
    xl = any(name.startswith("conditioner.embedders.1.") for name in shapes)
    cls = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    try:
        config = config or fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
        if not Path(config).is_dir():  # diffusers would ask the hub even where only local files are allowed
            patterns = ["**/*.json", "*.json", "**/*.txt"]
            config = snapshot_download(config, local_files_only=not download, allow_patterns=patterns)
        return cls.from_single_file(str(path), config=config, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CommandError(f"{path} cannot be loaded: {_first_line(error)} ({NO_CONFIG})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shapes_of(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint without their values, on the meta device."""
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    try:
        if path.suffix == ".ckpt":
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return {k: v for k, v in state.get("state_dict", state).items() if isinstance(v, torch.Tensor)}
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # readers raise all kinds of errors for a file that is no checkpoint
        raise CommandError(f"{path} is no checkpoint that can be read: {_first_line(error)}") from error
