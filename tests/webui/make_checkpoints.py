"""Make the small checkpoints that the tests use, with random weights, in an AUTOMATIC1111 WebUI checkout.

Run with the WebUI's own Python, after its first start: venv/bin/python …/make_checkpoints.py WEBUI_FOLDER
With --sd15 behind it, it only writes sd15random, for `python -m benchmarks.webui`: the U-Net of SD 1.5 in its full size
(860 million parameters) with the small VAE and text encoder. Speed does not depend on what a model has learned.

Writes tinysd1, tinysd1b, tinysd2v and tinysdxl to models/Stable-diffusion, each with its YAML, a LoRA, a hypernetwork,
WEBUI_FOLDER/clip-tiny, and two small text towers beside open_clip's own. Layers that training starts at zero are not
zero here, so that attention reaches the image. Nothing is downloaded: the tokenizer comes from open_clip's own file.
"""

# ruff: noqa: E402 - the WebUI's repositories must be on the path first

from __future__ import annotations

import gzip
import importlib
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(sys.argv[1]).resolve()
REPOSITORIES = ROOT / "repositories"
sys.path[:0] = [str(REPOSITORIES / "stable-diffusion-stability-ai"), str(REPOSITORIES / "generative-models")]

import open_clip
import torch
from ldm.models.autoencoder import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLIP = ROOT / "clip-tiny"
CHECKPOINTS = ROOT / "models/Stable-diffusion"
VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
VAE |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
COMMON = {"in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": 2, "legacy": False}
COMMON |= {"use_spatial_transformer": True, "use_checkpoint": False, "channel_mult": [1, 2, 4, 4]}
SMALL_VAE = [("ch: 128", "ch: 32")]
NARROW = ("model_channels: 320", "model_channels: 64")
NARROW_HEADS = ("num_head_channels: 64", "num_head_channels: 32")


def write_clip() -> None:
    """A CLIP of SD 1's width with a narrow MLP; its vocabulary is the one in open_clip's archive."""
    from open_clip.tokenizer import bytes_to_unicode

    archive = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(archive.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    CLIP.mkdir(exist_ok=True)
    (CLIP / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (CLIP / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in merges))
    tokenizer = CLIPTokenizer(str(CLIP / "vocab.json"), str(CLIP / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(CLIP)
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "projection_dim": 768}
    CLIPTextConfig(**sizes, bos_token_id=49406, eos_token_id=49407).save_pretrained(CLIP)


# Weights


@torch.no_grad()
def randomise(model: nn.Module, seed: int, gain=lambda name: 1.0, bias: float = 0.0) -> nn.Module:
    """Random weights of linear layers and convolutions that keep the variance, but for the `gain` of a layer's name."""
    generator = torch.Generator().manual_seed(seed)
    for name, m in model.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d)):
            scale = gain(name) / math.sqrt(m.weight[0].numel())
            m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * scale)
            if m.bias is not None:
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * bias)
        elif isinstance(m, nn.Embedding):
            m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * 0.5)
    return model


@torch.no_grad()
def fill_unet(unet: nn.Module, context: int, vector: int | None = None, side: int = 64) -> nn.Module:
    """Sharp enough attention, and an output of unit deviation."""

    def gain(name: str) -> float:
        if name.endswith(("to_q", "to_k")):
            return 1.5
        return 0.6 if name.endswith("proj_out") or ".out_layers." in name else 1.0

    randomise(unet.eval(), 1234, gain, 0.02)
    torch.manual_seed(7)
    x, t, c = torch.randn(2, 4, side, side), torch.tensor([500, 500]), torch.randn(2, 77, context)
    out = unet(x, t, c, **({} if vector is None else {"y": torch.randn(2, vector)}))
    unet.out[-1].weight.div_(out.std())
    unet.out[-1].bias.zero_()
    return unet


@torch.no_grad()
def vae() -> nn.Module:
    model = randomise(AutoencoderKL(ddconfig=VAE, lossconfig={"target": "torch.nn.Identity"}, embed_dim=4).eval(), 4321)
    torch.manual_seed(8)
    model.decoder.conv_out.weight.mul_(0.4 / model.decode(torch.randn(1, 4, 32, 32)).std())
    return model


