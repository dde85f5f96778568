"""Tuning: what is measured and chosen, and what it leaves behind. No timing is asserted."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from blocks import flat_unet, golden_unet, inputs, run, tree
from tuned_models import TRY, make_every_gain_count

import agentsd
from agentsd import SettingError, TuningCancelled, TuningError
from agentsd.hosts import find_sites
from agentsd.tuning import probe, replay
from agentsd.tuning.fingerprint import agree, weights_of
from agentsd.tuning.tuner import _Tuner


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


@pytest.fixture(scope="module")
def tuning(unet):
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_every_gain_count(monkeypatch)
        return agentsd.tune(unet, CALLS, 0.3, methods=TRY)


def deviation(unet, tuning, call) -> float:
    args, kwargs = call
    with torch.no_grad():
        full = unet(*args, **kwargs)
        with agentsd.patched(unet, tuning=tuning):
            out = unet(*args, **kwargs)
            assert not agentsd.get_patch(unet).notes
    return ((out - full).norm() / full.norm()).item()


def test_the_measured_deviation_is_within_the_tolerance_and_a_larger_one_does_more(unet, every_gain_counts):
    changed = []
    for tolerance in (0.001, 0.1, 0.4):
        tuning = agentsd.tune(unet, CALLS, tolerance, methods=TRY)
        assert tuning.measured <= tolerance
        for moment, call in zip(tuning.plan.deviations, CALLS, strict=True):
            assert deviation(unet, tuning, call) == pytest.approx(moment.measured, rel=1e-3, abs=1e-6)
        changed.append(sum(c != "." for part in tuning.choices for c in part))
    assert changed == sorted(changed)
    assert changed[0] < changed[-1]


def test_a_compiled_model_is_tuned_outside_of_its_graph(every_gain_counts):
    unet = golden_unet()
    unet.compile(backend="eager")
    assert agentsd.tune(unet, CALLS[:1], 0.3, methods=TRY[:1]).acts


def test_an_error_in_a_block_says_what_it_does_to_the_output(unet, every_gain_counts):
    tuner = _Tuner(replay.Replay(unet, CALLS), TRY, 0.1)
    with torch.no_grad():
        tuner.observe()
        tuner.measure_effects()
        name = tuner.blocks[0].name
        for k in (1, 2):
            said = tuner.effects[name][0] * tuner.probe.errors[name][0][k]
            assert said == pytest.approx(*tuner.deviations({name: k}, [0], ""), rel=0.5)


def test_a_plan_that_deviates_more_than_predicted_is_not_used(unet, monkeypatch, every_gain_counts):
    seen = []

    def measure_effects(self, original=_Tuner.measure_effects):
        original(self)
        self.effects = {name: [effect / 100 for effect in effects] for name, effects in self.effects.items()}

    def verify(self, chosen, calls, original=_Tuner.verify):
        seen.append(original(self, chosen, calls))
        return seen[-1]

    monkeypatch.setattr(_Tuner, "measure_effects", measure_effects)
    monkeypatch.setattr(_Tuner, "verify", verify)
    tuning = agentsd.tune(unet, CALLS, 0.02, methods=TRY)
    assert max(seen) > 0.02 >= tuning.measured
    assert max(deviation(unet, tuning, call) for call in CALLS) == pytest.approx(tuning.measured, rel=1e-3, abs=1e-6)


def test_what_is_no_faster_is_never_chosen(unet, monkeypatch, every_gain_counts):
    monkeypatch.setattr(probe.Probe, "seconds", lambda self, name: {0: 1.0, 1: 1.0, 2: 0.99})
    tuning = agentsd.tune(unet, CALLS, 0.9, methods=TRY)
    assert set("".join(tuning.choices)) == {"."}
    assert deviation(unet, tuning, CALLS[0]) == 0


def test_all_methods_are_tried_unless_narrowed(unet):
    every = [method.name for method in agentsd.methods.selectable() if method.candidates]
    for methods, tried in ((None, every), (["pool"], ["pool"])):
        tuning = agentsd.tune(unet, CALLS[:1], 0.1, methods=methods)
        assert {candidate["method"] for candidate in tuning.candidates} == set(tried)


@pytest.mark.parametrize(("timesteps", "since"), [((500, 400), (0.0, 0.45, 0.55, 0.65)), ((500,), (0.0, 0.4, 0.6))])
def test_nothing_is_done_where_nothing_was_measured(unet, every_gain_counts, timesteps, since):
    tuning = agentsd.tune(unet, calls_at(*timesteps), 0.9, methods=TRY)
    assert tuning.since == since
    full = "." * len(tuning.blocks)
    assert [part == full for part in tuning.choices] == [True, *[False] * len(timesteps), True]
    assert deviation(unet, tuning, calls_at(900)[0]) == 0
    assert deviation(unet, tuning, calls_at(500)[0]) > 0


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("error", [None, KeyboardInterrupt])
    @pytest.mark.parametrize("at", [0, 4, 11])
    def test_when_cancelled_or_interrupted(self, unet, every_gain_counts, at, error):
        def progress(done, total, text):
            if done == at and error is not None:
                raise error
            return done < at

        before = tree(unet)
        with pytest.raises(error or TuningCancelled) as raised:
            agentsd.tune(unet, CALLS, 0.3, methods=TRY, progress=progress)
        assert error or f"after {at} model calls" in str(raised.value)
        assert tree(unet) == before

    def test_when_the_model_fails_inside(self, unet, every_gain_counts):
        before = tree(unet)
        with pytest.raises(RuntimeError):
            agentsd.tune(unet, [((torch.zeros(2, 3, 16, 16), torch.tensor([5, 5])), {})], 0.3)
        assert tree(unet) == before

    def test_a_patch_on_it_comes_back(self, unet, every_gain_counts):
        before, out = tree(unet), run(unet, inputs())
        with agentsd.patched(unet):
            patch = agentsd.get_patch(unet)
            tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
            assert agentsd.get_patch(unet) is patch
            assert patch.active
        assert tuning.choices == agentsd.tune(unet, CALLS, 0.3, methods=TRY).choices
        assert tree(unet) == before
        assert torch.equal(run(unet, inputs()), out)

    def test_a_method_that_fails_is_not_chosen(self, unet, every_gain_counts, monkeypatch):
        from agentsd.methods import method_named

        def fail(attention):
            raise RuntimeError("no memory")

        monkeypatch.setattr(method_named("pool"), "attend", fail)
        tuning = agentsd.tune(unet, CALLS, 0.9, methods=TRY[::-1])
        assert "b" in set("".join(tuning.choices)) <= {"b", "."}, "the others are tried"


def test_the_peak_of_memory_is_that_of_the_calls_that_are_timed(unet, tuning, every_gain_counts, monkeypatch):
    assert (tuning.peak_full, tuning.plan.peak) == (None, None), "a CPU does not tell"
    assert "memory" not in str(tuning)
    configs = []

    def call(self, number, text, config=None, original=replay.Replay.call):
        configs.append(config)
        return original(self, number, text, config)

    monkeypatch.setattr(replay.Replay, "call", call)
    monkeypatch.setattr(torch.cpu, "reset_peak_memory_stats", lambda device: None, raising=False)
    held = lambda device: (200 if configs[-1] else 300) * 2**20  # noqa: E731
    monkeypatch.setattr(torch.cpu, "max_memory_allocated", held, raising=False)
    tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
    assert (tuning.peak_full, tuning.plan.peak) == (300 * 2**20, 200 * 2**20)
    assert "peak memory 300 → 200\u00a0MiB" in str(tuning)
    assert agentsd.Tuning.from_dict(tuning.to_dict()) == tuning
    assert tuning.at(0.005).plan.peak is None, "that plan was not run"


class TestTime:
    @pytest.mark.parametrize(
        ("seconds", "told"),
        [
            ([0.7, 0.8, 0.72, 0.81, 0.69, 0.8], True),  # few rounds are enough for a clear gain
            ([0.9, 3.0, 0.9, 0.91, 0.9, 0.91, *[0.9] * 6], True),  # more tell what a few cannot
            ([0.5, 2.0, 0.9, 1.2, 0.7, 1.1] * 3, False),  # noise is no gain
        ],
    )
    def test_calls_without_and_with_are_timed_until_one_can_tell(self, unet, seconds, told):
        """By a clock that tells the seconds with, those without being 1."""
        played, rounds = replay.Replay(unet, CALLS), iter(seconds)
        played.call = lambda number, text, config: (None, 1.0 if config is None else next(rounds))
        ratio = replay.timed_in_turn(played, {0: agentsd.AgentConfig(), 2: agentsd.AgentConfig()}, "")
        assert (ratio.high < 1) == told
        assert ratio.low <= ratio.ratio <= ratio.high

    @pytest.mark.parametrize(("seconds", "said"), [(1.2, ""), (None, "it cannot be told whether the plan is faster")])
    def test_a_plan_that_is_not_told_to_be_faster_is_not_used(
        self, unet, every_gain_counts, monkeypatch, seconds, said
    ):
        times = itertools.cycle([seconds] if seconds else [0.5, 2.0, 2.0, 0.5])

        def call(self, number, text, config=None, original=replay.Replay.call):
            return original(self, number, text, config)[0], 1.0 if config is None else next(times)

        monkeypatch.setattr(replay.Replay, "call", call)
        tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
        assert not tuning.acts
        gain = f"{'could not tell whether anything' if said else 'nothing'} is faster within 30%"
        assert (tuning.measured, tuning.speed_up, tuning.plan.gain, tuning.at(0.3).plan.gain) == (0, 1, gain, gain)
        assert tuning.frontier == (tuning.plan,)
        assert said in str(tuning)
        assert bool(tuning.notes) == bool(said)
        assert deviation(unet, tuning, CALLS[0]) == 0

    @pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.5])
    def test_the_frontier_rises_and_says_measured_of_what_was(self, unet, every_gain_counts, tolerance):
        tuning = agentsd.tune(unet, CALLS, tolerance, methods=TRY)
        times = [plan.time for plan in tuning.frontier]
        assert times == sorted(times, reverse=True)
        assert len(set(times)) == len(times)
        assert tuning.plan in tuning.frontier
        assert [plan for plan in tuning.frontier if plan.timed] == [tuning.plan] * tuning.acts
        if tuning.acts:
            assert tuning.plan.gain == "1.25× measured"


def test_what_it_cannot_see_is_told(unet, every_gain_counts):
    """A cache that was at work while the picture was made, noise, and blocks that are skipped in some calls."""
    with agentsd.record_calls(unet) as calls, torch.no_grad():
        for args, kwargs in CALLS:
            unet(*args, **kwargs)
    assert agentsd.tune(unet, calls, 0.1, methods=TRY).acts
    calls[1].output *= 2
    assert "differs by" in agentsd.tune(unet, calls, 0.1, methods=TRY).notes[0]
    noisy = unet.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
    tuning = agentsd.tune(unet, CALLS, 0.1, methods=TRY)
    noisy.remove()
    assert not tuning.acts
    assert "not tuned within 10%: the same model call differs by" in str(tuning)
    block, count = find_sites(unet)[0].block, itertools.count()
    forward = block.forward
    block.forward = lambda x, **kw: x if next(count) % 2 else forward(x, **kw)
    tuning = agentsd.tune(unet, CALLS, 0.3, methods=TRY)
    del block.forward
    assert any("blocks did not run in every recorded call" in note for note in tuning.notes)


def test_the_plan_never_depends_on_the_batch(unet, tuning):
    def answers(rows: slice) -> list:
        seen = []
        with agentsd.patched(unet, tuning=tuning):
            patch = agentsd.get_patch(unet)
            patch.observer = lambda answer: seen.append((answer.name, answer.size, answer.plan, answer.call.timestep))
            for t in (900, 500, 100):
                run(unet, [tensor[rows] for tensor in inputs(4, t=[t] * 4)])
        assert not patch.notes
        return seen

    alone = answers(slice(0, 1))
    assert {plan.action for _, _, plan, _ in alone} == {"corrected", "pool"}
    assert answers(slice(1, 2)) == answers(slice(0, 2)) == answers(slice(0, 4)) == alone


def test_progress_counts_up_to_its_total(unet, every_gain_counts):
    seen = []
    agentsd.tune(unet, CALLS, 0.3, methods=TRY, progress=lambda *given: seen.append(given))
    done, total, text = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(total) == {total[0]}
    assert done[0] == 0
    assert done[-1] <= total[0]
    assert all(text)


class TestOtherModels:
    @staticmethod
    def changed(unet, weight):
        other = copy.deepcopy(unet)
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if name.endswith(weight)).mul_(1.01)
        return other

    def test_another_structure_is_refused(self, tuning):
        other = flat_unet()
        before = tree(other)
        with pytest.raises(TuningError, match="another model"):
            agentsd.apply_patch(other, tuning=tuning)
        assert tree(other) == before

    @pytest.mark.parametrize("weight", ["norm1.weight", "time_embed.0.weight"])
    def test_other_weights_are_refused_unless_the_plan_is_text(self, unet, tuning, weight):
        other = self.changed(unet, weight)
        with pytest.raises(TuningError, match="other weights"):
            agentsd.apply_patch(other, tuning=tuning)
        agentsd.apply_patch(other, tuning=agentsd.Tuning.from_text(tuning.text))

    def test_lora_is_the_same_model_and_is_told(self, unet, tuning, caplog):
        agentsd.apply_patch(copy.deepcopy(unet), tuning=tuning)
        assert not caplog.records
        agentsd.apply_patch(self.changed(unet, "attn1.to_q.weight"), tuning=tuning)
        assert "tuned with another LoRA" in caplog.text

    def test_a_path_or_a_text_does_as_well(self, unet, tuning, tmp_path):
        tuning.save(tmp_path / "plan.json")
        for given in (tuning, tmp_path / "plan.json", str(tmp_path / "plan.json"), tuning.text, f"plan: {tuning.text}"):
            with agentsd.patched(unet, tuning=given):
                assert agentsd.get_patch(unet).config == tuning.config_for(unet)
        with pytest.raises(TuningError, match="is no tuning, or is damaged"):
            agentsd.apply_patch(unet, tuning=__file__)
        with pytest.raises(OSError, match="nowhere"):
            agentsd.apply_patch(unet, tuning="nowhere.json")
        with pytest.raises(SettingError, match="tuning must be a Tuning, its text or the path of its file, got 7"):
            agentsd.apply_patch(unet, tuning=7)
        assert agentsd.get_patch(unet) is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    @pytest.mark.parametrize("back", [False, True], ids=["to", "from"])
    def test_another_dtype_is_the_same_model(self, unet, dtype, back):
        one, other = copy.deepcopy(unet), copy.deepcopy(unet).to(dtype)
        different = copy.deepcopy(one)
        for parameter in different.parameters():
            torch.nn.init.normal_(parameter)
        different = different.to(dtype)
        stored, found = (weights_of(other), weights_of(one)) if back else (weights_of(one), weights_of(other))
        assert agree(stored, found)
        assert not agree(stored, weights_of(different))


def explained(unet, tuning, height, width):
    with agentsd.patched(unet, tuning=tuning):
        plans = dict(agentsd.get_patch(unet).explain(height, width, 0.5))
    assert any(plans.values())
    return {name: plan for name, plan in plans.items() if plan is not None}


def test_explain_and_advice_say_what_becomes_of_a_tuning_at_another_size(unet, tuning):
    own = explained(unet, tuning, 16, 16)
    assert all(plan.acts and not plan.note for plan in own.values())
    assert tuning.advice(16, 16) == ""
    for name, plan in explained(unet, tuning, 32, 32).items():
        assert (plan.action, plan.cell) == (own[name].action, own[name].cell)
        assert plan.note.startswith(f"tuned for {own[name].tokens} tokens")
        assert str(plan.tokens) in plan.note
    assert "larger" in tuning.advice(32, 32)
    assert all(plan.note for plan in explained(unet, tuning, 8, 32).values())
    assert "another shape" in tuning.advice(8, 32)
    for plan in explained(unet, tuning, 8, 8).values():
        assert not plan.acts
        assert re.match(r"\d+ tokens are fewer than the \d+ that were tuned for", plan.reason)
        assert not plan.remedy, "no setting of the user's would change it"
    assert "smaller" in tuning.advice(8, 8)


def test_cells_never_become_coarser(unet, every_gain_counts):
    few = {"method": "corrected", "agent_ratio": 0.75, "max_agents": 64}
    tuning = agentsd.tune(unet, CALLS, 0.9, methods=[few])
    assert any(plan.acts for plan in explained(unet, tuning, 16, 16).values())
    larger = explained(unet, tuning, 32, 32).values()
    assert all(plan.acts or "coarser" in plan.reason for plan in larger)
    assert not all(plan.acts for plan in larger)


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
