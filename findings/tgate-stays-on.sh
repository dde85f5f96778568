#!/usr/bin/env bash
# T-GATE (tgate) 1.0.0 with diffusers 0.42.1 (torch 2.13.0, CPU)
#
# Expected: pipe.tgate(...) is the accelerated run and pipe(...) the ordinary one. TgateSDLoader only adds the method
#   `tgate` to the pipeline (tgate/SD.py, its last lines), and no page tells of anything to undo.
# Seen: after one pipe.tgate(...) the ordinary pipe(...) no longer sees its prompt: two prompts give the same image,
#   bit by bit. Nothing is logged, and the package has no function that ends it.
# Why: tgate_utils.register_forward puts a forward on each Attention, and the one left there by the last step takes
#   the cross-attention kept from the gate step, whatever it is given.
# Output:
#   ordinary runs before: the prompts make a difference
#   ordinary runs after one pipe.tgate(): the two prompts give equal latents
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 tgate==1.0.0
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tgate import TgateSDLoader

torch.manual_seed(0)
pipe = StableDiffusionPipeline(
    AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), None, None,
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    ),
    DDIMScheduler(steps_offset=1, clip_sample=False), None, None, requires_safety_checker=False,
)
pipe.set_progress_bar_config(disable=True)
first, second, negative = torch.randn(3, 1, 4, 32)


def latents(call, prompt, **options):
    return call(prompt_embeds=prompt, negative_prompt_embeds=negative, generator=torch.manual_seed(1), height=8,
                width=8, num_inference_steps=8, output_type="latent", **options).images


before = [latents(pipe, prompt) for prompt in (first, second)]
assert not torch.allclose(*before, atol=1e-3)
print("ordinary runs before: the prompts make a difference")

TgateSDLoader(pipe)
latents(pipe.tgate, first, gate_step=4)
after = [latents(pipe, prompt) for prompt in (first, second)]
assert torch.equal(*after), "changed: the prompt counts again after pipe.tgate()"
assert not torch.allclose(after[0], before[0], atol=1e-3)
print("ordinary runs after one pipe.tgate(): the two prompts give equal latents")
EOF
