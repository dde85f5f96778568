"""Tuning: what is measured and chosen, and what it leaves behind. No timing is asserted."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from blocks import flat_unet, golden_unet, inputs, run, tree

import agentsd
from agentsd import SettingError, TuningCancelled, TuningError
from agentsd.tuning import probe


@pytest.fixture(scope="module")
def unet():
    return golden_unet()


def calls_at(*timesteps: int, seed: int = 0, side: int = 16) -> list:
    made = []
    for t in timesteps:
        x, t, context = inputs(2, side, side, seed=seed, t=[t, t])
        made.append(((x, t), {"context": context}))
    return made


CALLS = calls_at(900, 500, 100)
TRY = ({"method": "corrected", "agent_ratio": 0.75}, {"method": "pool", "sx": 2, "sy": 2})


@pytest.fixture
def tuning(unet, every_gain_counts):
    return agentsd.tune(unet, CALLS, 0.3, methods=TRY)


def deviation(unet, tuning, call) -> float:
    args, kwargs = call
    with torch.no_grad():
        full = unet(*args, **kwargs)
        with agentsd.patched(unet, tuning=tuning):
            out = unet(*args, **kwargs)
            assert not agentsd.get_patch(unet).notes
    return ((out - full).norm() / full.norm()).item()


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.4])
def test_the_measured_deviation_is_within_the_tolerance(unet, every_gain_counts, tolerance):
    tuning = agentsd.tune(unet, CALLS, tolerance, methods=TRY)
    assert tuning.measured <= tolerance
    for moment, call in zip(tuning.moments, CALLS, strict=True):
        assert deviation(unet, tuning, call) == pytest.approx(moment.measured, rel=1e-3, abs=1e-6)


def test_a_larger_tolerance_does_more(unet, every_gain_counts):
    def changed(tolerance):
        return sum(c != "." for part in agentsd.tune(unet, CALLS, tolerance, methods=TRY).choices for c in part)

    assert changed(0.001) < changed(0.5)


def test_what_is_no_faster_is_never_chosen(unet, monkeypatch, every_gain_counts):
    monkeypatch.setattr(probe.Probe, "seconds", lambda self, name: {0: 1.0, 1: 1.0, 2: 0.99})
    tuning = agentsd.tune(unet, CALLS, 0.9, methods=TRY)
    assert set("".join(tuning.choices)) == {"."}
    assert deviation(unet, tuning, CALLS[0]) == 0


def test_all_methods_are_tried_by_default(unet):
    tuning = agentsd.tune(unet, CALLS[:1], 0.1)
    assert {candidate["method"] for candidate in tuning.candidates} == {
        method.name for method in agentsd.methods.selectable() if method.candidates
    }


def test_methods_narrow_what_is_tried(unet, every_gain_counts):
    tuning = agentsd.tune(unet, CALLS[:1], 0.9, methods=["pool"])
    assert {candidate["method"] for candidate in tuning.candidates} == {"pool"}


def test_nothing_is_done_where_nothing_was_measured(unet, every_gain_counts):
    tuning = agentsd.tune(unet, calls_at(500, 400), 0.9, methods=TRY)
    assert tuning.since == (0.0, 0.45, 0.55, 0.65)
    assert tuning.choices[0] == tuning.choices[-1] == "." * len(tuning.blocks)
    assert tuning.choices[1] != tuning.choices[0] != tuning.choices[2]
    assert deviation(unet, tuning, calls_at(900)[0]) == 0
    assert deviation(unet, tuning, calls_at(500)[0]) > 0


def test_one_timestep_is_enough(unet, every_gain_counts):
    tuning = agentsd.tune(unet, calls_at(500), 0.9, methods=TRY)
    assert tuning.since == (0.0, 0.4, 0.6)
    assert deviation(unet, tuning, calls_at(500)[0]) > 0


class TestTheModelIsLeftAlone:
    def test_after_tuning(self, unet, every_gain_counts):
        before, out = tree(unet), run(unet, inputs())
        agentsd.tune(unet, CALLS, 0.3, methods=TRY)
        assert tree(unet) == before
        assert torch.equal(run(unet, inputs()), out)

    @pytest.mark.parametrize("at", [0, 1, 4, 9, 11])
    def test_when_cancelled(self, unet, every_gain_counts, at):
        before = tree(unet)
        with pytest.raises(TuningCancelled, match=f"after {at} U-Net calls"):
            agentsd.tune(unet, CALLS, 0.3, methods=TRY, progress=lambda done, total, text: done < at)
        assert tree(unet) == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("at", [1, 4, 11])
    def test_when_interrupted(self, unet, every_gain_counts, at, error):
        def progress(done, total, text):
            if done == at:
                raise error

        before = tree(unet)
        with pytest.raises(error):
            agentsd.tune(unet, CALLS, 0.3, methods=TRY, progress=progress)
        assert tree(unet) == before

    def test_when_the_model_fails_inside(self, unet, every_gain_counts):
        before = tree(unet)
        with pytest.raises(RuntimeError):
            agentsd.tune(unet, [((torch.zeros(2, 3, 16, 16), torch.tensor([5, 5])), {})], 0.3)
        assert tree(unet) == before

    def test_a_patch_on_it_comes_back(self, unet, every_gain_counts):
        with agentsd.patched(unet):
            patch = agentsd.get_patch(unet)
            tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
            assert agentsd.get_patch(unet) is patch
            assert patch.active
        assert tuning.choices == agentsd.tune(unet, CALLS, 0.3, methods=TRY).choices

    def test_a_method_that_fails_is_not_chosen(self, unet, every_gain_counts, monkeypatch):
        from agentsd.methods import method_named

        def fail(attention):
            raise RuntimeError("no memory")

        monkeypatch.setattr(method_named("pool"), "attend", fail)
        tuning = agentsd.tune(unet, CALLS, 0.9, methods=TRY)
        assert set("".join(tuning.choices)) <= {"a", "."}


class TestPeakMemory:
    def test_a_cpu_does_not_tell(self, tuning):
        assert (tuning.peak_full, tuning.peak) == (None, None)
        assert "memory" not in str(tuning)

    def test_it_is_that_of_the_calls_that_are_timed(self, unet, every_gain_counts, monkeypatch):
        held = itertools.cycle([300 * 2**20, 200 * 2**20])  # without and with, in turn
        monkeypatch.setattr(torch.cpu, "reset_peak_memory_stats", lambda device: None, raising=False)
        monkeypatch.setattr(torch.cpu, "max_memory_allocated", lambda device: next(held), raising=False)
        tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
        assert (tuning.peak_full, tuning.peak) == (300 * 2**20, 200 * 2**20)
        assert "peak memory 300 → 200\u00a0MiB" in str(tuning)
        assert agentsd.Tuning.from_dict(tuning.to_dict()) == tuning
        assert tuning.at(0.005).peak is None, "that plan was not run"


class TestProgress:
    def test_it_counts_up_to_its_total(self, unet, every_gain_counts):
        seen = []
        agentsd.tune(unet, CALLS, 0.3, methods=TRY, progress=lambda *given: seen.append(given))
        done, total, text = zip(*seen, strict=True)
        assert list(done) == sorted(done)
        assert set(total) == {total[0]}
        assert done[0] == 0
        assert done[-1] <= total[0]
        assert all(text)


class TestOtherModels:
    def test_another_structure_is_refused(self, tuning):
        other = flat_unet()
        before = tree(other)
        with pytest.raises(TuningError, match="another model"):
            agentsd.apply_patch(other, tuning=tuning)
        assert tree(other) == before

    def test_other_weights_are_refused(self, unet, tuning):
        other = copy.deepcopy(unet)
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if name.endswith("norm1.weight")).mul_(1.01)
        with pytest.raises(TuningError, match="other weights"):
            agentsd.apply_patch(other, tuning=tuning)

    def test_lora_is_the_same_model(self, unet, tuning):
        other = copy.deepcopy(unet)
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if name.endswith("attn1.to_q.weight")).mul_(1.01)
        agentsd.apply_patch(other, tuning=tuning)

    def test_text_is_for_any_weights(self, unet, tuning):
        other = copy.deepcopy(unet)
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if name.endswith("norm1.weight")).mul_(1.01)
        agentsd.apply_patch(other, tuning=agentsd.Tuning.from_text(tuning.text))


class TestSizes:
    """What becomes of a tuning at another size, and what `explain` says of it."""

    @staticmethod
    def explained(unet, tuning, height, width):
        with agentsd.patched(unet, tuning=tuning):
            plans = dict(agentsd.get_patch(unet).explain(height, width, 0.5))
        assert any(plans.values())
        return {name: plan for name, plan in plans.items() if plan is not None}

    def test_at_its_own_size_there_is_nothing_to_say(self, unet, tuning):
        plans = self.explained(unet, tuning, 16, 16)
        assert all(plan.acts and not plan.note for plan in plans.values())
        assert tuning.advice(16, 16) == ""

    def test_a_larger_image_keeps_its_cells(self, unet, tuning):
        own, plans = self.explained(unet, tuning, 16, 16), self.explained(unet, tuning, 32, 32)
        for name, plan in plans.items():
            assert (plan.action, plan.cell) == (own[name].action, own[name].cell)
            assert plan.note.startswith(f"tuned for {own[name].tokens} tokens")
            assert str(plan.tokens) in plan.note
        assert "larger" in tuning.advice(32, 32)

    def test_another_shape_is_told_too(self, unet, tuning):
        assert all(plan.note for plan in self.explained(unet, tuning, 8, 32).values())
        assert "another shape" in tuning.advice(8, 32)

    def test_a_smaller_one_gets_full_attention_and_the_reason(self, unet, tuning):
        for plan in self.explained(unet, tuning, 8, 8).values():
            assert not plan.acts
            assert re.match(r"\d+ tokens are fewer than the \d+ that were tuned for", plan.reason)
            assert not plan.remedy, "no setting of the user's would change it"
        assert "smaller" in tuning.advice(8, 8)

    def test_cells_never_become_coarser(self, unet, every_gain_counts):
        few = {"method": "corrected", "agent_ratio": 0.75, "max_agents": 64}
        tuning = agentsd.tune(unet, CALLS, 0.9, methods=[few])
        assert any(plan.acts for plan in self.explained(unet, tuning, 16, 16).values())
        for plan in self.explained(unet, tuning, 32, 32).values():
            assert plan.acts or "coarser" in plan.reason
        assert not all(plan.acts for plan in self.explained(unet, tuning, 32, 32).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tolerance": 0}, "tolerance .* 0"),
        ({"tolerance": 1.5}, r"tolerance .* 1\.5"),
        ({"tolerance": True}, "tolerance .* True"),
        ({"calls": []}, "calls"),
        ({"calls": [*CALLS, *calls_at(100, side=8)]}, "one size"),
        ({"methods": ["nonsense"]}, "nonsense"),
        ({"methods": []}, "methods"),
        ({"methods": "pool"}, "pool"),
        ({"methods": [{"sx": 99}]}, "99"),
        ({"methods": [{"nonsense": 1}]}, "nonsense"),
    ],
)
def test_bad_arguments_are_named(unet, changes, said):
    before = tree(unet)
    with pytest.raises(SettingError, match=said):
        agentsd.tune(unet, **{"calls": CALLS, **changes})
    assert tree(unet) == before


def test_other_settings_beside_a_tuning_are_refused(unet, tuning):
    with pytest.raises(SettingError, match="sx"):
        agentsd.apply_patch(unet, sx=2, tuning=tuning)
    assert agentsd.get_patch(unet) is None