@torch.no_grad()
def fill_text(model: nn.Module) -> nn.Module:
    for m in randomise(model, 99).modules():
        if isinstance(m, nn.LayerNorm):
            # the WebUI divides by the mean of the prompt's encoding: without this it is zero but for rounding
            m.bias.fill_(0.1)
    return model


def clip() -> nn.Module:
    return fill_text(CLIPTextModel(CLIPTextConfig.from_pretrained(CLIP)).eval())


@torch.no_grad()
def other_weights(model: nn.Module) -> nn.Module:
    """As random as before: each matrix with its rows in reverse."""
    for p in model.parameters():
        if p.dim() >= 2:
            p.copy_(p.flip(0).clone())
    return model


def open_clip_text(name: str, width: int, heads: int, layers: int) -> nn.Module:
    """A small text tower, put beside open_clip's own so that the WebUI finds it by its name."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    folder = Path(open_clip.__file__).parent / "model_configs"
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": width, "vision_cfg": vision, "text_cfg": text}))
    importlib.reload(open_clip.factory)
    model, _, _ = open_clip.factory.create_model_and_transforms(name, device="cpu", pretrained=None)
    del model.visual
    return fill_text(model)


# Files


def save(name: str, parts: dict[str, nn.Module], template: Path, changes: list[tuple[str, str]], end: str = "") -> None:
    """A checkpoint in half precision, and the YAML that says how it is built."""
    state = {
        prefix + key: (value.half() if value.dtype == torch.float32 else value).contiguous().clone()
        for prefix, model in parts.items()
        for key, value in model.state_dict().items()
        if not key.endswith("embeddings.position_ids")
    }
    if name != "tinysdxl":  # sgm computes its own
        betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
        state["alphas_cumprod"] = torch.cumprod(1 - betas, 0).float()
    save_file(state, CHECKPOINTS / f"{name}.safetensors", metadata={"format": "pt"})
    text = template.read_text()
    for old, new in [*SMALL_VAE, *changes]:
        assert old in text, f"{template} has no {old!r}"
        text = text.replace(old, new)
    text = re.sub(r"num_res_blocks: 2(\s+attn_resolutions)", r"num_res_blocks: 1\1", text)
    (CHECKPOINTS / f"{name}.yaml").write_text(text.rstrip() + "\n" + end)
    print(CHECKPOINTS / f"{name}.safetensors")


def sd1(name: str, change=lambda model: model, full: bool = False) -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    layout = {**COMMON, "attention_resolutions": [4, 2, 1], "num_heads": 2, "transformer_depth": 1}
    layout |= {"model_channels": 320, "num_heads": 8} if full else {}
    unet = fill_unet(UNetModel(image_size=32, context_dim=768, **layout), 768, side=16 if full else 64)
    parts = {"model.diffusion_model.": change(unet), "first_stage_model.": vae()}
    parts["cond_stage_model.transformer."] = change(clip())
    changes = [] if full else [NARROW, ("num_heads: 8", "num_heads: 2")]
    save(name, parts, ROOT / "configs/v1-inference.yaml", changes, f"      params:\n        version: {CLIP}\n")


def sd2v() -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    layout = {**COMMON, "attention_resolutions": [4, 2, 1], "num_head_channels": 32, "transformer_depth": 1}
    unet = UNetModel(image_size=32, context_dim=1024, use_linear_in_transformer=True, **layout)
    parts = {"model.diffusion_model.": fill_unet(unet, 1024), "first_stage_model.": vae()}
    parts["cond_stage_model.model."] = open_clip_text("ViT-tinyH-webui", 1024, 16, 3)
    freeze = "        freeze: True\n"
    changes = [NARROW, NARROW_HEADS, (freeze, f"{freeze}        arch: ViT-tinyH-webui\n")]
    template = REPOSITORIES / "stable-diffusion-stability-ai/configs/stable-diffusion/v2-inference-v.yaml"
    save("tinysd2v", parts, template, changes)


def sdxl() -> None:
    from sgm.modules.diffusionmodules.openaimodel import UNetModel

    layout = {**COMMON, "attention_resolutions": [4, 2], "channel_mult": [1, 2, 4], "num_head_channels": 32}
    layout |= {"transformer_depth": [1, 2, 4], "use_linear_in_transformer": True}
    layout |= {"adm_in_channels": 2816, "num_classes": "sequential", "spatial_transformer_attn_type": "softmax"}
    unet = fill_unet(UNetModel(context_dim=2048, **layout), 2048, vector=2816)
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae()}
    parts["conditioner.embedders.0.transformer."] = clip()
    parts["conditioner.embedders.1.model."] = open_clip_text("ViT-tinyG-webui", 1280, 20, 2)
    layer, attention = "layer: hidden\n              layer_idx: 11", "spatial_transformer_attn_type: softmax"
    changes = [
        NARROW,
        NARROW_HEADS,
        (f"{attention}-xformers", attention),
        ("arch: ViT-bigG-14", "arch: ViT-tinyG-webui"),
    ]
    changes += [("transformer_depth: [1, 2, 10]", "transformer_depth: [1, 2, 4]")]
    changes += [(layer, f"{layer}\n              version: {CLIP}")]
    save("tinysdxl", parts, REPOSITORIES / "generative-models/configs/inference/sd_xl_base.yaml", changes)


def lora(rank: int = 4) -> None:
    """A LoRA on all attention projections of tinysd1."""
    generator, state = torch.Generator().manual_seed(5), {}
    pattern = re.compile(
        r"model\.diffusion_model\.(input|middle|output)_blocks?\.(\d+)\.(?:1\.)?transformer_blocks\.0\.(attn[12])\."
        r"(to_q|to_k|to_v|to_out\.0)\.weight$"
    )
    for key, weight in load_file(CHECKPOINTS / "tinysd1.safetensors").items():
        found = pattern.match(key)
        if not found:
            continue
        n = int(found[2])
        where = {
            "input": f"down_blocks_{(n - 1) // 3}_attentions_{(n - 1) % 3}",
            "middle": "mid_block_attentions_0",
            "output": f"up_blocks_{n // 3}_attentions_{n % 3}",
        }[found[1]]
        name = f"lora_unet_{where}_transformer_blocks_0_{found[3]}_{found[4].replace('.', '_')}"
        rows, columns = weight.shape
        state[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        state[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * (0.5 / rank**0.5)
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    folder = ROOT / "models/Lora"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_output_name": "tinylora"}
    halves = {key: value.half().contiguous() for key, value in state.items()}
    save_file(halves, folder / "tinylora.safetensors", metadata=about)


def hypernetwork() -> None:
    """A hypernetwork for tinysd1's self-attention (64, 128, 256 channels) and cross-attention (768)."""
    generator = torch.Generator().manual_seed(6)

    def layers(dim: int) -> dict[str, torch.Tensor]:
        wide, narrow = (torch.randn(*shape, generator=generator) for shape in ((2 * dim, dim), (dim, 2 * dim)))
        weights = {"linear.0.weight": wide * 0.4 / dim**0.5, "linear.1.weight": narrow * 0.4 / (2 * dim) ** 0.5}
        return {**weights, "linear.0.bias": torch.zeros(2 * dim), "linear.1.bias": torch.zeros(dim)}

    state = {dim: (layers(dim), layers(dim)) for dim in (64, 128, 256, 768)}
    folder = ROOT / "models/hypernetworks"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "name": "tinyhn", "step": 1, "activate_output": False}, folder / "tinyhn.pt")


if __name__ == "__main__":
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    write_clip()
    if "--sd15" in sys.argv[2:]:
        sd1("sd15random", full=True)
    else:
        sd1("tinysd1")
        sd1("tinysd1b", other_weights)
        sd2v()
        sdxl()
        lora()
        hypernetwork()
