"""Transformers of diffusers: SD 3, Flux and their kin.

Their seam is attention itself: queries, keys and values after norms and rotary positions, of text and image together.
Every processor ends in `F.scaled_dot_product_attention`, by itself or by diffusers' native backend. A processor of ours
around the host's listens to that function while the host's processor runs (`TorchFunctionMode`), so it is the same for
all families, whatever comes before.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.grid import Grid
from ..schedule import Moment, progress_of
from .arguments import find_timestep, named, read_size
from .base import Call, Handler, Seam
from .diffusers import Processor, ProcessorSeam, around, host_processor, unet_progress

SDPA = F.scaled_dot_product_attention
ONE_GRID = "its image tokens do not form one grid, as where an image is given as further tokens"

# Channels that a mask takes, a multiple of which fused kernels like; and what closes a key there, in any dtype
CHANNELS, CLOSED = 8, 30000.0

Arguments = Mapping[str, Any]


def _latent_grid(model: Any, given: Arguments) -> Grid | None:
    """The grid of patches of a latent (B, C, height, width)."""
    x = given.get("hidden_states")
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    return Grid(x.shape[2], x.shape[3]).patches(model.config.patch_size)


def _listed_grid(model: nn.Module, given: Arguments) -> Grid | None:
    """That of Z-Image's list of latents (C, frames, height, width)."""
    x = given.get("x") or [None]
    alike = all(isinstance(each, Tensor) and each.dim() == 4 and each.shape == x[0].shape for each in x)
    if not alike or x[0].shape[1] != 1:
        return None
    return Grid(*x[0].shape[2:]).patches(given.get("patch_size") or 2)


def _shapes_grid(model: nn.Module, given: Arguments) -> Grid | None:
    """That of Qwen-Image's `img_shapes`: (frames, height, width) of each image, by row of the batch."""
    shapes = [each if isinstance(each, list) else [each] for each in given.get("img_shapes") or ()]
    if not shapes or not shapes[0]:
        return None
    first = shapes[0][0]
    return Grid(*first[1:]) if all(each == [first] for each in shapes) and first[0] == 1 else None


class _IdsGrid:
    """That of Flux's `img_ids` (N, axes): row and column of each token. A pass has one tensor of them, read once."""

    _read: tuple[Callable[[], Any], Grid | None] = (lambda: None), None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a weak reference can't be pickled

    def __call__(self, model: nn.Module, given: Arguments) -> Grid | None:
        ids, (known, grid) = given.get("img_ids"), self._read
        if ids is None:
            return None
        if known() is not ids:
            grid = _raster(ids[0] if ids.dim() == 3 else ids)
            self._read = weakref.ref(ids), grid
        return grid


