"""The fit of values by Tikhonov's regularisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentsd.attention import fit
from agentsd.attention.fit import fit_tikhonov, fit_values, fitted_to, has_cholesky, solve_tikhonov

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ["shift", "one row", "unused key", "tall", "wide", "flat", "sharp"]


def weights(kind: str, n: int = 12) -> torch.Tensor:
    """Row-stochastic matrices (2, 3, m, n) that are far from a good inverse."""
    if kind == "shift":
        w = torch.eye(n).roll(1, 0)
    elif kind == "one row":
        w = torch.full((n, n), 1 / n)
    elif kind == "unused key":
        w = torch.cat([torch.eye(n)[:, 1:], torch.zeros(n, 1)], 1)
    elif kind == "tall":
        w = torch.randn(3 * n, n).softmax(-1)
    elif kind == "wide":
        w = torch.randn(n // 3, n).softmax(-1)
    else:
        w = ((0.01 if kind == "flat" else 300) * torch.randn(n, n)).softmax(-1)
    return w.expand(2, 3, *w.shape)


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """x with ten bits of mantissa, as a card with `allow_tf32` takes the factors of float32 products."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class CoarseProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Products of matrices as TF32 computes them: coarse factors, exact sums."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.baddbmm):
            args = [*args[:-2], *(rounded_to_tf32(a) for a in args[-2:])]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_cholesky(monkeypatch):
    monkeypatch.setattr(fit, "has_cholesky", lambda device_type: False)


