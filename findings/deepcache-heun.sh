#!/usr/bin/env bash
# DeepCache 0.1.1 with diffusers 0.42.1's HeunDiscreteScheduler (torch 2.13.0, CPU)
#
# Expected: cache_interval=2 computes the whole U-Net at every second step. diffusers' page on DeepCache:
#   "cache_interval means the frequency of feature caching, specified as the number of steps between each cache
#   operation", and the helper takes any pipeline, whatever its scheduler.
# Seen: with Heun the whole U-Net is computed once. Every later call reuses features of pure noise, down to the last.
#   An interval of 3 refreshes.
# Why: DeepCache/extension/deepcache.py, wrap_unet_forward, looks the timestep up with list.index. Heun calls the
#   model twice for each timestep but the first, so the index found is 0, 1, 1, 3, 3, 5, 5 …: never even again.
# Output:
#   DDIM, interval 2: 10 calls, deepest block computed 5 times
#   Heun, interval 2: 19 calls, deepest block computed 1 times
#   Heun, interval 3: 19 calls, deepest block computed 7 times
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 DeepCache==0.1.1
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    AutoencoderKL, DDIMScheduler, HeunDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
)

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
calls = {"unet": 0, "deepest": 0}


def counted(name, forward):
    def count(*args, **kwargs):
        calls[name] += 1
        return forward(*args, **kwargs)
    return count


unet.forward = counted("unet", unet.forward)
unet.mid_block.forward = counted("deepest", unet.mid_block.forward)


def deepest_blocks(scheduler, interval):
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    calls.update(unet=0, deepest=0)
    prompt = torch.zeros(1, 4, 32)
    pipe(prompt_embeds=prompt, negative_prompt_embeds=prompt, num_inference_steps=10, output_type="latent",
         height=8, width=8)
    helper.disable()
    return calls["unet"], calls["deepest"]


cases = {("DDIM", 2): (10, 5), ("Heun", 2): (19, 1), ("Heun", 3): (19, 7)}
for (name, interval), expected in cases.items():
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False) if name == "DDIM" else HeunDiscreteScheduler()
    seen = deepest_blocks(scheduler, interval)
    print(f"{name}, interval {interval}: {seen[0]} calls, deepest block computed {seen[1]} times")
    assert seen == expected, f"changed: {expected} before"
EOF
