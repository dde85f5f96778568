#!/usr/bin/env bash
# diffusers 0.42.1, on torch 2.13.0, CPU
#
# Expected: casting a model by `model.to(dtype=...)` warns where some of its modules should stay in float32, as those
#   that name such modules (`_keep_in_fp32_modules`) do, and says nothing where there are none.
# Seen: it warns for every model, with an empty list: "There are modules in UNet2DConditionModel that should be kept in
#   float32: []". `model.half()` and `model.bfloat16()`, which do the same, say nothing.
# Why: ModelMixin.to replaces a missing list by an empty one, and then asks whether it is None (models/modeling_utils.py).
# Output:
#   to(dtype=float16): 1 warning, which names []
#   half(): 0 warnings
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1
cat > "$work/cast.py" <<'EOF'
import logging

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging as theirs

said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


theirs.disable_default_handler()
theirs.add_handler(Listener())
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
model = UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks)
assert model._keep_in_fp32_modules is None
model.to(dtype=torch.float16)
casts = [text for text in said if "should be kept in float32: []" in text]
print(f"to(dtype=float16): {len(casts)} warning, which names []")
assert len(casts) == len(said) == 1
said.clear()
model.float().half()
print(f"half(): {len(said)} warnings")
assert not said
EOF
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/cast.py"
