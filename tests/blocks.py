"""Small U-Nets of real LDM blocks, their inputs, and what a test wants to know about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONTEXT = 48
_COMMON = {"image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
_COMMON |= {"num_heads": 2, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": CONTEXT}
_COMMON |= {"use_checkpoint": False, "legacy": False}


def openaimodel() -> Any:
    """LDM's module; what asks for it is skipped where there is none."""
    reason = "needs stable-diffusion-sdkit (requirements/dev-no-deps.txt)"
    return pytest.importorskip("ldm.modules.diffusionmodules.openaimodel", reason=reason)


def golden_unet() -> nn.Module:
    """The U-Net of the golden outputs: attention at levels 0 and 1 (latents of even sides)."""
    return initialised(attention_resolutions=[1, 2], channel_mult=[1, 2])


def flat_unet() -> nn.Module:
    """One level of 32 channels: takes a latent of any height and width."""
    return initialised(attention_resolutions=[1], channel_mult=[1])


def sdxl_like_unet() -> nn.Module:
    """No attention at level 0, as in SDXL: levels 1 and 2 have it (latents of sides that 4 divides)."""
    return initialised(attention_resolutions=[2, 4], channel_mult=[1, 1, 2])


class OneImage(nn.Module):
    """A U-Net of one block, for what takes long with each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 1)
        self.input_blocks = nn.ModuleList([openaimodel().SpatialTransformer(32, 2, 16, depth=1, context_dim=CONTEXT)])
        self.output_blocks = nn.ModuleList()
        self.conv_out = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.conv_out(self.input_blocks[0](self.conv_in(x), context))


def one_block_unet() -> nn.Module:
    """A U-Net of one block, at level 0."""
    return filled(OneImage())


def stable_diffusion_unet(linear: bool) -> nn.Module:
    """The U-Net of SD 1, or with `linear` projections of SD 2, on the meta device."""
    layout = {"model_channels": 320, "num_res_blocks": 2, "attention_resolutions": [4, 2, 1], "num_heads": 8}
    layout |= {"context_dim": 1024 if linear else 768, "use_linear_in_transformer": linear}
    with torch.device("meta"):
        return openaimodel().UNetModel(**_COMMON | layout, channel_mult=[1, 2, 4, 4])


def initialised(**layout: Any) -> nn.Module:
    """A U-Net of this layout with the golden outputs' kind of weights."""
    return filled(openaimodel().UNetModel(**_COMMON | layout))


def filled(unet: nn.Module) -> nn.Module:
    """The U-Net for inference, with weights of a scale at which attention matters: those of the golden outputs."""
    unet.eval()
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, p in sorted(unet.named_parameters()):
            r = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(r / p[0].numel() ** 0.5)
            else:
                p.copy_(1 + 0.1 * r if name.endswith("weight") else 0.1 * r)
    return unet


def as_model(unet: nn.Module) -> SimpleNamespace:
    """What a WebUI or LDM calls the model: the U-Net is its `.model.diffusion_model`."""
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))


def inputs(batch: int = 2, height: int = 16, width: int = 16, seed: int = 0, t: list[int] | None = None) -> Any:
    """(x, timesteps, context) of a call, drawn as for the golden outputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, height, width, generator=generator)
    context = torch.randn(batch, 77, CONTEXT, generator=generator)
    return x, torch.tensor([500] * batch if t is None else t), context


@torch.no_grad()
def run(unet: nn.Module, given: Any) -> Tensor:
    x, t, context = given
    return unet(x, t, context=context)


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if type(module).__name__ in ("BasicTransformerBlock", "ToMeBlock")]


def transformers_of(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if hasattr(module, "transformer_blocks")]


def tree(unet: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind: classes, attributes and what they are, hooks."""
    return {name: (type(module), _attributes(module)) for name, module in unet.named_modules()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Identities of attributes, and of what is in those that are dictionaries, in its order."""
    return {
        key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
        for key, value in vars(module).items()
    }


def actions(patch: Any) -> list[str]:
    """What the patch did to each block in the last call, in the order of the U-Net."""
    return ["untouched" if layer.plan is None else layer.plan.action for layer in patch.report()]


def _half(dtype: torch.dtype) -> Any:
    """A precision, skipped where this PyTorch doesn't compute it on the CPU."""
    try:
        x = torch.randn(1, 4, 8, 8).to(dtype)
        F.scaled_dot_product_attention(x, x, x)
        F.conv2d(F.layer_norm(x @ x, (8,), x[0, 0, 0]), x[..., :1, :1])
    except RuntimeError:
        return pytest.param(dtype, marks=pytest.mark.skip(reason=f"this PyTorch computes no {dtype} on the CPU"))
    return dtype


HALVES = [_half(torch.bfloat16), _half(torch.float16)]


# Operators that compute nothing: they only reserve memory
_NO_KERNELS = ("empty", "empty_like", "empty_strided", "new_empty", "scalar_tensor", "_unsafe_view")


class Recorder(TorchDispatchMode):
    """Records the operators that run inside, those that compute something, and the sizes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.kernels: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.ops.append(name)
        if not func.is_view and name not in _NO_KERNELS:
            self.kernels.append(name)
        for made in out if isinstance(out, (tuple, list)) else (out,):
            # what is expanded is not in memory
            if isinstance(made, Tensor) and 0 not in made.stride():
                self.shapes.append(tuple(made.shape))
        return out

    @property
    def largest(self) -> int:
        """Number of elements of the largest tensor made."""
        return max(torch.Size(shape).numel() for shape in self.shapes)


@contextmanager
def attention_calls(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (input, output) of each call of an attention module."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out.clone())))
    try:
        yield seen
    finally:
        handle.remove()
