#!/usr/bin/env bash
# torchsde 0.2.6, BrownianInterval and BrownianTree (torch 2.13.0, CPU): the noise of the SDE samplers
#
# Expected: with one `entropy` there is one path, so W(0.5) is the same whatever was asked before. The class's docstring
#   is "Brownian interval with fixed entropy", of the argument "Global seed", and k-diffusion's samplers rely on it
#   (the same seed with more steps keeps the composition).
# Seen: BrownianTree keeps to it. BrownianInterval, the newer class that does its work, does not: asking for W(0.3)
#   first makes W(0.5) another number. A sampler that changes over loses its seeds at every step count.
# Why: brownian_interval.py draws as its tree of intervals grows, and a query splits the tree. Only halfway_tree=True,
#   False by default, fixes the path; BrownianTree passes it.
# Output:
#   BrownianInterval: W(0.5) changes if W(0.3) was asked first
#   BrownianInterval with halfway_tree=True: W(0.5) stays
#   BrownianTree: W(0.5) stays
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 torchsde==0.2.6
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchsde

makers = {
    "BrownianInterval": (True, lambda: torchsde.BrownianInterval(0.0, 1.0, size=(1, 8), entropy=7)),
    "BrownianInterval with halfway_tree=True": (
        False, lambda: torchsde.BrownianInterval(0.0, 1.0, size=(1, 8), entropy=7, halfway_tree=True, tol=1e-3)
    ),
    "BrownianTree": (False, lambda: torchsde.BrownianTree(0.0, torch.zeros(1, 8), 1.0, entropy=7)),
}
for name, (expected, make) in makers.items():
    direct = make()(0.0, 0.5)
    path = make()
    path(0.0, 0.3)
    changes = not torch.allclose(direct, path(0.0, 0.5), atol=1e-3)
    print(f"{name}: W(0.5) {'changes if W(0.3) was asked first' if changes else 'stays'}")
    assert changes == expected, "changed"
EOF
