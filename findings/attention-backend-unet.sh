#!/usr/bin/env bash
# diffusers 0.42.1, set_attention_backend on a U-Net (torch 2.13.0, CPU)
#
# Expected: unet.set_attention_backend("_native_math") has the U-Net's attention run by the math kernel and leaves other
#   models alone. Its docstring: "Set the attention backend for the model."
# Seen: the other way round. The U-Net takes the call without complaint and runs the kernel that it ran before; a Flux
#   transformer beside it, which nobody touched, now runs the math kernel. unet.reset_attention_backend() does
#   not undo it.
# Why: modeling_utils.py, set_attention_backend, sets processor._attention_backend where a processor has it (the U-Net's
#   AttnProcessor2_0 has not: it calls F.scaled_dot_product_attention itself), and then makes the backend the registry's
#   active one, which every model without a choice of its own asks for.
#   reset_attention_backend clears the processors only.
# Output:
#   before:                             U-Net fused, Flux fused
#   after unet.set_attention_backend:   U-Net fused, Flux math
#   after unet.reset_attention_backend: U-Net fused, Flux math
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" -W ignore - 2>"$work/log" <<'EOF' || { cat "$work/log"; exit 1; }
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
)
flux = FluxTransformer2DModel(
    in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)
flux_inputs = {
    "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 4, 32),
    "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
    "txt_ids": torch.zeros(4, 3),
}
unet_inputs = {
    "sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(500), "encoder_hidden_states": torch.randn(1, 4, 32)
}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def kernels():
    seen = []
    for model, inputs in ((unet, unet_inputs), (flux, flux_inputs)):
        with Operators() as operators:
            model(**inputs)
        seen.append("fused" if "_scaled_dot_product_flash_attention_for_cpu" in operators.names else "math")
    return seen


before = kernels()
print("before:                             U-Net {}, Flux {}".format(*before))
unet.set_attention_backend("_native_math")
after = kernels()
print("after unet.set_attention_backend:   U-Net {}, Flux {}".format(*after))
unet.reset_attention_backend()
reset = kernels()
print("after unet.reset_attention_backend: U-Net {}, Flux {}".format(*reset))
assert before == ["fused", "fused"]
assert after == reset == ["fused", "math"], "changed"
EOF
