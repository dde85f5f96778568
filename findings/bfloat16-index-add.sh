#!/usr/bin/env bash
# torch 2.13.0, bfloat16 on the CPU: index_add against scatter_add, by the shape of the tensor
#
# Expected: two ways to add tokens into their groups, one sum, whatever the shape. torch's pages on
#   index_add_ ("Accumulate the elements …") and on scatter_add_ ("Adds all values …") read alike and name no shape that
#   differs, and sums in bfloat16 are kept in float32 inside.
# Seen: scatter_add does so. index_add does for tokens of shape (N, C), but for the same tokens as (B, N, C) it rounds
#   after each and stands still once the next is less than half a unit: a thousand ones are 256, of float16 4,096 ones
#   are 2048. index_reduce(..., 'mean') has it the other way round: 1.0 for (B, N, C), 0.256 for (N, C).
# Why it matters here: token merging adds up tokens by index, batched. Source: aten/src/ATen/native/
#   TensorAdvancedIndexing.cpp, where index_add has a path of its own for two dimensions.
# Output:
#   bfloat16 (1000, 8):    scatter_add 1000, index_add 1000, index_reduce mean 0.256
#   bfloat16 (2, 1000, 8): scatter_add 1000, index_add 256, index_reduce mean 1.000
#   float16 (4096, 8):    scatter_add 4096, index_add 4096, index_reduce mean 0.500
#   float16 (2, 4096, 8): scatter_add 4096, index_add 2048, index_reduce mean 1.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch


def added(shape, dim, dtype):
    count = shape[dim]
    tokens = torch.ones(shape, dtype=dtype)
    zero = torch.zeros_like(tokens.narrow(dim, 0, 1))
    group = torch.zeros(count, dtype=int)
    results = (
        zero.scatter_add(dim, torch.zeros(shape, dtype=int), tokens),
        zero.index_add(dim, group, tokens),
        zero.index_reduce(dim, group, tokens, "mean", include_self=False),
    )
    assert all(result.unique().numel() == 1 for result in results)
    return [result.flatten()[0].item() for result in results]


for dtype, count, stops_at in ((torch.bfloat16, 1000, 256), (torch.float16, 4096, 2048)):
    for shape, dim, expected in (
        ((count, 8), 0, (count, count, stops_at / count)),
        ((2, count, 8), 1, (count, stops_at, 1)),
    ):
        seen = added(shape, dim, dtype)
        print(f"{str(dtype)[6:]} {str(shape) + ':':14} scatter_add {seen[0]:.0f}, index_add {seen[1]:.0f}, "
              f"index_reduce mean {seen[2]:.3f}")
        assert all(abs(a - b) < 1e-3 for a, b in zip(seen, expected)), f"changed: {expected} before"
EOF
