#!/usr/bin/env bash
# tomesd 0.1.3 with diffusers 0.42.1 (torch 2.13.0, CPU)
#
# Expected: torch.manual_seed before a call makes the call repeat itself: every generator that a library draws from by
#   default is seeded by it (torch's page on reproducibility).
# Seen: with tomesd's default use_rand=True the second call after the same seed gives another result, and so a pipeline
#   gives another image for the same seed and generator. Patching anew gives the first again.
# Why: tomesd/utils.py, init_generator, "Forks the current default random generator" once, at the first call after
#   apply_patch; tomesd/patch.py keeps the fork and draws on from it in later calls and images.
# Output:
#   same seed again: another result
#   same seed after a new apply_patch: the first result
#   without tomesd, same seed again: the same result
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 tomesd==0.1.3
"$work/venv/bin/python" -W ignore - <<'EOF'
import tomesd
import torch
from diffusers import UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
latents, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 32)


@torch.no_grad()
def result():
    torch.manual_seed(7)
    return unet(latents, torch.tensor(500), prompt).sample


tomesd.apply_patch(unet, ratio=0.5)
first, again = result(), result()
assert not torch.allclose(first, again, atol=1e-4), "changed: the same seed gives the same result"
print("same seed again: another result")
tomesd.apply_patch(unet, ratio=0.5)
assert torch.equal(first, result())
print("same seed after a new apply_patch: the first result")
tomesd.remove_patch(unet)
assert torch.equal(result(), result())
print("without tomesd, same seed again: the same result")
EOF
