#!/usr/bin/env bash
# diffusers 0.42.1, fuse_qkv_projections, with a LoRA of peft 0.21.2 (torch 2.13.0, CPU)
#
# Expected: a LoRA on to_q, to_k and to_v of the self-attention changes the output, whether the projections were fused
#   before or not: the layers are still there, add_adapter takes them, and they are listed as adapted. The docstring of
#   fuse_qkv_projections, an experimental method, tells which matrices are fused and nothing of adapters.
# Seen: added after the fusion it changes nothing, bit by bit, and nothing is said. unfuse_qkv_projections brings it in.
# Why: models/attention.py and attention_processor.py, fuse_projections, copies the weights into to_qkv and to_kv and
#   leaves the old layers beside them, unused: peft adapts those.
# Output:
#   12 layers adapted
#   LoRA, not fused:                the output changes
#   LoRA added after the fusion:    equal to the output without LoRA
#   the same after unfusing:        equal to the LoRA that was not fused
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

latents, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 32)


def network(fused):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()
    if fused:
        unet.fuse_qkv_projections()
    return unet


def add_lora(unet):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=r".*attn1\.to_[qkv]")
    unet.add_adapter(config)
    return sum(isinstance(module, LoraLayer) for module in unet.modules())


@torch.no_grad()
def output(unet):
    return unet(latents, torch.tensor(500), prompt).sample


plain, fused = network(fused=False), network(fused=True)
without = output(plain)
assert torch.allclose(without, output(fused), atol=1e-5)
fused_without = output(fused)
adapted = add_lora(plain), add_lora(fused)
assert adapted == (12, 12)
print(adapted[0], "layers adapted")
with_lora = output(plain)
assert not torch.allclose(with_lora, without, atol=1e-3)
print("LoRA, not fused:                the output changes")
assert torch.equal(output(fused), fused_without), "changed: the LoRA has an effect"
print("LoRA added after the fusion:    equal to the output without LoRA")
fused.unfuse_qkv_projections()
assert torch.allclose(output(fused), with_lora, atol=1e-5)
print("the same after unfusing:        equal to the LoRA that was not fused")
EOF
