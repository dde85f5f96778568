#!/usr/bin/env bash
# safetensors 0.8.0
#
# Expected: the same tensors and the same metadata make the same file. The README's notes on the format are strict
#   ("Duplicate keys are disallowed", "cannot contain holes"), tensors are written in a fixed order, and model sites and
#   the WebUI know a file by its SHA-256.
# Seen: with two or more metadata keys the bytes differ from process to process, so the hash does too; with none or one
#   they do not. Loaded, the files are equal.
# Why: the header's __metadata__ is written from a Rust HashMap (safetensors/src/tensor.rs,
#   `metadata: Option<HashMap<String, String>>`), whose order is random in each process.
# Output (the count of hashes may vary from 2 to 8):
#   no metadata: 1 hash of 8 files
#   one key: 1 hash of 8 files
#   eight keys: 8 hashes of 8 files
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'EOF'
import subprocess
import sys

SAVE = """
import hashlib, sys, numpy
from safetensors.numpy import load, save
keys = ["ss_network_dim", "ss_network_alpha", "ss_base_model", "ss_epoch", "ss_steps", "ss_seed", "ss_optimizer", "a"]
metadata = {key: "1" for key in keys[: int(sys.argv[1])]} or None
data = save({"lora_down": numpy.zeros((4, 8)), "lora_up": numpy.ones((8, 4))}, metadata=metadata)
assert load(data)["lora_up"].sum() == 32
print(hashlib.sha256(data).hexdigest())
"""


def hashes(keys):
    runs = [subprocess.run([sys.executable, "-c", SAVE, str(keys)], check=True, capture_output=True) for _ in range(8)]
    return len({run.stdout for run in runs})


for name, keys in (("no metadata", 0), ("one key", 1), ("eight keys", 8)):
    seen = hashes(keys)
    print(f"{name}: {seen} hash{'es' * (seen > 1)} of 8 files")
    assert (seen > 1) == (keys > 1), "changed"
EOF
