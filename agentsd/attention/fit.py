"""The fit of landmarks' values to full attention at the agents, by Tikhonov's regularisation."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, vector_norm

# Penalty λ = MU · m · (1 + GROWTH · m), m the mean of WWᵀ's diagonal: 1 for attention to one key, 1 / n for even ones.
# Where weights are sharp, values between the agents are known less well, and a light penalty would fit noise.
MU, GROWTH = 0.001, 300.0
# Number of conjugate steps where a device has no Cholesky factorisation.
FIT_STEPS = 3
# Largest ratio of what those steps add to what is left to be fitted, beyond which they are rejected.
FIT_GROWTH = 16.0


def value_correction(w: Tensor, r: Tensor, squares: Tensor) -> Tensor:
    """Compute Wᵀ (W Wᵀ + λ I)⁻¹ R (…, n, d), the change of values that makes up for R at the agents, without waiting.

    It is the smallest that does so, as far as the penalty lets it: its norm is at most ‖R‖ / 2√λ, and 0 where R is 0.
    W are the landmarks' weights at the agents (…, m, n), R what the values still miss (…, m, d), `squares` the sums of
    squares of all weights (…), above 0; all float32. What is not finite is 0.
    """
    if not has_cholesky(w.device.type):
        return _bounded(fit_values(w, r, FIT_STEPS), r)
    gram = w @ w.mT
    penalty = torch.addcmul(squares, squares, squares, value=GROWTH / w.shape[-2])
    gram.diagonal(dim1=-2, dim2=-1).add_(penalty[..., None], alpha=MU / w.shape[-2])
    # this succeeds: factors that are rounded, as TF32's, leave products of a matrix with itself no negative eigenvalues
    factor, _ = cholesky_ex(gram)
    return (w.mT @ r.cholesky_solve(factor)).nan_to_num_(0.0, 0.0, 0.0)


def cast_within_range(dtype: torch.dtype, y: Tensor) -> Tensor:
    """Convert fitted values to `dtype`. Float16 ends at 65504: what would be beyond stays there."""
    y = y.to(dtype)
    return y.nan_to_num() if dtype == torch.float16 else y


def fit_values(w: Tensor, v_a: Tensor, steps: int) -> Tensor:
    """Minimise ‖W Y − V_A‖² from Y = 0 by `steps` conjugate directions (CGLS), separately for each column (…, m, d).

    Each image W p is explicitly orthogonalised against all earlier ones: by the recursion alone, rounding errors grow a
    thousandfold within six steps, and the picture would depend on the batch. The residual never grows, whatever W is.
    """
    y, residual = v_a.new_zeros(*w.shape[:-2], w.shape[-1], v_a.shape[-1]), v_a
    directions: list[tuple[Tensor, ...]] = []
    for _ in range(steps):
        p = w.mT @ residual
        image = w @ p
        before = _dot(image, image)
        for other, other_image in directions:
            overlap = _dot(image, other_image)
            p, image = p - overlap * other, image - overlap * other_image
        square = _dot(image, image)
        # drop a direction that is only rounding error: the column is solved, or W cannot improve it further
        fresh = square > 1e-8 * before
        length = square.where(fresh, 1.0).rsqrt() * fresh
        p, image = p * length, image * length
        gain = _dot(image, residual)
        y, residual = y.addcmul(gain, p), residual.addcmul(gain, image, value=-1)
        directions.append((p, image))
    return y


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-2, keepdim=True)


def _bounded(delta: Tensor, r: Tensor) -> Tensor:
    """δ where none of its values is out of proportion to the norm of R, and 0 elsewhere; decided on the device."""
    largest = vector_norm(delta, torch.inf, dim=(-2, -1), keepdim=True)
    # a comparison with NaN is false
    return delta.where(largest <= FIT_GROWTH * vector_norm(r, dim=(-2, -1), keepdim=True), 0)


def has_cholesky(device_type: str) -> bool:
    """Whether devices of this type factorise matrices."""
    # a compiler meets no cache and no trial for the usual ones
    return device_type in ("cpu", "cuda", "meta") or _factorises(device_type)


@cache
def _factorises(device_type: str) -> bool:
    """Try it, once, so that no generation has to fail to find out."""
    try:
        eye = torch.eye(2, device=device_type)[None]
        eye.cholesky_solve(cholesky_ex(eye)[0])
    except (RuntimeError, NotImplementedError):
        return False
    return True
