#!/usr/bin/env bash
# CA-ToMe (ca-tome) 0.1.3 with diffusers 0.42.1 (torch 2.13.0, CPU)
#
# Expected: each image has its own merging, made at its first step: CacheConf's lists begin with step 0 (ca_tome/
#   confs.py), the docstring of compute_on has "the timesteps where token merging patterns should be recomputed".
# Seen: from the second image on, the first steps merge by the similarities of the image before, so an image depends on
#   its predecessor, without any randomness. If it has another size it cannot be made at all.
# Why: ca_tome/modifiers.py hands the U-Net i + 1, so steps count from 1 and no list's 0 is ever met; ca_tome/merge.py
#   makes a merging at a listed step or if there is none yet. That saves the first image only.
# Output:
#   image B alone, twice after a new patch: equal
#   image B after image A: another image
#   image B of another size after image A: RuntimeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/pip" install -qq --no-compile --no-deps ca-tome==0.1.3
"$work/venv/bin/python" -W ignore - <<'EOF'
import copy

import torch
from ca_tome import CacheConf, apply_CA_ToMe
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",),
)
vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
prompts = dict(zip("AB", torch.randn(2, 1, 4, 32), strict=True))


def patched():
    pipe = StableDiffusionPipeline(vae, None, None, copy.deepcopy(unet), DDIMScheduler(steps_offset=1), None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return apply_CA_ToMe(pipe, CacheConf.CONFIG_2, r=0.3)


def image(pipe, name, size=16):
    # guidance 1: a batch of one, for which the package draws nothing at random
    return pipe.call(prompt_embeds=prompts[name], guidance_scale=1.0, generator=torch.manual_seed(ord(name)),
                     height=size, width=size, num_inference_steps=4, output_type="latent").images


alone = image(patched(), "B")
assert torch.equal(alone, image(patched(), "B"))
print("image B alone, twice after a new patch: equal")

pipe = patched()
image(pipe, "A")
assert not torch.allclose(alone, image(pipe, "B"), atol=1e-3), "changed: the second image stands for itself"
print("image B after image A: another image")
try:
    image(pipe, "B", size=24)
    raise SystemExit("changed: another size can be made")
except RuntimeError:
    print("image B of another size after image A: RuntimeError")
EOF
