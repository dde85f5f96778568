#!/usr/bin/env bash
# lycoris-lora 4.1.3 (torch 2.13.0, CPU)
#
# Expected: LycorisNetwork.apply_preset chooses the layers of the network made next, and create_lycoris(model,
#   preset="full"), its default, adapts every linear layer and convolution. The README's example calls apply_preset
#   right before create_lycoris, as if for that network.
# Seen: what was applied once holds for every later network of the process, of any model, the explicit preset "full"
#   included. Nothing warns: the second network trains, with one layer of four.
# Why: lycoris/wrapper.py, apply_preset sets attributes of the class, and only those that the preset names. "full" names
#   no target_name and no target_module here, so the last ones stay.
# Output:
#   first network, preset full:    ['attn_to_q', 'attn_to_out', 'ff', 'conv']
#   after apply_preset for to_q:   ['attn_to_q']
#   another model, preset full:    ['attn_to_q']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 lycoris-lora==4.1.3
"$work/venv/bin/python" -W ignore - 2>"$work/log" <<'EOF' || { cat "$work/log"; exit 1; }
import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.Linear(8, 8)})
        self.ff = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3)


def adapted():
    network = create_lycoris(Block(), 1.0, linear_dim=2, linear_alpha=1, algo="lora", preset="full")
    return [layer.lora_name.removeprefix("lycoris_") for layer in network.loras]


everything, chosen = ["attn_to_q", "attn_to_out", "ff", "conv"], ["attn_to_q"]
first = adapted()
print("first network, preset full:   ", first)
LycorisNetwork.apply_preset({"target_module": [], "target_name": [r"attn\.to_q"]})
second = adapted()
print("after apply_preset for to_q:  ", second)
third = adapted()
print("another model, preset full:   ", third)
assert first == everything
assert second == third == chosen, "changed: the preset no longer stays"
EOF
