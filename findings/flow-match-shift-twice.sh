#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler (torch 2.13.0)
#
# Expected: shift=3 maps each sigma once, s -> 3 s / (1 + 2 s), from 1 down to 1/1000. The docstring has "The shift
#   value for the timestep schedule", Stable Diffusion 3's paper the formula.
# Seen: the last sigma before 0 is 0.0089 and not 0.0030: shifted twice. Those between are a little off as well.
#   Sigmas given by the caller are shifted too, once.
# Why: scheduling_flow_match_euler_discrete.py: __init__ shifts and keeps sigma_min = 0.0030; set_timesteps spaces the
#   steps from that one and shifts again. shift=1 hides it.
# Output:
#   asked for 4 steps, shift 3: 1.0000 0.8577 0.6022 0.0089 0.0000
#   the formula once:           1.0000 0.8573 0.6007 0.0030
#   given sigmas 1.0 and 0.5:   1.0000 0.7500 0.0000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def shifted(sigmas):
    return 3 * sigmas / (1 + 2 * sigmas)


def printed(sigmas):
    return " ".join(f"{sigma:.4f}" for sigma in sigmas.tolist())


scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(4)
seen, once = scheduler.sigmas, shifted(torch.linspace(1, 1 / 1000, 4))
print("asked for 4 steps, shift 3:", printed(seen))
print("the formula once:          ", printed(once))
assert torch.allclose(once[-1], torch.tensor(0.0030), atol=5e-5)
twice = shifted(torch.linspace(1, shifted(torch.tensor(1 / 1000)).item(), 4))
assert torch.allclose(seen[:-1], twice, atol=1e-6), "changed: the shift is no longer applied twice"

scheduler.set_timesteps(sigmas=[1.0, 0.5])
print("given sigmas 1.0 and 0.5:  ", printed(scheduler.sigmas))
assert torch.allclose(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))
EOF
