"""Models of the command line: the embedded one, diffusers folders, single files and hub ids."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import embedded
from ..embedded.model import SIZE, EmbeddedPipeline, read_json
from ..hosts import find_unet
from .errors import CommandError, first_line, told

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED = "embedded"
SINGLE_FILES = (".safetensors", ".ckpt")
# diffusers' schedulers, by the names that WebUIs have for them; others keep their own
SAMPLERS = {"PNDM": "PLMS", "EulerDiscrete": "Euler", "EulerAncestralDiscrete": "Euler a", "HeunDiscrete": "Heun"}
SAMPLERS |= {"DPMSolverMultistep": "DPM++ 2M", "LMSDiscrete": "LMS", "UniPCMultistep": "UniPC"}
NOT_CACHED = "{} is no folder and not in the local cache of the hub; --download fetches it"
NO_CONFIG = " (a single file needs a configuration: --config names a diffusers folder of its kind, --download gets one)"


def _xl(channels: tuple[int, ...], layers: Any, crossing: str, embedding: int) -> dict[str, Any]:
    """Configure a U-Net of XL's kind; `crossing` has an "x" for each level with cross-attention."""
    down = ["CrossAttnDownBlock2D" if each == "x" else "DownBlock2D" for each in crossing]
    made = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    made |= {"block_out_channels": channels, "attention_head_dim": tuple(each // 64 for each in channels)}
    made |= {"down_block_types": tuple(down), "up_block_types": tuple(k.replace("Down", "Up") for k in reversed(down))}
    made |= {"transformer_layers_per_block": layers, "projection_class_embeddings_input_dim": embedding}
    return {**made, "sample_size": 128}


# What diffusers' configuration of a single file's U-Net has beside that of Stable Diffusion 1, by the width of the
# prompt's context and the number of transformer blocks: Stable Diffusion 1, 2, XL, and XL's refiner
UNETS: Mapping[tuple[int, int], dict[str, Any]] = {
    (768, 16): {},
    (1024, 16): {"use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    (2048, 70): _xl((320, 640, 1280), (1, 2, 10), ".xx", 2816),
    (1280, 44): _xl((384, 768, 1536, 1536), 4, ".xx.", 2560),
}


@dataclass(frozen=True)
class Request:
    """Picture to draw, of `size` = (height, width) in pixels; None stands for the model's default."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    size: tuple[int, int] | None = None

    @property
    def stem(self) -> str:
        """A short file name."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-")
        return f"{words or 'picture'}-seed{self.seed}"


class Model:
    """A text-to-image pipeline with a U-Net, the embedded one or of diffusers, under the user's name for it."""

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe
        self.unet: Any = find_unet(pipe)
        self.embedded = isinstance(pipe, EmbeddedPipeline)
        self.factor = 1 if self.embedded else getattr(pipe, "vae_scale_factor", 8)  # pixels per position of the latent
        side = SIZE if self.embedded else pipe.unet.config.sample_size * self.factor
        self.defaults: dict[str, Any] = {"steps": 20, "guidance": 3.0 if self.embedded else 7.0, "size": (side, side)}
        scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
        self.sampler = SAMPLERS.get(scheduler, scheduler)  # as a WebUI calls it

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults where the request is None."""
        return replace(request, **{k: v for k, v in self.defaults.items() if getattr(request, k) is None})

    def draw(self, request: Request, step: Callable[[], None]) -> Image:
        """Draw a complete request; `step` is called after each sampling step."""
        size: dict[str, Any] = {"height": request.size[0], "width": request.size[1]}

        def on_step(*_: Any) -> dict[str, Any]:
            step()
            return {}  # it changes no tensors

        if not self.embedded:
            given = {"negative_prompt": request.negative_prompt or None, "num_inference_steps": request.steps, **size}
            given |= {"guidance_scale": request.guidance, "generator": torch.Generator().manual_seed(request.seed)}
            return self.pipe(request.prompt, **given, callback_on_step_end=on_step).images[0]
        if request.negative_prompt:
            raise CommandError("the embedded model takes no negative prompt")
        given = {"seed": request.seed, "steps": request.steps, "guidance": request.guidance, **size}
        with told(f"{request.prompt!r} cannot be drawn", ValueError):  # an unknown word
            return self.pipe(request.prompt, **given, callback=on_step)[0]


def open_model(
    name: str, *, download: bool = False, config: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Model:
    """Load the embedded model, a diffusers folder, a single file, which `config` tells how to read, or a hub id."""
    if device == "auto":
        device = next((kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()), "cpu")
    with told(f"device {device!r} cannot be used", RuntimeError, AssertionError):
        where = torch.empty(0, device=device).device
    kind = getattr(torch, ("float32" if where.type == "cpu" else "float16") if dtype == "auto" else dtype)
    if name == EMBEDDED:
        return Model(name, embedded.load(where, kind))
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    # old versions support only torch_dtype, about which new ones warn
    warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
    single = Path(name).suffix in SINGLE_FILES
    load = _load_single_file(Path(name), kind, config, download) if single else _load_pretrained(name, kind, download)
    load.set_progress_bar_config(disable=True)
    return Model(name, load.to(where))


def _load_pretrained(name: str, dtype: torch.dtype, download: bool) -> Any:
    from diffusers import AutoPipelineForText2Image

    options = {"torch_dtype": dtype, "local_files_only": not download}
    errors: list[Exception] = []
    for variant in (None, "fp16"):  # many models on the hub have weights in half precision only
        try:
            return AutoPipelineForText2Image.from_pretrained(folder_or_hub_id(name), variant=variant, **options)
        except (OSError, ValueError) as error:
            errors.append(error)
    missing = not Path(name).exists() and not download
    text = NOT_CACHED.format(name) if missing else f"{name} cannot be loaded: {first_line(errors[0])}"
    raise CommandError(text) from errors[0]


def _load_single_file(path: Path, dtype: torch.dtype, config: str | None, download: bool) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    shapes = shapes_of(path)
    xl = any(name.startswith("conditioner.embedders.1.") for name in shapes)
    cls = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    with told(f"{path} cannot be loaded", OSError, ValueError, RuntimeError, KeyError, hint=NO_CONFIG):
        config = config or fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
        if not Path(config).is_dir():  # diffusers would ask the hub even where only local files are allowed
            config = snapshot_download(config, local_files_only=not download, allow_patterns=["*.json", "*.txt"])
        return cls.from_single_file(str(path), config=config, torch_dtype=dtype, local_files_only=True)


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


def shapes_of(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without their values, on the meta device."""
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    # readers raise all kinds of errors for a file that is no checkpoint
    with told(f"{path} is no checkpoint that can be read", Exception):
        if path.suffix == ".ckpt":
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return {k: v for k, v in state.get("state_dict", state).items() if isinstance(v, Tensor)}
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


# U-Nets without weights, for commands that need only their structure


def bare_unet(name: str, download: bool = False) -> tuple[nn.Module, int, int]:
    """Build a U-Net on the meta device; return it, its default latent size, and the pixels per latent position."""
    from diffusers import UNet2DConditionModel

    if name == EMBEDDED:
        config = read_json("config.json")["unet"]
    elif Path(name).suffix in SINGLE_FILES:
        config = config_of_checkpoint(name, shapes_of(Path(name)))
    else:
        try:
            given = {"subfolder": "unet", "local_files_only": not download}
            config = UNet2DConditionModel.load_config(folder_or_hub_id(name), **given)
        except (OSError, ValueError) as error:
            no_unet = f"{name} has no U-Net: there is no unet/config.json"
            raise CommandError(no_unet if Path(name).is_dir() else NOT_CACHED.format(name)) from error
    # an invalid configuration can raise all kinds of errors
    with told(f"the U-Net of {name} cannot be built", Exception), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    return unet, config.get("sample_size") or 64, 1 if name == EMBEDDED else 8


def config_of_checkpoint(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Make diffusers' configuration of the U-Net of an LDM or sgm checkpoint, by the shapes of its tensors."""
    unet = {key: tensor.shape for key, tensor in state.items() if key.startswith("model.diffusion_model.")}
    context = next((shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")), 0)
    known = UNETS.get((context, sum(key.endswith("attn2.to_k.weight") for key in unet)))
    if known is None:
        raise CommandError(f"{name} has no U-Net of Stable Diffusion 1, 2, XL or XL's refiner: give a diffusers folder")
    channels = unet["model.diffusion_model.input_blocks.0.0.weight"][1]
    return {"in_channels": channels, "cross_attention_dim": context, "sample_size": 64, **known}
