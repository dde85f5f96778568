"""The fit of values by Tikhonov's regularisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentsd.attention import fit
from agentsd.attention.fit import GROWTH, MU, cast_within_range, fit_values, has_cholesky, value_correction

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


def problem(w: torch.Tensor, d: int = 5) -> torch.Tensor:
    """R that a change of values could have brought about, but for some noise."""
    return w @ torch.randn(*w.shape[:-2], w.shape[-1], d) + 0.05 * torch.randn(*w.shape[:-1], d)


def squares(w: torch.Tensor) -> torch.Tensor:
    return w.square().sum((-2, -1))


class TestSolution:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("others", [0.0, 0.5])
    def test_is_that_of_the_regularised_problem(self, kind, others):
        w = weights(kind)
        r = problem(w)
        W = w.double()
        gram = W @ W.mT
        m = ((squares(W) + others) / w.shape[-2])[..., None, None]
        penalty = MU * m * (1 + GROWTH * m) * torch.eye(w.shape[-2])
        expected = W.mT @ torch.linalg.solve(gram + penalty, r.double())
        out = value_correction(w, r, squares(w) + others)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


class TestConjugateSteps:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_residual_never_grows_and_what_is_solved_stays(self, kind):
        w = weights(kind)[0, 0]
        v_a = torch.randn(w.shape[0], 5)
        residuals = torch.stack([(v_a - w @ fit_values(w, v_a, steps)).norm(dim=0) for steps in range(9)])
        assert residuals.isfinite().all()
        assert (residuals.diff(dim=0) <= 1e-5).all()
        assert not fit_values(w, 0 * v_a, 8).any()

    def test_a_rectangular_fit_is_the_least_squares_solution(self):
        w, v_a = torch.randn(40, 6).softmax(-1), torch.randn(40, 3)
        torch.testing.assert_close(fit_values(w, v_a, 12), torch.linalg.lstsq(w, v_a).solution, rtol=1e-3, atol=1e-3)


class TestFallback:
    def test_what_is_not_finite_is_left_alone(self):
        w, r = weights("tall").clone(), torch.randn(2, 3, 36, 5)
        expected = value_correction(w, r, squares(w))
        w[1, 2, 0, 0], r[0, 1, 3, 2] = torch.inf, torch.nan
        expected[1, 2] = expected[0, 1, :, 2] = 0
        torch.testing.assert_close(value_correction(w, r, squares(w)), expected, **CLOSE)

    @given(seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e3, 1e6]))
    def test_it_is_bounded(self, seed, sharpness):
        generator = torch.Generator().manual_seed(seed)
        w = (sharpness * torch.randn(2, 20, 20, generator=generator)).softmax(-1)
        r = torch.randn(2, 20, 6, generator=generator)
        m = squares(w) / w.shape[-2]
        bound = r.norm(dim=(-2, -1)) / (2 * (MU * m * (1 + GROWTH * m)).sqrt())
        assert (value_correction(w, r, squares(w)).norm(dim=(-2, -1)) <= 1.01 * bound).all()

    def test_float16_ends_where_it_ends(self):
        y = torch.tensor([1.0, 1e5, -1e6])
        assert cast_within_range(torch.float16, y).tolist() == [1.0, 65504.0, -65504.0]
        assert torch.equal(cast_within_range(torch.float32, y), y)


class TestWithoutCholesky:
    def test_the_conjugate_steps_take_its_place_and_are_rejected_where_they_run_away(self, monkeypatch):
        monkeypatch.setattr(fit, "has_cholesky", lambda device_type: False)
        monkeypatch.setattr(fit, "cholesky_ex", None)
        w = weights("tall")
        r = problem(w)
        assert (r - w @ value_correction(w, r, squares(w))).norm() < 0.99 * r.norm()
        assert not value_correction(w, 0 * r, squares(w)).any()
        assert not value_correction(w * torch.nan, r, squares(w)).any()

    def test_a_device_is_tried_once(self, monkeypatch):
        tried = []

        def missing(*_args, **_kwargs):
            tried.append(1)
            raise NotImplementedError("aten::linalg_cholesky_ex is not implemented")

        fit._factorises.cache_clear()
        assert has_cholesky("cpu")
        assert fit._factorises("cpu")
        fit._factorises.cache_clear()
        monkeypatch.setattr(fit, "cholesky_ex", missing)
        try:
            assert [fit._factorises("cpu") for _ in range(3)] == [False] * 3
            assert len(tried) == 1
        finally:
            fit._factorises.cache_clear()
