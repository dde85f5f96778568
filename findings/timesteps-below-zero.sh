#!/usr/bin/env bash
# diffusers 0.42.1, schedulers of EDM, consistency models and Stable Audio (torch 2.13.0)
#
# Expected: scheduler.timesteps lies in 0 to num_train_timesteps - 1, so t / 1000 is how far an image is from done. The
#   docstrings say "num_train_timesteps (int, defaults to 1000): The number of diffusion steps to train the model", and
#   each step's callback is handed such a t.
# Seen: with num_train_timesteps=1000 EDM's timesteps run from 1.1 to -1.6 and Stable Audio's from 0.999 to 0.186, with
#   40 those of consistency models from 1096 to -692. Whatever starts "in the last third" by t does so at once or never.
# Why: timesteps there are a function of sigma: log(sigma) / 4 (scheduling_edm_euler.py, precondition_noise),
#   1000 * log(sigma) / 4 (scheduling_consistency_models.py, sigma_to_t), atan(sigma) * 2 / pi
#   (scheduling_cosine_dpmsolver_multistep.py).
# Output:
#   EDMEulerScheduler, 1000: 1.10 0.72 0.23 -0.44 -1.55
#   CMStochasticIterativeScheduler, 40: 1095.51 790.42 420.67 -48.72 -692.10
#   CosineDPMSolverMultistepScheduler, 1000: 1.00 0.99 0.95 0.69 0.19
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 diffusers==0.42.1 torchsde==0.2.6 scipy
"$work/venv/bin/python" -W ignore - <<'EOF'
import diffusers

ranges = {
    "EDMEulerScheduler": (1.10, -1.55),
    "CMStochasticIterativeScheduler": (1095.51, -692.10),
    "CosineDPMSolverMultistepScheduler": (1.00, 0.19),
}
for name, expected in ranges.items():
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    timesteps = scheduler.timesteps.tolist()
    print(f"{name}, {scheduler.config.num_train_timesteps}:", " ".join(f"{t:.2f}" for t in timesteps))
    first, last = expected
    assert abs(timesteps[0] - first) < 0.01, f"changed: {first} before"
    assert abs(timesteps[-1] - last) < 0.01, f"changed: {last} before"
EOF
