"""U-Nets of the layouts that people use, with random weights: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROMPT_TOKENS = 77


@dataclass(frozen=True)
class Layout:
    """A U-Net as published: its name on the command line, and the one that people know it by."""

    name: str
    label: str
    context: int  # channels of a prompt token
    build: Callable[[], nn.Module]  # its weights mean nothing
    downsample: int = 1  # level of the largest self-attention layers


def _ldm(model_channels: int = 320, **settings: Any) -> nn.Module:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    settings |= {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": model_channels}
    settings |= {"attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4]}
    settings |= {"use_spatial_transformer": True, "transformer_depth": 1, "use_checkpoint": False, "legacy": False}
    return UNetModel(**settings)


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


_SD15 = partial(_ldm, num_heads=8, context_dim=768)
_MINI = partial(_ldm, 32, num_heads=1, context_dim=768)

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("sd15", "SD 1.5", 768, _SD15),
        # as many blocks with hardly any work in them: what remains is the cost of a call whatever its size
        Layout("mini", "SD 1.5 with 32 channels instead of 320", 768, _MINI),
        Layout("sdxl", "SDXL", 2048, _sdxl, 2),
    )
}


def sdpa_forward(self: nn.Module, x: Tensor, context: Tensor | None = None, mask: Any = None) -> Tensor:
    """LDM's CrossAttention with PyTorch's fused kernel, as the WebUI replaces it; our baseline."""
    context = x if context is None else context
    q, k, v = (
        t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for t in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def build(layout: Layout, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The U-Net of a layout with random weights, ready for inference."""
    with torch.device("meta"):
        unet = layout.build()
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for module in unet.modules():
        _adapt(module, dtype)
    fill(unet)
    return unet


@cache
def _fused(attention: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the fused kernel, so that other U-Nets of this process keep theirs."""
    return type(attention.__name__, (attention,), {"forward": sdpa_forward})


def _adapt(module: nn.Module, dtype: torch.dtype) -> None:
    """Make LDM's modules run in any dtype and with the fused kernel, as a host does."""
    if type(module).__module__.startswith("ldm."):
        if type(module).__name__ == "CrossAttention":
            module.__class__ = _fused(type(module))
        elif type(module).__name__ == "GroupNorm32":
            module.forward = partial(nn.GroupNorm.forward, module)
        elif type(module).__name__ == "UNetModel":
            module.dtype = dtype
            module.time_embed.register_forward_pre_hook(lambda embed, args: (args[0].to(dtype),))


@torch.no_grad()
def fill(unet: nn.Module) -> None:
    """Fill in weights that keep activations in range: norms of 1, matrices with variance 1 / fan-in."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20, generator=generator)
    for p in unet.parameters():
        if p.dim() < 2:
            p.fill_(0.0 if p.numel() == 1 else 0.02)
            continue
        fan_in = p[0].numel()
        flat = p.view(-1)
        pool = (noise / fan_in**0.5).to(p.device, p.dtype)
        for i in range(0, flat.numel(), pool.numel()):
            flat[i : i + pool.numel()] = pool[: flat.numel() - i]
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.fill_(1.0)


def make_inputs(
    layout: Layout, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments to call the U-Net with, for an image of `size` = (height, width) pixels."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, context = noise(batch, 4, size[0] // 8, size[1] // 8), noise(batch, PROMPT_TOKENS, layout.context)
    if layout.name == "sdxl":
        ids = torch.tensor([[*size, 0, 0, *size]] * batch, device=device, dtype=dtype)
        extra = {"text_embeds": noise(batch, 1280), "time_ids": ids}
        return {"sample": x, "encoder_hidden_states": context, "added_cond_kwargs": extra}
    return {"x": x, "context": context}


def call(unet: nn.Module, inputs: dict[str, Any], timestep: float) -> Tensor:
    """One forward of the U-Net at a timestep, the same for each row of the batch."""
    x = inputs.get("x", inputs.get("sample"))
    t = torch.full((x.shape[0],), timestep, device=x.device)
    rest = {name: value for name, value in inputs.items() if name not in ("x", "sample")}
    return unet(x, t, **rest) if "x" in inputs else unet(x, t, **rest, return_dict=False)[0]
