"""The fit of values by Tikhonov's regularisation, for methods that attend to a few keys. No method itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Weight of the penalty, as a share of the mean of WᵀW's diagonal, and how it grows as attention gets sharper:
# docs/zoo.md has the figures.
MU, GROWTH = 0.03, 4.0
# With fewer agents, fitted values overshoot between them: see docs/fidelity.md for figures.
FEWEST = 32
# With fewer than these, a rare call deviates forty times as much as most: see there as well.
SURE = 64
# With more than these, the fit, which grows with the cube of their number, costs more than they gain: docs/zoo.md.
MOST = 640
# Number of conjugate steps where a device has no Cholesky factorisation.
FIT_STEPS = 3
# Largest ratio of what those steps add to what is left to be fitted, beyond which they are rejected.
FIT_GROWTH = 16.0


def fit_tikhonov(w: Tensor, v_a: Tensor, v_bar: Tensor, mu: float = MU) -> Tensor:
    """Fit values to full attention at the agents: argmin ‖W Y − V_A‖² + λ ‖Y − V̄‖².

        Y = V̄ + (WᵀW + λ I)⁻¹ Wᵀ (V_A − W V̄)
        λ = μ m (1 + 4 m),  m: the mean of WᵀW's diagonal, from 1 / n for even weights to 1 for sharp ones

    Where weights are sharp, values between the agents are known less well, and noise is what a light penalty would fit.

    Args:
        w: weights of the few keys at the agents (..., m, n), float32.
        v_a: full attention at the agents (..., m, d), of any dtype.
        v_bar: values of the few keys (..., n, d), float32.
        mu: weight of the penalty, above 0. Below 0.001 it does not hold sharp attention.

    Returns:
        (..., n, d), float32; V̄ where the fit is not finite.
    """
    from torch.linalg import vector_norm

    n = w.shape[-1]
    square = vector_norm(w, dim=(-2, -1))[..., None].square()
    # μ m (1 + 4 m) = 4 μ / n² · ‖W‖² (‖W‖² + n / 4)
    penalty = square, square + n / GROWTH
    delta = solve_tikhonov(w, (w @ v_bar).sub_(v_a), penalty, mu * GROWTH / n**2)
    return v_bar - delta.nan_to_num(0.0, 0.0, 0.0)


def solve_tikhonov(w: Tensor, r: Tensor, penalty: tuple[Tensor, Tensor], weight: float) -> Tensor:
    """Solve (WᵀW + λ I)⁻¹ Wᵀ R, without waiting for the device.

    R is what the values still miss: where that is nothing, no rounding of the solution shows, and the products may be
    as coarse as TF32's. Whatever W is, the solution's norm is at most ‖R‖ / 2√λ.

    Args:
        w: weights of the few keys at the agents (..., m, n), float32.
        r: (..., m, d), float32.
        penalty: two factors of λ, positive (..., 1), float32.
        weight: the third, above 0.

    Returns:
        (..., n, d): finite where W and R are. On devices without a Cholesky factorisation, a few conjugate steps take
        its place.
    """
    from torch.linalg import cholesky_ex

    if not has_cholesky(w.device.type):
        return _bounded(fit_values(w, r, r.new_zeros(*w.shape[:-2], w.shape[-1], r.shape[-1]), FIT_STEPS), r)
    # (WᵀW + λ I)⁻¹ Wᵀ = Wᵀ (W Wᵀ + λ I)⁻¹: the smaller of the two
    wide = w.shape[-1] > w.shape[-2]
    gram = w @ w.mT if wide else w.mT @ w
    gram.diagonal(dim1=-2, dim2=-1).addcmul_(*penalty, value=weight)
    factor, _ = cholesky_ex(gram)
    # this succeeds: factors that are rounded, as TF32's, leave products of a matrix with itself no negative eigenvalues
    return w.mT @ r.cholesky_solve(factor) if wide else (w.mT @ r).cholesky_solve(factor)


def fitted_to(dtype: torch.dtype, y: Tensor) -> Tensor:
    """Convert fitted values to `dtype`. Float16 ends at 65504: what would be beyond stays there."""
    import torch

    y = y.to(dtype)
    return y.nan_to_num() if dtype == torch.float16 else y


def fit_values(w: Tensor, v_a: Tensor, y: Tensor, steps: int) -> Tensor:
    """Minimise ‖W Y − V_A‖² from Y by `steps` conjugate directions, for every column (channel) separately.

    The directions are those of conjugate gradients on the least-squares problem (CGLS). Each image W p is explicitly
    orthogonalised against all earlier ones: by the recursion alone, rounding errors grow a thousandfold within six
    steps, and the picture would depend on the batch. The residual never grows, whatever W is. Products only: no
    factorisation, and nothing that waits for the device.

    Args:
        w: (..., m, n).
        v_a: (..., m, d).
        y: start of the fit (..., n, d).
        steps: number of steps, at least 0.

    Returns:
        The fitted values (..., n, d).
    """
    residual, directions = v_a - w @ y, []
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
    import torch
    from torch.linalg import vector_norm

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
    import torch

    try:
        eye = torch.eye(2, device=device_type)[None]
        eye.cholesky_solve(torch.linalg.cholesky_ex(eye)[0])
    except (RuntimeError, NotImplementedError):
        return False
    return True
