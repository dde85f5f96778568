"""Run by ComfyUI's own Python in its folder: samples small transformers of random weights with and without the node.

Prints JSON, by family: relative differences of latents, and reports. Arguments: the repository, and the families.
"""

# ruff: noqa: E402 - the host reads its options before it is imported

from __future__ import annotations

import json
import math
import sys

repository, *families = sys.argv[1:]
sys.path[:0] = [".", repository]
sys.argv = ["main.py", "--cpu"]

import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch

from agentsd.comfy.nodes import AgentAttention, AgentAttentionReport

WIDTH, POOLED = 32, 64
COMMON = {"in_channels": 16, "out_channels": 16, "patch_size": 2}
FLUX = {**COMMON, "image_model": "flux", "vec_in_dim": POOLED, "context_in_dim": WIDTH, "hidden_size": 32}
FLUX |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 8]}
FLUX |= {"theta": 10000, "qkv_bias": True, "guidance_embed": False}
SD3 = {**COMMON, "depth": 2, "input_size": None, "adm_in_channels": POOLED, "pos_embed_max_size": 64}
SD3 |= {"num_patches": 64 * 64, "qk_norm": "rms", "x_block_self_attn_layers": [0]}
EMBEDDER = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
MADE = {
    "Flux": (comfy.supported_models.Flux, FLUX),
    "SD3": (comfy.supported_models.SD3, {**SD3, "context_embedder_config": EMBEDDER}),
}


@torch.no_grad()
def make(family: str):
    kind, config = MADE[family]
    config = kind(dict(config))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(model.diffusion_model.state_dict().items()):
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / math.sqrt(p[0].numel()) if p.dim() > 1 else 1 + noise / 10 if "norm" in name else noise / 10)
    text = [torch.randn(1, n, WIDTH, generator=generator) for n in (77, 77)]
    pooled = [torch.randn(1, POOLED, generator=generator) for _ in text]
    conditioning = [[[t, {"pooled_output": p}]] for t, p in zip(text, pooled, strict=True)]
    return comfy.model_patcher.ModelPatcher(model, device, device), conditioning


def run(model, conditioning):
    noise = torch.randn(1, 16, 56, 48, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        model, noise, 2, 2.0, "euler", "normal", *conditioning, torch.zeros_like(noise), seed=0, disable_pbar=True
    )


def louder(calls):
    def override(func, q, *args, **kwargs):
        calls.append(q.shape[-2])
        return func(q, *args, **kwargs) * 1.5

    return override


def check(family: str) -> dict:
    model, conditioning = make(family)
    plain = run(model, conditioning)

    def away(latent, base=plain) -> float:
        return ((latent - base).norm() / base.norm()).item()

    def node(model, **inputs):
        return AgentAttention().apply(model, method="corrected", cells="2×2, closest", **inputs)[0]

    on = node(model, exact_ratio=0.2)
    closer = node(model, exact_ratio=0.45)
    off = node(model, exact_ratio=0.2, rules="full")
    calls: list[int] = []
    neighbour = model.clone()
    neighbour.model_options["transformer_options"]["optimized_attention_override"] = louder(calls)
    loud, both = run(neighbour, conditioning), node(neighbour, exact_ratio=0.2)
    alone = len(calls)
    out = {
        **{name: away(run(each, conditioning)) for name, each in (("on", on), ("closer", closer), ("off", off))},
        "original": away(run(model, conditioning)),
        "report": AgentAttentionReport().report(on, None)[0],
        "neighbour": away(loud),
        "with neighbour": away(run(both, conditioning), loud),
        "calls with node": calls[alone:],
        "report with neighbour": AgentAttentionReport().report(both, None)[0],
        "refused": {},
    }
    for method in ("merge", "pool"):
        try:
            AgentAttention().apply(model, method=method)
        except ValueError as error:
            out["refused"][method] = str(error)
    return out


print("RESULT " + json.dumps({family: check(family) for family in families}))
