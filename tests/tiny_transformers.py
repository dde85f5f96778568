"""Transformers of diffusers with a few thousand random weights, and arguments for calling them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from blocks import filled
from torch import Tensor, nn

HEADS, HEAD, TEXT = 2, 16, 9  # heads, their size, tokens of text
WIDTH = HEADS * HEAD


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _ids(height: int, width: int, axes: int) -> Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


@dataclass
class Tiny:
    """A transformer: how it is made, and called for a grid of height × width tokens at noise level sigma."""

    config: dict
    text_first: bool | None = True  # whether text stands in front of the image; None without text
    attentions: int = 2  # number of attentions that see the image
    time: tuple[float, float] = (1.0, 0.0)  # (a, b) of the timestep a · sigma + b
    packed: int = 0  # channels of tokens that are given one by one; 0 where a latent is given
    more: Callable[[int, int, int, int], dict] = lambda height, width, batch, text: {}  # further arguments
    name: str = ""  # of the class

    def make(self, **changes) -> nn.Module:
        torch.manual_seed(0)
        return filled(getattr(diffusers, self.name)(**{**self.config, **changes}))

    def call(self, height: int, width: int, batch: int = 2, sigma: float = 0.5, text: int = TEXT) -> dict:
        packed, a, b = self.packed, *self.time
        given = {
            "hidden_states": _randn(batch, *((height * width, packed) if packed else (4, 2 * height, 2 * width))),
            "encoder_hidden_states": _randn(batch, text, 32),
            "timestep": torch.full((batch,), a * sigma + b),
            **self.more(height, width, batch, text),
        }
        if "x" in given:  # Z-Image's lists
            x, text, t = given["x"], given["encoder_hidden_states"], given["timestep"]
            return {"x": x, "cap_feats": [text[0]] * batch, "t": t}
        return given


def _flux(height: int, width: int, batch: int, text: int) -> dict:
    return {"img_ids": _ids(height, width, 3), "txt_ids": torch.zeros(text, 3)}


def _rotations(height: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(height * width), 0.1 ** torch.arange(HEAD // 2)).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


BASE = {"in_channels": 4, "attention_head_dim": HEAD, "num_attention_heads": HEADS}
LATENT, JOINT = {**BASE, "out_channels": 4}, {"joint_attention_dim": 32}
FLUX = {**BASE, **JOINT, "num_layers": 1, "num_single_layers": 1}
LUMINA = {"sample_size": 16, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 2, "num_refiner_layers": 1}

TINY = {
    "SD3Transformer2DModel": Tiny(
        {**LATENT, **JOINT, "sample_size": 32, "num_layers": 2, "caption_projection_dim": WIDTH}
        | {"pooled_projection_dim": 64, "pos_embed_max_size": 96, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        text_first=False,
        attentions=3,
        time=(1000, 0),
        more=lambda h, w, batch, text: {"pooled_projections": _randn(batch, 64)},
    ),
    "PixArtTransformer2DModel": Tiny(
        {**BASE, "out_channels": 8, "sample_size": 8, "num_layers": 2, "cross_attention_dim": WIDTH}
        | {"caption_channels": 32, "use_additional_conditions": False},
        text_first=None,
        time=(1000, 0),
        more=lambda *size: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "HunyuanDiT2DModel": Tiny(
        {**BASE, "sample_size": 16, "num_layers": 2, "patch_size": 2, "hidden_size": WIDTH, "cross_attention_dim": 32}
        | {"cross_attention_dim_t5": 32, "pooled_projection_dim": 16, "text_len": TEXT, "text_len_t5": TEXT}
        | {"use_style_cond_and_image_meta_size": False},
        text_first=None,
        time=(1000, 0),
        more=lambda h, w, batch, text: {
            "encoder_hidden_states_t5": _randn(batch, text, 32),
            "text_embedding_mask": torch.ones(batch, text),
            "text_embedding_mask_t5": torch.ones(batch, text),
            "image_rotary_emb": _rotations(h, w),
        },
    ),
    "FluxTransformer2DModel": Tiny(
        {**FLUX, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
        packed=4,
        more=lambda h, w, batch, text: {**_flux(h, w, batch, text), "pooled_projections": _randn(batch, 32)},
    ),
    "ChromaTransformer2DModel": Tiny(
        {**FLUX, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 16}
        | {"approximator_layers": 1},
        packed=4,
        more=_flux,
    ),
    "Flux2Transformer2DModel": Tiny(
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        packed=4,
        more=lambda h, w, batch, text: {
            "img_ids": _ids(h, w, 4).expand(batch, -1, -1),
            "txt_ids": torch.zeros(batch, text, 4),
        },
    ),
    "QwenImageTransformer2DModel": Tiny(
        {**LATENT, **JOINT, "in_channels": 16, "num_layers": 2, "axes_dims_rope": (8, 4, 4)},
        packed=16,
        more=lambda h, w, batch, text: {"img_shapes": [[(1, h, w)]] * batch},
    ),
    "ZImageTransformer2DModel": Tiny(
        {"in_channels": 4, "dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS}
        | {"cap_feat_dim": 32, "axes_dims": [4, 4, 8], "axes_lens": [256, 64, 64]},
        text_first=False,
        attentions=3,
        time=(-1, 1),
        more=lambda h, w, batch, text: {"x": list(_randn(batch, 4, 1, 2 * h, 2 * w))},
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {**LATENT, **JOINT, "sample_size": 32, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
        | {"caption_projection_dim": WIDTH, "pos_embed_max_size": 48 * 48},
    ),
    "CogView4Transformer2DModel": Tiny(
        {**LATENT, "patch_size": 2, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4},
        time=(1000, 0),
        more=lambda h, w, batch, text: {
            "original_size": torch.full((batch, 2), 64.0),
            "target_size": torch.full((batch, 2), 64.0),
            "crop_coords": torch.zeros(batch, 2),
        },
    ),
    "Lumina2Transformer2DModel": Tiny(
        {**LUMINA, "num_attention_heads": HEADS, "num_kv_heads": HEADS, "multiple_of": 16, "axes_dim_rope": (4, 4, 8)}
        | {"axes_lens": (128, 128, 128), "cap_feat_dim": 32},
        attentions=3,
        time=(-1, 1),
        more=lambda h, w, batch, text: {"encoder_attention_mask": torch.ones(batch, text, dtype=torch.bool)},
    ),
}
for _name, _tiny in TINY.items():
    _tiny.name = _name
