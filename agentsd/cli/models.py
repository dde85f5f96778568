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
_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Request:
    """Picture to draw, of `size` = (height, width) in pixels; None stands for the model's default."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None

    @property
    def stem(self) -> str:
        """A short file name."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-")
        return f"{words or 'picture'}-seed{self.seed}"


class Model:
    """A text-to-image model with a U-Net: its pipeline under the user's name for it."""

    factor: int  # pixels per position of the latent, along one side
    sampler: str  # as a WebUI calls it
    defaults: dict[str, Any]  # of a request

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe
        self.unet: Any = find_unet(pipe)

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults where the request is None."""
        return replace(request, **{k: v for k, v in self.defaults.items() if getattr(request, k) is None})

    def draw(self, request: Request, step: Callable[[], None]) -> Image:
        """Draw a complete request; `step` is called after each sampling step."""
        raise NotImplementedError


class EmbeddedModel(Model):
    """The model that ships with the library."""

    factor, sampler, defaults = 1, "DDIM", {"steps": 20, "guidance": 3.0, "size": (64, 64)}

    def __init__(self, pipe: Any) -> None:
        super().__init__(EMBEDDED, pipe)

    def draw(self, request: Request, step: Callable[[], None]) -> Image:
        if request.negative:
            raise CommandError("the embedded model takes no negative prompt")
        given = {"seed": request.seed, "steps": request.steps, "guidance": request.guidance}
        given |= {"height": request.size[0], "width": request.size[1]}
        try:
            return self.pipe(request.prompt, **given, callback=lambda number, steps: step())[0]
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

    def draw(self, request: Request, step: Callable[[], None]) -> Image:
        given: dict[str, Any] = {"negative_prompt": request.negative or None, "num_inference_steps": request.steps}
        given |= {"guidance_scale": request.guidance, "height": request.size[0], "width": request.size[1]}
        given |= {"generator": torch.Generator().manual_seed(request.seed)}

        def on_step(*_: Any) -> dict[str, Any]:
            step()
            return {}  # it changes no tensors

        return self.pipe(request.prompt, **given, callback_on_step_end=on_step).images[0]


def open_model(
    name: str, *, download: bool = False, config: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Model:
    """Load the embedded model, a diffusers folder, a single file, which `config` tells how to read, or a hub id.

    A CommandError says why it cannot be loaded.
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
        return torch.device(next((kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()), "cpu"))
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device {name!r} cannot be used: {_first_line(error)}") from error


def _load_pretrained(name: str, dtype: torch.dtype, download: bool) -> Any:
    from diffusers import AutoPipelineForText2Image

    options = {"torch_dtype": dtype, "local_files_only": not download}
    errors = []
    for variant in (None, "fp16"):  # many models on the hub have weights in half precision only
        try:
            return AutoPipelineForText2Image.from_pretrained(name, variant=variant, **options)
        except (OSError, ValueError) as error:
            errors.append(error)
    missing = not Path(name).exists() and not download
    told = NOT_CACHED.format(name) if missing else f"{name} cannot be loaded: {_first_line(errors[0])}"
    raise CommandError(told) from errors[0]


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
            config = snapshot_download(config, local_files_only=not download, allow_patterns=["*.json", "*.txt"])
        return cls.from_single_file(str(path), config=config, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CommandError(f"{path} cannot be loaded: {_first_line(error)} ({NO_CONFIG})") from error


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shapes_of(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without their values, on the meta device."""
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    try:
        if path.suffix == ".ckpt":
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return {k: v for k, v in state.get("state_dict", state).items() if isinstance(v, Tensor)}
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # readers raise all kinds of errors for a file that is no checkpoint
        raise CommandError(f"{path} is no checkpoint that can be read: {_first_line(error)}") from error


# U-Nets without weights, for commands that need only their structure


def bare_unet(name: str, download: bool = False) -> tuple[nn.Module, int, int]:
    """Build a model's U-Net on the meta device; return it, its default latent size, and the pixels per latent position.

    A CommandError says why it cannot be built.
    """
    from diffusers import UNet2DConditionModel

    if name == EMBEDDED:
        from ..embedded.model import SIZE, read_json

        config, size, factor = read_json("config.json")["unet"], SIZE, 1
    else:
        if Path(name).suffix in SINGLE_FILES:
            config = config_of_checkpoint(shapes_of(Path(name)))
        else:
            try:
                given = {"subfolder": "unet", "local_files_only": not download}
                config = UNet2DConditionModel.load_config(folder_or_hub_id(name), **given)
            except (OSError, ValueError) as error:
                no_unet = f"{name} has no U-Net: there is no unet/config.json"
                raise CommandError(no_unet if Path(name).is_dir() else NOT_CACHED.format(name)) from error
        if config is None:
            raise CommandError(f"{name} has no U-Net of Stable Diffusion's layout")
        size, factor = config.get("sample_size") or 64, 8
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config)), size, factor
    except Exception as error:  # an invalid configuration can raise all kinds of errors
        raise CommandError(f"the U-Net of {name} cannot be built: {error}") from error


def config_of_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Derive the diffusers configuration of an LDM or sgm checkpoint's U-Net from its tensors' names and shapes.

    The number of heads cannot be derived: it is taken to be that of Stable Diffusion 1 (8 heads), or of 2 and XL (heads
    of 64 channels) if the projections are linear. Return None if there is no such U-Net.
    """
    unet = {name.removeprefix(_PREFIX): x.shape for name, x in state.items() if name.startswith(_PREFIX)}
    context = next((s[1] for name, s in unet.items() if name.endswith("attn2.to_k.weight")), None)
    if "input_blocks.0.0.weight" not in unet or context is None:
        return None
    levels: list[list[tuple[int, int]]] = [[]]  # (channels, depth of the transformer) of each residual block
    for i in range(1, 1 + max(int(m[1]) for name in unet if (m := re.match(r"input_blocks\.(\d+)\.", name)))):
        if f"input_blocks.{i}.0.op.weight" in unet:
            levels.append([])
            continue
        inside = re.compile(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
        depth = len({m[1] for name in unet if (m := inside.match(name))})
        levels[-1].append((unet[f"input_blocks.{i}.0.in_layers.2.weight"][0], depth))
    linear = any(name.endswith("proj_in.weight") and len(s) == 2 for name, s in unet.items())
    channels, depths = zip(*(level[-1] for level in levels), strict=True)
    config = {
        "in_channels": unet["input_blocks.0.0.weight"][1],
        "out_channels": unet["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "transformer_layers_per_block": [max(1, d) for d in depths],
        "cross_attention_dim": context,
        "attention_head_dim": [max(1, c // 64) for c in channels] if linear else 8,
        "use_linear_projection": linear,
        "sample_size": 64,
    }
    if "label_emb.0.0.weight" in unet:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "sample_size": 128}
        config |= {**added, "projection_class_embeddings_input_dim": unet["label_emb.0.0.weight"][1]}
    return config
