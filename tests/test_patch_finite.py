"""No black image on our account: where the first answers are not finite, the host makes the rest of the pass."""

from types import SimpleNamespace

import pytest
import torch
from blocks import run
from kinds import CORRECTED
from patching import EXAMPLE, GOLDEN, at

from agentsd import get_patch, patched
from agentsd.methods import method_named
from agentsd.patching.finite import NOTE, FiniteCheck


@pytest.fixture
def broken(monkeypatch):
    """Whether the method's answers are not finite: a list, true while it has an entry."""
    broken, method = [True], method_named("corrected")
    attend = method.attend

    def answer(self, attention):
        out = attend(attention)
        return out.index_fill(1, torch.tensor([3]), float("nan")) if broken else out

    monkeypatch.setattr(type(method), "attend", answer)
    return broken


def test_the_host_makes_the_rest_of_the_pass(broken):
    plain = run(GOLDEN, EXAMPLE)
    with patched(GOLDEN, **CORRECTED):
        patch = get_patch(GOLDEN)
        assert torch.equal(run(GOLDEN, EXAMPLE), plain)
        assert torch.equal(run(GOLDEN, EXAMPLE), plain)
        assert list(patch.notes) == [NOTE]
        run(GOLDEN, at(300))
        broken.clear()
        expected = run(GOLDEN, at(300))
        assert patch.notes[NOTE] == 3
        # timesteps rise again: another image
        changed = run(GOLDEN, EXAMPLE)
        assert patch.notes[NOTE] == 3
        assert (changed - plain).abs().max() > 1e-3
        assert not torch.equal(run(GOLDEN, at(300)), expected)


def test_where_the_host_is_not_finite_either_nothing_is_said(broken):
    x, t, context = EXAMPLE
    with patched(GOLDEN, **CORRECTED):
        for _ in range(2):
            run(GOLDEN, (x.index_fill(1, torch.tensor([0]), float("inf")), t, context))
        assert not get_patch(GOLDEN).notes


def test_only_the_first_answers_are_looked_at(monkeypatch):
    with patched(GOLDEN, **CORRECTED):
        run(GOLDEN, EXAMPLE)
        monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: pytest.fail("looked at again"))
        run(GOLDEN, EXAMPLE)
        assert not get_patch(GOLDEN).notes


def test_a_device_without_events_is_read_at_once(monkeypatch):
    class Bad:
        device = SimpleNamespace(type="privateuseone")  # DirectML's

        def any(self):
            return self

    check = FiniteCheck()
    check._bad.append(None)
    monkeypatch.setattr(torch, "stack", lambda bad: Bad())
    assert check.poll()
