#!/usr/bin/env bash
# PyTorch (torch) 2.13.0, CPU
#
# Expected: a forward hook registered with always_call=True runs however the forward ends. The docstring of
#   torch.nn.Module.register_forward_hook says that it runs "regardless of whether an exception is raised".
# Seen: it runs when the forward raises ValueError, and not when it raises KeyboardInterrupt, or any other exception
#   that is no Exception, as WebUIs raise to end a sampling. Whatever such a hook should undo stays done.
# Why: torch/nn/modules/module.py, Module._call_impl: the hooks that remain are called in an `except Exception`.
# Output:
#   ValueError: the hook ran 1 times
#   KeyboardInterrupt: the hook ran 0 times
#   Stopped: the hook ran 0 times
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch


class Stopped(BaseException):
    pass


def runs(error):
    class Failing(torch.nn.Module):
        def forward(self, x):
            raise error

    module, ran = Failing(), []
    module.register_forward_hook(lambda *args: ran.append(1), always_call=True)
    try:
        module(torch.zeros(1))
    except error:
        return len(ran)


for error, expected in ((ValueError, 1), (KeyboardInterrupt, 0), (Stopped, 0)):
    count = runs(error)
    assert count == expected, f"changed: the hook ran {count} times for {error.__name__}"
    print(f"{error.__name__}: the hook ran {count} times")
EOF