def problem(w: torch.Tensor, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(V_A, V̄) that W could have brought about, but for some noise."""
    v_bar = torch.randn(*w.shape[:-2], w.shape[-1], d)
    return w @ (v_bar + torch.randn_like(v_bar)) + 0.05 * torch.randn(*w.shape[:-1], d), v_bar


class TestSolution:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("mu", [0.01, 0.05, 0.1])
    def test_is_that_of_the_regularised_problem(self, kind, mu):
        w = weights(kind)
        v_a, v_bar = problem(w)
        W, V_A, V_bar = w.double(), v_a.double(), v_bar.double()
        gram = W.mT @ W
        m = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        penalty = mu * m * (1 + 4 * m)
        expected = V_bar + torch.linalg.solve(gram + penalty * torch.eye(w.shape[-1]), W.mT @ (V_A - W @ V_bar))
        torch.testing.assert_close(fit_tikhonov(w, v_a, v_bar, mu).double(), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_solved_stays_to_the_last_bit(self, kind):
        """Nothing is left over to be fitted, so no rounding of the factorisation shows."""
        w = weights(kind)
        v_bar = torch.randn(2, 3, w.shape[-1], 5)
        assert torch.equal(fit_tikhonov(w, w @ v_bar, v_bar), v_bar)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_residual_does_not_grow(self, kind):
        w = weights(kind)
        v_a, v_bar = problem(w)
        y = fit_tikhonov(w, v_a, v_bar)
        assert ((v_a - w @ y).norm(dim=-2) <= (v_a - w @ v_bar).norm(dim=-2) + 1e-5).all()

    def test_a_smaller_penalty_fits_closer(self):
        w = (4 * torch.randn(1, 30, 30)).softmax(-1)
        v_a, v_bar = problem(w)
        residuals = [(v_a - w @ fit_tikhonov(w, v_a, v_bar, mu)).norm() for mu in (0.01, 0.1, 1.0)]
        assert residuals == sorted(residuals)

    def test_gradients_reach_everything(self):
        given = [weights("tall").clone(), torch.randn(2, 3, 36, 5), torch.randn(2, 3, 12, 5)]
        fit_tikhonov(*(x.requires_grad_() for x in given)).square().sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in given)


class TestCoarseProducts:
    def test_the_factors_are_rounded(self):
        x = torch.tensor([1 + 2**-10, 1 + 2**-13, -3.0])
        assert rounded_to_tf32(x).tolist() == [1 + 2**-10, 1.0, -3.0]

    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 16.0])
    def test_they_change_little(self, sharpness):
        a = torch.randn(4, 128, 32)
        w = (sharpness * a @ a.mT / 32**0.5).softmax(-1)
        v_bar = torch.randn(4, 128, 16)
        v_a = w @ (v_bar + 0.3 * torch.randn(4, 128, 16))
        exact = fit_tikhonov(w, v_a, v_bar)
        with CoarseProducts():
            coarse = fit_tikhonov(w, v_a, v_bar)
        assert (coarse - exact).norm() < 0.02 * exact.norm()


class TestConjugateSteps:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_residual_never_grows(self, kind):
        w = weights(kind)[0, 0]
        v_a, start = torch.randn(w.shape[0], 5), torch.randn(w.shape[1], 5)
        residuals = torch.stack([(v_a - w @ fit_values(w, v_a, start, steps)).norm(dim=0) for steps in range(9)])
        assert residuals.isfinite().all()
        assert (residuals.diff(dim=0) <= 1e-5).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_solved_stays(self, kind):
        w = weights(kind)[0, 0]
        start = torch.randn(w.shape[1], 5)
        torch.testing.assert_close(fit_values(w, w @ start, start, 8), start, **CLOSE)

    def test_a_rectangular_fit_is_the_least_squares_solution(self):
        w, v_a = torch.randn(40, 6).softmax(-1), torch.randn(40, 3)
        y = fit_values(w, v_a, torch.zeros(6, 3), 12)
        torch.testing.assert_close(y, torch.linalg.lstsq(w, v_a).solution, rtol=1e-3, atol=1e-3)


class TestFallback:
    def test_a_row_that_is_not_finite_uses_the_values_it_began_with(self):
        w, v_a, v_bar = weights("tall").clone(), torch.randn(2, 3, 36, 5), torch.randn(2, 3, 12, 5)
        expected = fit_tikhonov(w, v_a, v_bar)
        w[1, 2, 0, 0] = torch.inf
        y = fit_tikhonov(w, v_a, v_bar)
        assert torch.equal(y[1, 2], v_bar[1, 2])
        expected[1, 2] = y[1, 2]
        assert torch.equal(y, expected)

    def test_a_channel_that_is_not_finite_keeps_its_values(self):
        w, v_a, v_bar = weights("tall"), torch.randn(2, 3, 36, 5), torch.randn(2, 3, 12, 5)
        expected = fit_tikhonov(w, v_a, v_bar)
        v_a[0, 1, 3, 2] = torch.nan
        y = fit_tikhonov(w, v_a, v_bar)
        expected[0, 1, :, 2] = v_bar[0, 1, :, 2]
        torch.testing.assert_close(y, expected, **CLOSE)

    @given(seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e3, 1e6]))
    def test_it_is_bounded(self, seed, sharpness):
        generator = torch.Generator().manual_seed(seed)
        w = (sharpness * torch.randn(2, 20, 20, generator=generator)).softmax(-1)
        r = torch.randn(2, 20, 6, generator=generator)
        root = torch.tensor([[0.03], [0.3]])
        delta = solve_tikhonov(w, r, (root, root), 1.0)
        assert (delta.norm(dim=(-2, -1)) <= 1.001 * r.norm(dim=(-2, -1)) / (2 * root[:, 0])).all()

    def test_float16_ends_where_it_ends(self):
        y = torch.tensor([1.0, 1e5, -1e6])
        assert fitted_to(torch.float16, y).tolist() == [1.0, 65504.0, -65504.0]
        assert torch.equal(fitted_to(torch.float32, y), y)


class TestWithoutCholesky:
    def test_the_conjugate_steps_take_its_place(self, no_cholesky, monkeypatch):
        monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
        w, v_bar = weights("tall"), torch.randn(2, 3, 12, 5)
        v_a = torch.randn(2, 3, 36, 5)
        y = fit_tikhonov(w, v_a, v_bar)
        assert (v_a - w @ y).norm() < 0.99 * (v_a - w @ v_bar).norm()
        assert torch.equal(fit_tikhonov(w, w @ v_bar, v_bar), v_bar)

    def test_steps_that_run_away_are_rejected(self, no_cholesky):
        v_bar = torch.randn(2, 3, 12, 5)
        w, v_a = torch.full((2, 3, 12, 12), torch.nan), v_bar.clone()
        assert torch.equal(fit_tikhonov(w, v_a, v_bar), v_bar)

    def test_a_device_is_tried_once(self, monkeypatch):
        tried = []

        def missing(*_args, **_kwargs):
            tried.append(1)
            raise NotImplementedError("aten::linalg_cholesky_ex is not implemented")

        monkeypatch.setattr(torch.linalg, "cholesky_ex", missing)
        fit._factorises.cache_clear()
        try:
            assert [fit._factorises("cpu") for _ in range(3)] == [False] * 3
            assert len(tried) == 1
        finally:
            fit._factorises.cache_clear()

    def test_this_device_has_one(self):
        fit._factorises.cache_clear()
        assert fit._factorises("cpu")
        assert has_cholesky("cpu")

    def test_a_tensor_of_no_weights_is_solved_too(self):
        """Where a window sees everything, landmarks have no weight, and the penalty is what the other weights say."""
        delta = solve_tikhonov(torch.zeros(2, 6, 5), torch.zeros(2, 6, 3), (torch.ones(2, 1), torch.ones(2, 1)), 1.0)
        assert torch.equal(delta, torch.zeros(2, 5, 3))
