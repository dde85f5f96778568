#!/usr/bin/env bash
# pytorch-msssim 1.0.0 (torch 2.13.0, CPU)
#
# Expected: 1 - MS-SSIM as a loss pulls any image towards its target, the worst one first; and MS-SSIM is SSIM at five
#   scales, negative where SSIM is. The README has ms_ssim_loss = 1 - ms_ssim(…) and, for
#   SSIM, the option nonnegative_ssim, off by default.
# Seen: for a picture whose structure is inverted SSIM is -0.97 with a gradient, MS-SSIM is exactly 0 and its
#   gradient is exactly 0 at every pixel: such an image never moves. With NaN one would notice.
# Why: pytorch_msssim/ssim.py, ms_ssim applies relu to each scale whatever nonnegative_ssim says; the product of the
#   scales is 0 as soon as one is, and each factor's derivative with it.
# Output:
#   SSIM of an image and its negative:    -0.97, largest gradient above 0
#   MS-SSIM of an image and its negative: 0.00, largest gradient 0.0
#   MS-SSIM of an image and noise:        largest gradient above 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy pytorch-msssim==1.0.0
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from pytorch_msssim import ms_ssim, ssim

torch.manual_seed(0)
target = torch.rand(1, 3, 176, 176)


def value_and_gradient(measure, image):
    image = image.clone().requires_grad_()
    value = measure(image, target, data_range=1.0)
    value.backward()
    return value.item(), image.grad.abs().max().item()


value, gradient = value_and_gradient(ssim, 1 - target)
print(f"SSIM of an image and its negative:    {value:.2f}, largest gradient {'above ' * (gradient > 0)}0")
assert value < -0.5
assert gradient > 0
value, gradient = value_and_gradient(ms_ssim, 1 - target)
print(f"MS-SSIM of an image and its negative: {value:.2f}, largest gradient {gradient}")
assert value == gradient == 0, "changed: the gradient is alive"
value, gradient = value_and_gradient(ms_ssim, torch.rand_like(target))
print(f"MS-SSIM of an image and noise:        largest gradient {'above ' * (gradient > 0)}0")
assert gradient > 0
EOF
