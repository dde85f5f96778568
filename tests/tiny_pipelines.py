"""Diffusers pipelines of a few thousand random weights, built from configs; and what the tests ask of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import agentsd
from agentsd import get_patch

CONTEXT = 32  # channels of one text encoder


def tiny_unet(**changes) -> UNet2DConditionModel:
    """A U-Net with self- and cross-attention at two levels, 2 heads, head sizes 16 and 32."""
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
    }
    torch.manual_seed(0)
    return randomised(UNet2DConditionModel(**{**config, **changes}))


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """As SDXL's: no attention at level 0, two transformer blocks deep below, and added text and time embeddings."""
    return tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CONTEXT,
    )


def randomised(model: nn.Module) -> nn.Module:
    """Give every weight a scale at which attention matters to the output: a fresh U-Net's last layers are near zero."""
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
    return model.eval()


def unet_inputs(unet: UNet2DConditionModel, height: int = 16, width: int = 16, batch: int = 2, t: float = 500) -> dict:
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


def ldm_and_diffusers(use_linear: bool = False) -> tuple[nn.Module, UNet2DConditionModel]:
    """The same U-Net twice: as LDM builds it, and converted by diffusers."""
    from blocks import initialised  # needs stable-diffusion-sdkit's ldm

    layout = {"attention_resolutions": [1, 2], "channel_mult": [1, 2]}
    ldm = initialised(**layout, context_dim=CONTEXT, use_linear_in_transformer=use_linear)
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
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=190,
        hidden_size=CONTEXT,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=CONTEXT,
        bos_token_id=188,
        eos_token_id=189,
    )
    return cls(config).eval()


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    ).eval()


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def tiny_sd(**unet_changes) -> StableDiffusionPipeline:
    """A Stable Diffusion 1 pipeline for pictures of 128 × 128."""
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(CLIPTextModel),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(**unet_changes),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """An SDXL pipeline for pictures of 128 × 128."""
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(CLIPTextModel),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_sdxl_unet(),
        scheduler=_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# What the tests of the patch share

GRID = {"ratio": 0.0, "sx": 2, "sy": 2, "agent_ratio": 0.75, "agent_source": "grid"}
SIMILARITY = {"ratio": 0.4, "agent_ratio": 0.95}
MERGING = dict(agentsd.TOKEN_MERGING)
EVERYWHERE = {"ratio": 0.4, "agent_ratio": 0.9, "merge_crossattn": True, "merge_mlp": True, "max_downsample": 2}
POOL = {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0}
CORRECTED = {"method": "corrected", "agent_ratio": 0.75, "ratio": 0.0}
KINDS = {
    "grid": GRID,
    "similarity": SIMILARITY,
    "merging": MERGING,
    "everywhere": EVERYWHERE,
    "pool": POOL,
    "corrected": CORRECTED,
}

by_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())


@torch.no_grad()
def run(unet, **changes) -> torch.Tensor:
    return unet(**{**unet_inputs(unet), **changes}).sample


@torch.no_grad()
def picture(pipe, steps: int = 3):
    generator = torch.Generator().manual_seed(1)
    size = {"height": 128, "width": 128}
    return torch.from_numpy(
        pipe("cat", num_inference_steps=steps, generator=generator, output_type="np", **size).images
    )


def anatomy(unet: nn.Module) -> dict:
    """Everything about the module tree that a patch could leave behind."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            [len(getattr(module, hook)) for hook in hooks],
            id(getattr(module, "processor", None)),
            id(module.__dict__.get("forward")),
        )
        for name, module in unet.named_modules()
    }


def attn1s(unet: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn1")}


def actions(unet: nn.Module) -> dict[str, dict[str, int]]:
    return {layer.name: layer.calls for layer in get_patch(unet).report()}
