#!/usr/bin/env bash
# torch 2.13.0's FlopCounterMode on a U-Net of diffusers 0.42.1, on the CPU and on the meta device
#
# Expected: the count belongs to the model and its input, not to the device. torch/utils/flop_counter.py: "a context
#   manager that counts the number of flops within its context", with formulas for scaled_dot_product_attention.
# Seen: on the CPU attention's two products count nothing, on the meta device they do. At 64 x 64 latents attention is
#   over half of this U-Net's work, and a saving in attention, counted on the CPU, is 0.
# Why: the CPU runs aten._scaled_dot_product_flash_attention_for_cpu, which flop_registry does not list (the kernels of
#   CUDA are listed); the meta device breaks attention up into two bmm, which it does.
# Output (numbers are exact, in units of 1e9):
#   meta: 21.6 in all, bmm 13.1
#   cpu: 8.5 in all, bmm 0.0
#   meta less cpu, over 4 B N M C of all attentions: 1.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode


def count(device):
    with torch.device(device), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel(
            block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        unet(torch.zeros(1, 4, 64, 64), torch.tensor(500), torch.zeros(1, 77, 64))
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    return counter.get_total_flops(), by_operator.get("aten.bmm", 0)


(on_meta, bmm), (on_cpu, none) = count("meta"), count("cpu")
print(f"meta: {on_meta / 1e9:.1f} in all, bmm {bmm / 1e9:.1f}")
print(f"cpu: {on_cpu / 1e9:.1f} in all, bmm {none / 1e9:.1f}")
attention = 3 * sum(4 * 4096 * keys * 64 for keys in (4096, 77))  # three blocks, self- and cross-attention
print("meta less cpu, over 4 B N M C of all attentions:", (on_meta - on_cpu) / attention)
assert none == 0, "changed: the CPU's attention is counted"
assert on_meta - on_cpu == bmm == attention
EOF
