#!/usr/bin/env bash
# gguf 0.19.0, the Python package of llama.cpp, on the widths of Stable Diffusion's layers
#
# Expected: a type that gguf.quants reads it also writes, and a U-Net can be stored in Q4_K as language models are.
#   gguf/quants.py has `quantize` beside `dequantize`, both given the type.
# Seen: no K type can be written: quantize raises NotImplementedError with an empty message, while dequantize
#   works. The layers of SD 1.5's two largest resolutions could not be held by one at all: rows of 320 and 640 are no
#   multiple of the block of 256, and that is another error. Q8_0, Q5_1 and Q4_0 (blocks of 32) take both.
# Why: gguf/quants.py, class Q4_K and its like have dequantize_blocks alone; gguf/constants.py, GGML_QUANT_SIZES.
# Output:
#   Q4_K, rows of 320: QuantError; of 1280: NotImplementedError()
#   Q6_K, rows of 320: QuantError; of 1280: NotImplementedError()
#   Q8_0, rows of 320: written; of 1280: written
#   Q4_0, rows of 320: written; of 1280: written
#   a block of Q4_K, read: 256 values
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants


def written(name, width):
    weights = numpy.linspace(-1, 1, 4 * width, dtype=numpy.float32).reshape(4, width)
    try:
        data = quants.quantize(weights, GGMLQuantizationType[name])
    except (NotImplementedError, quants.QuantError) as error:
        return "QuantError" if isinstance(error, quants.QuantError) else repr(error)
    assert quants.dequantize(data, GGMLQuantizationType[name]).shape == weights.shape
    return "written"


refused = ["QuantError", "NotImplementedError()"]
for name, expected in {"Q4_K": refused, "Q6_K": refused, "Q8_0": ["written"] * 2, "Q4_0": ["written"] * 2}.items():
    seen = [written(name, width) for width in (320, 1280)]
    print(f"{name}, rows of 320: {seen[0]}; of 1280: {seen[1]}")
    assert seen == expected, f"changed: {expected} before"

block = numpy.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K][1]), dtype=numpy.uint8)
values = quants.dequantize(block, GGMLQuantizationType.Q4_K)
print(f"a block of Q4_K, read: {values.size} values")
assert values.size == 256
EOF
