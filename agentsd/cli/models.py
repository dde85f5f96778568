"""Models of the command line: the embedded one, diffusers folders, single files and hub ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..hosts import find_unet
from .errors import CommandError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from ..embedded import EmbeddedPipeline

EMBEDDED = "embedded"
SINGLE_FILES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Request:
    """Picture to draw.

    Attributes:
        prompt: the text.
        seed: seed of the initial noise.
        steps: sampling steps; None for the model's default.
        guidance: scale of classifier-free guidance; None for the model's default.
        negative: the negative prompt.
        size: (height, width) in pixels; None for the model's default.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None


class Model(Protocol):
    """A text-to-image model with a U-Net.

    Attributes:
        name: name given by the user.
        unet: the U-Net.
        factor: pixels per position of the latent, along one side.
    """

    name: str
    unet: nn.Module
    factor: int

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults where the request is None."""

    def draw(self, request: Request, step: Callable[[], Any]) -> Image:
        """Draw a complete request; `step` is called after each sampling step."""


class EmbeddedModel:
    """The model that ships with the library."""

    factor = 1
    name = EMBEDDED

    def __init__(self, pipe: EmbeddedPipeline) -> None:
        self.pipe, self.unet = pipe, pipe.unet

    def complete(self, request: Request) -> Request:
        return _filled(request, steps=20, guidance=3.0, size=(64, 64))

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


class DiffusersModel:
    """A diffusers pipeline."""

    def __init__(self, name: str, pipe: DiffusionPipeline) -> None:
        self.name, self.pipe = name, pipe
        self.unet = find_unet(pipe)
        self.factor = getattr(pipe, "vae_scale_factor", 8)
        pipe.set_progress_bar_config(disable=True)

    def complete(self, request: Request) -> Request:
        side = self.unet.config.sample_size * self.factor
        return _filled(request, steps=20, guidance=7.0, size=(side, side))

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


def _filled(request: Request, **defaults: Any) -> Request:
    return replace(request, **{name: value for name, value in defaults.items() if getattr(request, name) is None})


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
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    if name == EMBEDDED:
        return EmbeddedModel(_load_embedded(torch_device, torch_dtype))
    with _libraries():
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        # old versions support only torch_dtype, about which new ones warn
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        if Path(name).suffix in SINGLE_FILES:
            pipe = _load_single_file(Path(name), torch_dtype, config, download)
        else:
            pipe = _load_pretrained(name, torch_dtype, download)
    return DiffusersModel(name, pipe.to(torch_device))


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    return getattr(torch, ("float32" if device.type == "cpu" else "float16") if name == "auto" else name)


@contextmanager
def _libraries() -> Iterator[None]:
    """Report a missing library and how to install it."""
    try:
        yield
    except ImportError as error:
        raise CommandError(f"this needs {error.name}: pip install 'agentsd[diffusers]'") from error


def _load_embedded(device: torch.device, dtype: torch.dtype) -> EmbeddedPipeline:
    from .. import embedded

    try:
        return embedded.load(device, dtype)
    except (ImportError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def _load_pretrained(name: str, dtype: torch.dtype, download: bool) -> DiffusionPipeline:
    from diffusers import AutoPipelineForText2Image

    source = folder_or_hub_id(name)
    options = {"torch_dtype": dtype, "local_files_only": not download}
    try:
        return AutoPipelineForText2Image.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        try:  # many models on the hub have weights in half precision only
            return AutoPipelineForText2Image.from_pretrained(source, variant="fp16", **options)
        except (OSError, ValueError):
            raise CommandError(_not_loaded(name, error, download)) from error


def folder_or_hub_id(name: str) -> str:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"{name} is no diffusers pipeline: it has no model_index.json")
    elif folder.exists():
        raise CommandError(f"{name} is neither a folder nor a {' or '.join(SINGLE_FILES)} file")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CommandError(f"there is no folder or file {name}, and it is no hub id (owner/name)")
    return name


def _not_loaded(name: str, error: Exception, download: bool) -> str:
    if not Path(name).exists() and not download:
        return f"{name} is no folder and not in the local cache of the hub; --download fetches it"
    return f"{name} cannot be loaded: {str(error).strip().splitlines()[0]}"


def _load_single_file(path: Path, dtype: torch.dtype, config: str | None, download: bool) -> DiffusionPipeline:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    folder = Path(config_folder(path, config, download))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = StableDiffusionXLPipeline if "XL" in index["_class_name"] else StableDiffusionPipeline
    try:
        return cls.from_single_file(str(path), config=str(folder), torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CommandError(f"{path} cannot be loaded with the configuration {folder}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def config_folder(path: Path, config: str | None, download: bool) -> str:
    """Find a folder with a single file's configuration and tokenizer: `config`, or one of its kind in the cache."""
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    if config is not None and Path(config).is_dir():
        return config
    from huggingface_hub import snapshot_download

    source = config or _usual_config(path)
    try:
        return snapshot_download(
            source, local_files_only=not download, allow_patterns=["**/*.json", "*.json", "**/*.txt"]
        )
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{path} is a single file, and the configuration for it, {source}, is not in the local cache of the hub; "
            "--config names a diffusers folder of the same architecture, --download fetches it"
        ) from error


def _usual_config(path: Path) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return fetch_diffusers_config(shapes_of(path))["pretrained_model_name_or_path"]


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
