"""U-Nets of the layouts that people use, with random weights: speed does not depend on their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROMPT_TOKENS = 77


@dataclass(frozen=True)
class Layout:
    """A U-Net as published: its name on the command line, and the one that people know it by."""

    name: str
    label: str
    settings: dict[str, Any]  # of diffusers' U-Net
    downsample: int = 1  # level of the largest self-attention layers


_MINI = {"cross_attention_dim": 768, "attention_head_dim": 1, "block_out_channels": (32, 64, 128, 128)}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("sd15", "SD 1.5", {"cross_attention_dim": 768}),  # the rest are diffusers' defaults
        # as many blocks with hardly any work in them: what remains is the cost of a call whatever its size
        Layout("mini", "SD 1.5 with 32 channels instead of 320", _MINI),
        Layout("sdxl", "SDXL", _SDXL, 2),
    )
}


@torch.no_grad()
def build(layout: Layout, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The U-Net of a layout; weights keep activations in range: norms of 1, matrices of variance 1 / fan-in."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**layout.settings).to(dtype).eval().requires_grad_(False)
    unet.to_empty(device=device)
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device)
    for p in unet.parameters():
        if p.dim() < 2:
            p.fill_(0.0 if p.numel() == 1 else 0.02)
            continue
        for part in p.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)]).div_(p[0].numel() ** 0.5)
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.fill_(1.0)
    return unet


def make_inputs(
    layout: Layout, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments to call the U-Net with, for an image of `size` = (height, width) pixels."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    channels = layout.settings["cross_attention_dim"]
    inputs = {"sample": noise(batch, 4, size[0] // 8, size[1] // 8)}
    inputs["encoder_hidden_states"] = noise(batch, PROMPT_TOKENS, channels)
    if layout.name == "sdxl":
        ids = torch.tensor([[*size, 0, 0, *size]] * batch, device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, 1280), "time_ids": ids}
    return inputs


def call(unet: nn.Module, inputs: dict[str, Any], timestep: float) -> Tensor:
    """One forward of the U-Net at a timestep, the same for each row of the batch."""
    x, rest = inputs["sample"], {name: value for name, value in inputs.items() if name != "sample"}
    t = torch.full((len(x),), timestep, device=x.device)
    return unet(x, t, **rest, return_dict=False)[0]  # tomesd looks at the first argument
