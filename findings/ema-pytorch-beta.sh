#!/usr/bin/env bash
# ema-pytorch 0.8.3 (torch 2.13.0, CPU)
#
# Expected: EMA(net, beta=0.9999) averages over the last ten thousand updates. The README's example has "beta = 0.9999,
#   # exponential moving average factor" and tells of update_after_step and update_every, of nothing else.
# Seen: after 5,000 updates with 0 and 5,000 with 1 the average is 0.99999, where beta = 0.9999 gives 0.39. The factor
#   in force is 0.9978 at update 10,000, an average over 460; it reaches 0.9999 after a million updates.
# Why: ema_pytorch/ema_pytorch.py, get_current_decay: 1 - (1 + epoch / inv_gamma) ** -power with inv_gamma 1 and power
#   2/3, clamped to beta from above. `power=float("inf")` gives the textbook's factor from the second update on.
# Output:
#   default:   0.99999
#   power=inf: 0.39353
#   textbook:  0.39348
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy ema-pytorch==0.8.3
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from ema_pytorch import EMA


def average(**options):
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = EMA(net, beta=0.9999, update_after_step=0, update_every=1, **options)
    for step in range(10_000):
        net.weight.data.fill_(float(step >= 5_000))
        ema.update()
    return ema.ema_model.weight.item()


default, constant, textbook = average(), average(power=float("inf")), 1 - 0.9999**5_000
print(f"default:   {default:.5f}")
print(f"power=inf: {constant:.5f}")
print(f"textbook:  {textbook:.5f}")
assert default > 0.9999, "changed: beta is in force earlier"
assert abs(constant - textbook) < 1e-3
EOF
