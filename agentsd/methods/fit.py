"""The fit of values by Tikhonov's regularisation, for methods that attend to a few keys. No method itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from .corrected import FIT_STEPS, fit_values

if TYPE_CHECKING:
    from torch import Tensor

# Weight of the penalty, as a share of the mean of WᵀW's diagonal: docs/zoo.md has the figures.
MU = 0.05


def fit_tikhonov(w: Tensor, v_a: Tensor, v_bar: Tensor, mu: float = MU) -> Tensor:
    """Fit values to full attention at the agents: argmin ‖W Y − V_A‖² + μ m ‖Y − V̄‖².

        Y = V̄ + (WᵀW + μ m I)⁻¹ Wᵀ (V_A − W V̄),  m: the mean of WᵀW's diagonal

    Only what V̄ leaves over is fitted: where that is nothing, no rounding of the solution shows, and the products may
    be as coarse as TF32's.

    Args:
        w: weights of the few keys at the agents (..., m, n), float32.
        v_a: full attention at the agents (..., m, d), float32.
        v_bar: values of the few keys (..., n, d), float32.
        mu: weight of the penalty, above 0. Below 0.001 it does not hold sharp attention.

    Returns:
        (..., n, d); V̄ in rows of the batch whose fit is not finite or grows out of proportion.
    """
    from torch.linalg import vector_norm

    delta = solve_tikhonov(w, v_a - w @ v_bar, vector_norm(w, dim=(-2, -1)), mu)
    return v_bar + bounded(delta, v_bar)


def solve_tikhonov(w: Tensor, r: Tensor, norm: Tensor, mu: float = MU) -> Tensor:
    """(WᵀW + μ ‖·‖² / n I)⁻¹ Wᵀ R, without waiting for the device.

    Args:
        w: (..., m, n), float32.
        r: (..., m, d), float32.
        norm: ‖·‖, what the penalty is measured by (...): the Frobenius norm of all weights that the agents have. Those
            of the few keys are some or all of them.
        mu: weight of the penalty, above 0.

    Returns:
        (..., n, d). On devices without a Cholesky factorisation, a few conjugate steps take its place.
    """
    from torch.linalg import cholesky_ex

    if not has_cholesky(w.device.type):
        return fit_values(w, r, r.new_zeros(*w.shape[:-2], w.shape[-1], r.shape[-1]), FIT_STEPS)
    gram, norm = w.mT @ w, norm[..., None]
    gram.diagonal(dim1=-2, dim2=-1).addcmul_(norm, norm, value=mu / w.shape[-1])
    factor, _ = cholesky_ex(gram)
    return (w.mT @ r).cholesky_solve(factor)


def bounded(delta: Tensor, v_bar: Tensor) -> Tensor:
    """δ where none of its values exceeds the norm of V̄, and 0 elsewhere; decided on the device.

    Args:
        delta: what the fit adds to V̄ (..., n, d).
        v_bar: values of the few keys (..., n, d).
    """
    import torch
    from torch.linalg import vector_norm

    largest = vector_norm(delta, torch.inf, dim=(-2, -1), keepdim=True)
    # a comparison with NaN is false
    return delta.where(largest <= vector_norm(v_bar, dim=(-2, -1), keepdim=True, dtype=largest.dtype), 0)


@cache
def has_cholesky(device_type: str) -> bool:
    """Whether devices of this type factorise matrices; tried once, so that no generation has to fail to find out."""
    import torch

    try:
        eye = torch.eye(2, device=device_type)[None]
        eye.cholesky_solve(torch.linalg.cholesky_ex(eye)[0])
    except (RuntimeError, NotImplementedError):
        return False
    return True
