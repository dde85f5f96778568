"""Transformers of diffusers with a few thousand random weights, and arguments for calling them."""

from __future__ import annotations

from typing import ClassVar

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


class Tiny:
    """A transformer: how it is made, and called for a grid of height × width tokens at noise level sigma.

    Attributes:
        text_first: whether text stands in front of the image; None without text.
        attentions: number of attentions that see the image.
    """

    text_first: bool | None = True
    attentions = 2
    config: ClassVar[dict]

    def make(self, **changes) -> nn.Module:
        torch.manual_seed(0)
        return filled(getattr(diffusers, type(self).__name__)(**{**self.config, **changes}))

    def call(self, height: int, width: int, batch: int = 2, sigma: float = 0.5, text: int = TEXT) -> dict:
        raise NotImplementedError


class SD3Transformer2DModel(Tiny):
    text_first = False
    attentions = 3
    config: ClassVar = {
        "sample_size": 32,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 32,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 64,
        "out_channels": 4,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, 4, 2 * height, 2 * width),
            "encoder_hidden_states": _randn(batch, text, 32),
            "pooled_projections": _randn(batch, 64),
            "timestep": torch.full((batch,), 1000 * sigma),
        }


class PixArtTransformer2DModel(Tiny):
    text_first = None
    config: ClassVar = {
        "sample_size": 8,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "cross_attention_dim": WIDTH,
        "caption_channels": 32,
        "use_additional_conditions": False,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, 4, 2 * height, 2 * width),
            "encoder_hidden_states": _randn(batch, text, 32),
            "timestep": torch.full((batch,), 1000 * sigma),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


# Flux, and who is built like it
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": HEAD,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 32,
}


class FluxTransformer2DModel(Tiny):
    config: ClassVar = {
        **FLUX,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, height * width, 4),
            "encoder_hidden_states": _randn(batch, text, 32),
            "pooled_projections": _randn(batch, 32),
            "img_ids": _ids(height, width, 3),
            "txt_ids": torch.zeros(text, 3),
            "timestep": torch.full((batch,), sigma),
        }


class ChromaTransformer2DModel(FluxTransformer2DModel):
    config: ClassVar = {
        **FLUX,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        given = super().call(height, width, batch, sigma, text)
        del given["pooled_projections"]
        return given


class Flux2Transformer2DModel(Tiny):
    config: ClassVar = {
        **FLUX,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, height * width, 4),
            "encoder_hidden_states": _randn(batch, text, 32),
            "img_ids": _ids(height, width, 4).expand(batch, -1, -1),
            "txt_ids": torch.zeros(batch, text, 4),
            "timestep": torch.full((batch,), sigma),
        }


class QwenImageTransformer2DModel(Tiny):
    config: ClassVar = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 4, 4),
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, height * width, 16),
            "encoder_hidden_states": _randn(batch, text, 32),
            "img_shapes": [[(1, height, width)]] * batch,
            "timestep": torch.full((batch,), sigma),
        }


class ZImageTransformer2DModel(Tiny):
    text_first = False
    attentions = 3
    config: ClassVar = {
        "in_channels": 4,
        "dim": WIDTH,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": 32,
        "axes_dims": [4, 4, 8],
        "axes_lens": [256, 64, 64],
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "x": list(_randn(batch, 4, 1, 2 * height, 2 * width)),
            "t": torch.full((batch,), 1 - sigma),
            "cap_feats": [_randn(text, 32)] * batch,
        }


class AuraFlowTransformer2DModel(Tiny):
    config: ClassVar = {
        "sample_size": 32,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 32,
        "caption_projection_dim": WIDTH,
        "out_channels": 4,
        "pos_embed_max_size": 48 * 48,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, 4, 2 * height, 2 * width),
            "encoder_hidden_states": _randn(batch, text, 32),
            "timestep": torch.full((batch,), sigma),
        }


class CogView4Transformer2DModel(Tiny):
    config: ClassVar = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "out_channels": 4,
        "text_embed_dim": 32,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        size = torch.full((batch, 2), 64.0)
        return {
            "hidden_states": _randn(batch, 4, 2 * height, 2 * width),
            "encoder_hidden_states": _randn(batch, text, 32),
            "timestep": torch.full((batch,), 1000 * sigma),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }


class Lumina2Transformer2DModel(Tiny):
    attentions = 3
    config: ClassVar = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": HEADS,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 8),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 32,
    }

    def call(self, height, width, batch=2, sigma=0.5, text=TEXT):
        return {
            "hidden_states": _randn(batch, 4, 2 * height, 2 * width),
            "encoder_hidden_states": _randn(batch, text, 32),
            "encoder_attention_mask": torch.ones(batch, text, dtype=torch.bool),
            "timestep": torch.full((batch,), 1 - sigma),
        }


TINY = {kind.__name__: kind() for kind in (*Tiny.__subclasses__(), ChromaTransformer2DModel)}
