"""Diffusers pipelines of a few thousand random weights, built from configs; and what the tests ask of them."""

from __future__ import annotations

import pytest
import torch
from blocks import filled, initialised

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CONTEXT = 32  # channels of one text encoder
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def tiny_unet(**changes) -> UNet:
    """A U-Net with self- and cross-attention at two levels, 2 heads, head sizes 16 and 32."""
    config = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 2}
    config |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    torch.manual_seed(0)
    return filled(UNet(**config | {"cross_attention_dim": CONTEXT} | changes))


def tiny_sdxl_unet() -> UNet:
    """As SDXL's: no attention at level 0, two transformer blocks deep below, and added text and time embeddings."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + CONTEXT, "cross_attention_dim": 2 * CONTEXT}
    return tiny_unet(**SDXL_BLOCKS, transformer_layers_per_block=(1, 2), use_linear_projection=True, **added)


def unet_inputs(unet: UNet, height: int = 16, width: int = 16, batch: int = 2, t: float = 500) -> dict:
    """Keyword arguments of one call of the U-Net."""
    generator = torch.Generator().manual_seed(7)
    given = {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(t),
        "encoder_hidden_states": torch.randn(batch, 7, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        text = torch.randn(batch, CONTEXT, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(batch, 6)}
    return given


def ldm_and_diffusers(use_linear: bool = False) -> tuple[nn.Module, UNet]:
    """The same U-Net twice: as LDM builds it, and converted by diffusers."""
    layout = {"attention_resolutions": [1, 2], "channel_mult": [1, 2], "context_dim": CONTEXT}
    ldm = initialised(**layout, use_linear_in_transformer=use_linear)
    unet = tiny_unet(use_linear_projection=use_linear)
    state = {f"model.diffusion_model.{name}": value for name, value in ldm.state_dict().items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, dict(unet.config)))
    return ldm, unet


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters only."""
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _text_encoder(cls: type) -> nn.Module:
    size = {"vocab_size": 190, "hidden_size": CONTEXT, "intermediate_size": 37, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "projection_dim": CONTEXT, "bos_token_id": 188, "eos_token_id": 189}
    torch.manual_seed(0)
    return cls(CLIPTextConfig(**size)).eval()


def _pipeline(cls: type, **parts):
    torch.manual_seed(0)
    size = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "sample_size": 128}
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **size)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts |= {"vae": vae.eval(), "scheduler": DDIMScheduler(**noise, clip_sample=False, steps_offset=1)}
    pipe = cls(text_encoder=_text_encoder(CLIPTextModel), tokenizer=tiny_tokenizer(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(**unet_changes) -> StableDiffusionPipeline:
    """A Stable Diffusion 1 pipeline for pictures of 128 × 128."""
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _pipeline(StableDiffusionPipeline, unet=tiny_unet(**unet_changes), **unchecked)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """An SDXL pipeline for pictures of 128 × 128."""
    second = {"text_encoder_2": _text_encoder(CLIPTextModelWithProjection), "tokenizer_2": tiny_tokenizer()}
    return _pipeline(StableDiffusionXLPipeline, unet=tiny_sdxl_unet(), **second, add_watermarker=False)


@torch.no_grad()
def run(unet, **changes) -> torch.Tensor:
    return unet(**{**unet_inputs(unet), **changes}).sample


@torch.no_grad()
def picture(pipe, steps: int = 3, **more):
    given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(1), "output_type": "np"}
    return torch.from_numpy(pipe("cat", **given, height=128, width=128, **more).images)