def _raster(ids: Tensor) -> Grid | None:
    """(height, width) of tokens (N, axes) whose second and third axes count rows and columns; None if it is no grid."""
    rows, columns = ids.detach()[:, 1:3].double().cpu().unbind(-1)
    width = int((rows == rows[0]).sum())
    places = torch.arange(len(ids))
    whole = len(ids) % width == 0
    in_order = torch.equal(rows - rows[0], (places // width).double())
    across = columns[:width] - columns[0]
    # positions may be scaled, but each row has the same, in order
    if not whole or not in_order or not torch.equal(columns - columns[0], across.repeat(len(ids) // width)):
        return None
    return Grid(len(ids) // width, width)


@dataclass(frozen=True)
class Transformer:
    """A family of transformers.

    Attributes:
        model: name of the model's class.
        attentions: patterns of the names of the attention modules that see the image.
        grid: reads (height, width) of the image's tokens off the model and its arguments by name; None if they form
            no single grid.
        text_first: whether text tokens stand in front of those of the image.
        time: (a, b) of a · t + b, the noise level σ of the flow in thousandths, t being the argument.
        rotary: whether keys carry rotary positions.
        text: whether text tokens stand beside the image's.
        masks: whether a mask of keys closes text tokens alone.
        reads_values: whether the grid is read off values, for which a device is waited once a pass.
        patch: side in positions of the latent of what a token stands for.
    """

    model: str
    attentions: tuple[str, ...]
    grid: Callable[[nn.Module, Arguments], Grid | None] = _latent_grid
    text_first: bool = True
    time: tuple[float, float] = (1.0, 0.0)
    rotary: bool = True
    text: bool = True
    masks: bool = False
    reads_values: bool = False
    patch: int = 2

    def seam(self, attn: nn.Module) -> Seam:
        """Make a seam in an attention module."""
        return JointSeam(attn, self)

    def read_grid(self, model: Any, args: tuple[Any, ...], kwargs: Arguments) -> Grid | None:
        """Read (height, width) of the image's tokens off the arguments of a call; None if they form no single grid."""
        return self.grid(model, named(_parameters(type(model)), args, kwargs))  # type: ignore[arg-type]

    def read_time(self, model: Any, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Return the noise level in thousandths, 1000 for noise; None if the call has none."""
        given, (a, b) = named(_parameters(type(model)), args, kwargs), self.time  # type: ignore[arg-type]
        t = given.get("timestep", given.get("t"))
        return t if t is None or (a, b) == (1.0, 0.0) else a * t + b

    def names(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, module) of each attention that sees the image."""
        for name, module in model.named_modules():
            if hasattr(module, "set_processor") and any(fnmatchcase(name, each) for each in self.attentions):
                yield name, module


@cache
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


_BLOCKS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_SIGMA, _RISING = (1000.0, 0.0), (-1000.0, 1000.0)

FAMILIES = {
    family.model: family
    for family in (
        Transformer(
            "SD3Transformer2DModel",
            ("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
            text_first=False,
            rotary=False,
        ),
        Transformer("PixArtTransformer2DModel", ("transformer_blocks.*.attn1",), rotary=False, text=False),
        Transformer("FluxTransformer2DModel", _BLOCKS, _IdsGrid(), time=_SIGMA, reads_values=True),
        Transformer("Flux2Transformer2DModel", _BLOCKS, _IdsGrid(), time=_SIGMA, reads_values=True),
        Transformer("ChromaTransformer2DModel", _BLOCKS, _IdsGrid(), time=_SIGMA, masks=True, reads_values=True),
        Transformer("QwenImageTransformer2DModel", _BLOCKS, _shapes_grid, time=_SIGMA, masks=True),
        Transformer(
            "ZImageTransformer2DModel",
            ("layers.*.attention", "noise_refiner.*.attention"),
            _listed_grid,
            text_first=False,
            time=_RISING,
            masks=True,
        ),
        Transformer(
            "AuraFlowTransformer2DModel",
            ("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
            time=_SIGMA,
            rotary=False,
        ),
        Transformer("HunyuanDiT2DModel", ("blocks.*.attn1",), text=False),
        Transformer("CogView4Transformer2DModel", ("transformer_blocks.*.attn1",), masks=True),
        Transformer("Lumina2Transformer2DModel", ("layers.*.attn", "noise_refiner.*.attn"), time=_RISING),
    )
}


def family_of(model: Any) -> Transformer | None:
    """Return the family of a transformer; None if it is no known transformer."""
    return FAMILIES.get(type(model).__name__)


def progress_by(model: Any, module: nn.Module) -> Moment | None:
    """Return what the timesteps of a model's U-Net or transformer mean; None where they are a U-Net's training steps.

    A transformer's are the noise level in thousandths, in which its progress is linear.
    """
    return unet_progress(model, module) if family_of(module) is None else progress_of


def read_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, int] | None, Any]:
    """Read the size, (height, width), and the timestep off a call of a U-Net or transformer; None for what isn't there.

    Those of a transformer are its grid of tokens and the noise level in thousandths. The timestep is left unread.
    """
    family = family_of(model)
    if family is None:
        return read_size(args, kwargs), find_timestep(args, kwargs)
    return family.read_grid(model, args, kwargs), family.read_time(model, args, kwargs)


class JointSeam(ProcessorSeam):
    """Replacement of attention itself inside the processor of one attention module."""

    def __init__(self, attn: nn.Module, family: Transformer) -> None:
        super().__init__(attn)
        self.family = family

    def refresh(self) -> None:
        super().refresh()
        self.obstacle = self.obstacle_of(self.attn)

    def obstacle_of(self, attn: nn.Module) -> str:
        processor = host_processor(attn)
        if isinstance(processor, nn.Module):
            return f"its attention processor is {processor.__class__.__name__}"
        if getattr(processor, "_parallel_config", None) is not None:
            return "its tokens are spread over devices, by context parallelism"
        return ""

    def wrap(self, previous: Callable[..., Tensor], handler: Handler, wants: Callable[[], Any]) -> Processor:
        processor: Any = around(JointProcessor, previous, handler, wants)
        processor.family = self.family
        return processor


class JointProcessor(Processor):
    """A processor that lets the host's run, and asks a handler for the attention in it.

    A processor that asks diffusers for a backend is sent to the native one, which is PyTorch's function. What is full
    attention all the same is computed by the backend that the user chose.
    """

    family: Transformer

    def __init__(self, previous: Callable[..., Tensor], handler: Handler | None, wants: Callable[[], Any]) -> None:
        super().__init__(previous, handler, wants)
        self.native = previous
        if hasattr(previous, "_attention_backend"):
            from diffusers.models.attention_dispatch import AttentionBackendName

            self.native = copy(previous)
            self.native._attention_backend = AttentionBackendName.NATIVE

    def answer(self, attn: nn.Module, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host's processor."""
        parallel = getattr(self.previous, "_parallel_config", None) is not None
        handler = self.handler  # which another thread may remove meanwhile
        wanted = None if parallel or handler is None else self.wants()
        if not wanted:
            return self.previous(attn, hidden_states, *args, **kwargs)
        with _Listening(self, handler, wanted):
            return self.native(attn, hidden_states, *args, **kwargs)

    def attend(self, handler: Handler, wanted: Any, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """Have `handler` answer a call of `F.scaled_dot_product_attention`."""
        if query.shape[-2] != key.shape[-2]:  # an IP-Adapter's keys, say
            return self.compute(query, key, value, **given)
        call = JointCall(self.family, self.compute, query, key, value, given)
        call.wanted = wanted
        return handler(call)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """Full attention (B, H, M, d), by what the user chose."""
        if self.native is self.previous:
            return SDPA(q, k, v, **given)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dispatch_attention_fn(q, k, v, backend=self.previous._attention_backend, **given).transpose(1, 2)


class _Listening(TorchFunctionMode):
    """Has a processor answer the attention that is computed in a `with` block."""

    _NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, processor: JointProcessor, handler: Handler, wanted: Any) -> None:
        super().__init__()
        self.processor, self.handler, self.wanted = processor, handler, wanted

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            given = {**dict(zip(self._NAMES, args, strict=False)), **(kwargs or {})}
            return self.processor.attend(self.handler, self.wanted, **given)
        if func is Tensor.unflatten:  # whose call of its base class the compiler does not follow
            func = torch.unflatten
        return func(*args, **(kwargs or {}))


class JointCall(Call):
    """One call of attention over text and image, of queries, keys and values (B, H, M, d).

    Attributes:
        family: the model's.
        compute: computes full attention, given what `F.scaled_dot_product_attention` is.
        given: its further arguments.
    """

    def __init__(
        self,
        family: Transformer,
        compute: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: dict[str, Any],
    ) -> None:
        self.family, self.compute = family, compute
        self.q, self.k, self.v, self.given = q, k, v, given
        super().__init__(q, None, given.get("attn_mask"), {}, partial(compute, q, k, v, **given))

    def veto(self, tokens: int) -> str:
        """Say why these are not so many tokens of an image, and text; empty if they are."""
        M, mask = self.q.shape[-2], self.mask
        if tokens > M or (tokens < M and not self.family.text):
            return "attention got another number of tokens than the image has"
        if self.q.shape != self.k.shape or self.k.shape != self.v.shape:
            return "several heads of queries share one of keys"
        if self.given.get("is_causal") or self.given.get("dropout_p"):
            return "attention is causal or drops weights"
        if mask is not None and not (self.family.masks and mask.dim() == 4 and mask.shape[1] == 1):
            return "attention was given a mask that may close tokens of the image"
        return ""

    def split(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Split x (B, H, M, …) into what belongs to the image's tokens and what belongs to the text's."""
        M = x.shape[2]
        if self.family.text_first:
            return x[:, :, M - tokens :], x[:, :, : M - tokens]
        return x[:, :, :tokens], x[:, :, tokens:]

    def opened(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for attention at the scale d^-½ without a mask, which takes a channel of the keys.

        The image's queries are taken to have one mask in common.
        """
        q, k, v, d = self.q, self.k, self.v, self.q.shape[-1]
        scale = self.given.get("scale")
        if scale is not None and scale != d**-0.5:
            q = q * (scale * d**0.5)
        if self.mask is None:
            return q, k, v
        row = self.mask if self.mask.shape[2] == 1 else self.split(self.mask, tokens)[0][:, :, :1]
        bias = torch.where(row, 0.0, -CLOSED) if row.dtype == torch.bool else (row * d**0.5).clamp(min=-CLOSED)
        bias = bias.to(q.dtype).mT.expand(len(q), q.shape[1], -1, 1)
        q = F.pad(torch.cat([q, torch.ones_like(bias)], dim=-1), (0, CHANNELS - 1)) * ((d + CHANNELS) / d) ** 0.5
        return q, F.pad(torch.cat([k, bias], dim=-1), (0, CHANNELS - 1)), F.pad(v, (0, CHANNELS))

    def joined(self, image: Tensor, tokens: int) -> Tensor:
        """Put what the image's tokens got (B, N, H·d) beside full attention of the text's: (B, H, M, d)."""
        image = image.unflatten(-1, (self.q.shape[1], -1))[..., : self.q.shape[-1]]
        if tokens == self.q.shape[2]:
            return image.transpose(1, 2)
        given = self.given
        if self.mask is not None and self.mask.shape[2] > 1:
            given = {**given, "attn_mask": self.split(self.mask, tokens)[1]}
        text = self.compute(self.split(self.q, tokens)[1], self.k, self.v, **given).transpose(1, 2)
        return torch.cat([text, image] if self.family.text_first else [image, text], dim=1).transpose(1, 2)
