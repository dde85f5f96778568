"""Nodes for the tests: a small model of random weights in a real layout, exact latents, an override of attention.

ComfyUI loads this folder as a node pack; nothing in it is imported by the tests themselves.
"""

from __future__ import annotations

import base64
import math

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

CHANNELS = 64
LAYOUTS = {
    # channels by level; transformers of the input blocks, of the output blocks from the last on, of the middle; widths
    "SD 1": (comfy.supported_models.SD15, [1, 2, 4, 4], [1, 1, 1, 1, 1, 1, 0, 0], [1] * 9 + [0] * 3, 1, 48, None),
    "SDXL": (comfy.supported_models.SDXL, [1, 2, 4], [0, 0, 2, 2, 3, 3], [0] * 3 + [2] * 3 + [3] * 3, 3, 64, 2816),
}


WIDTH, POOLED = 32, 64
COMMON = {"in_channels": 16, "out_channels": 16, "patch_size": 2}
FLUX = {**COMMON, "image_model": "flux", "vec_in_dim": POOLED, "context_in_dim": WIDTH, "hidden_size": 32}
FLUX |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 8]}
FLUX |= {"theta": 10000, "qkv_bias": True, "guidance_embed": False}
SD3 = {**COMMON, "depth": 2, "input_size": None, "adm_in_channels": POOLED, "pos_embed_max_size": 64}
SD3 |= {"num_patches": 64 * 64, "qk_norm": "rms", "x_block_self_attn_layers": [0]}
EMBEDDER = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
TRANSFORMERS = {
    "Flux": (comfy.supported_models.Flux, FLUX),
    "SD 3": (comfy.supported_models.SD3, {**SD3, "context_embedder_config": EMBEDDER}),
}


@torch.no_grad()
def make_transformer(layout: str, seed: int):
    family, given = TRANSFORMERS[layout]
    config = family(dict(given))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.diffusion_model.state_dict().items()):
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / math.sqrt(p[0].numel()) if p.dim() > 1 else 1 + noise / 10 if "norm" in name else noise / 10)
    return comfy.model_patcher.ModelPatcher(model, device, device), conditionings(WIDTH, POOLED, generator)


def conditionings(width: int, pooled: int, generator: torch.Generator):
    """A positive and a negative one."""
    text, pooled = (
        [torch.randn(1, *shape, generator=generator) for _ in range(2)] for shape in ((77, width), (pooled,))
    )
    return [[[t, {"pooled_output": p}]] for t, p in zip(text, pooled, strict=True)]


@torch.no_grad()
def make(layout: str, seed: int):
    """A U-Net whose attention reaches the output: layers that training starts at zero are not zero here."""
    family, mult, depth, depth_output, middle, context, adm = LAYOUTS[layout]
    given = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": CHANNELS}
    given |= {"num_res_blocks": [2] * len(mult), "channel_mult": mult, "use_spatial_transformer": True}
    given |= {"transformer_depth": depth, "transformer_depth_output": depth_output, "transformer_depth_middle": middle}
    given |= {"context_dim": context, "use_linear_in_transformer": adm is not None, "legacy": False}
    given |= {"use_temporal_attention": False, "adm_in_channels": adm, "dtype": torch.float32}
    config = family(given if adm is None else {**given, "num_classes": "sequential"})
    config.unet_config.update(num_heads=2, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.diffusion_model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, torch.nn.Parameter):
            gain = 1.5 if name.endswith(("to_q", "to_k")) else 0.6 if name.endswith("proj_out") else 1.0
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(torch.ones_like(weight) if weight.dim() == 1 else noise * gain / math.sqrt(weight[0].numel()))
        if isinstance(bias, torch.nn.Parameter):
            bias.zero_()
    return comfy.model_patcher.ModelPatcher(model, device, device), conditionings(
        config.unet_config["context_dim"], 1280, generator
    )


class TinyModel:
    """A model and two conditionings; the same each time for the same number of weights."""

    CATEGORY, FUNCTION = "testing", "load"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls):
        weights = "INT", {"default": 1, "tooltip": "Which random ones."}
        return {"required": {"layout": ([*LAYOUTS, *TRANSFORMERS],)}, "optional": {"weights": weights}}

    def load(self, layout, weights=1):
        makes = make_transformer if layout in TRANSFORMERS else make
        model, (positive, negative) = makes(layout, 1233 + weights)
        return model, positive, negative


class ExactLatent:
    """Shows a latent to the tests: its shape, and its float32 values."""

    CATEGORY, FUNCTION, OUTPUT_NODE = "testing", "show", True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    def show(self, latent):
        x = latent["samples"].float().contiguous()
        return {"ui": {"shape": list(x.shape), "latent": [base64.b64encode(x.numpy().tobytes()).decode()]}}


class Louder:
    """Overrides attention: what has exactly so many keys, or all where `keys` is 0, is doubled."""

    CATEGORY, FUNCTION = "testing", "override"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "keys": ("INT", {"default": 64, "min": 0})}}

    def override(self, model, keys):
        def louder(func, q, k, v, heads, *args, **kwargs):
            return func(q, k, v, heads, *args, **kwargs) * (2 if k.shape[1] == keys or not keys else 1)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = louder
        return (model,)


class Around:
    """Calls the model by a function of its own."""

    CATEGORY, FUNCTION = "testing", "wrap"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def wrap(self, model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda apply, given: self.call(apply, **given))
        return (model,)


class Blocks(Around):
    """Calls the U-Net's blocks itself, as a cache of deep features does."""

    def call(self, apply, input, timestep, c, cond_or_uncond):
        model, options = apply.__self__, c["transformer_options"]
        unet, sampling = model.diffusion_model, model.model_sampling
        t = sampling.timestep(timestep).float()
        emb = unet.time_embed(timestep_embedding(t, unet.model_channels))
        h, hs = sampling.calculate_input(timestep, input), []
        for id, block in enumerate(unet.input_blocks):
            options["block"] = ("input", id)
            h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options)
            hs.append(h)
        options["block"] = ("middle", 0)
        h = forward_timestep_embed(unet.middle_block, h, emb, c["c_crossattn"], options)
        for id, block in enumerate(unet.output_blocks):
            options["block"] = ("output", id)
            h = torch.cat([h, hs.pop()], dim=1)
            shape = hs[-1].shape if hs else None
            h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options, shape)
        return sampling.calculate_denoised(timestep, unet.out(h).float(), input)


class Tiles(Around):
    """Calls the model on four tiles, as Tiled Diffusion does."""

    def call(self, apply, input, timestep, c, cond_or_uncond):
        rows = (
            torch.cat([apply(tile, timestep, **c) for tile in half.chunk(2, -1)], -1) for half in input.chunk(2, -2)
        )
        return torch.cat(list(rows), -2)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TinyModel, ExactLatent, Louder, Blocks, Tiles)}
