#!/usr/bin/env bash
# PyTorch (torch) 2.13.0, CPU, x86-64, two threads or more
#
# Expected: OMP_WAIT_POLICY=passive, the usual advice for machines that several processes share, costs little: some
#   microseconds where a thread has to be woken. A batch of 36×36 systems is solved about as fast as with one thread.
# Seen: on an idle machine with two threads torch.Tensor.cholesky_solve takes some thirty times as long as without the
#   variable, while factorising the same matrices (torch.linalg.cholesky_ex) and multiplying them does not suffer.
# Why: ATen calls LAPACK's potrs once a matrix, MKL starts its threads in each of these calls however small the matrix
#   is, and a passive thread sleeps in between.
# Output, on two cores of an Intel Xeon; the ratios vary, the first line is at least 4 times the second:
#   cholesky_solve, passive over default: 30x
#   cholesky_ex, passive over default: 1.5x
set -euo pipefail
[ "$(nproc)" -ge 2 ] || { echo "needs two processor cores"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile torch==2.13.0
cat > "$work/time.py" <<'EOF'
import statistics
import time

import torch

torch.set_num_threads(2)
weights = torch.rand(48, 36, 224)
systems, right = weights @ weights.mT + torch.eye(36), torch.randn(48, 36, 40)
factors, _ = torch.linalg.cholesky_ex(systems)


def seconds(run):
    taken = []
    for _ in range(41):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


print(seconds(lambda: right.cholesky_solve(factors)), seconds(lambda: torch.linalg.cholesky_ex(systems)))
EOF
unset OMP_WAIT_POLICY OMP_NUM_THREADS MKL_NUM_THREADS
default=$("$work/venv/bin/python" -W ignore "$work/time.py" 2>/dev/null)
passive=$(OMP_WAIT_POLICY=passive "$work/venv/bin/python" -W ignore "$work/time.py" 2>/dev/null)
python3 - $default $passive <<'EOF'
import sys

solve, factor, passive_solve, passive_factor = map(float, sys.argv[1:])
print(f"cholesky_solve, passive over default: {passive_solve / solve:.0f}x")
print(f"cholesky_ex, passive over default: {passive_factor / factor:.1f}x")
assert passive_solve / solve > 4 * passive_factor / factor
EOF
