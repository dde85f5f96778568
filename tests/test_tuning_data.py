"""A tuning as data: text, files, the frontier, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

import agentsd
from agentsd import Rule, Tuning, TuningError
from agentsd.schedule import Block
from agentsd.tuning.result import Deviation, TunedPlan

PLAN = TunedPlan(0.02, ("a.b", "aab"), (Deviation(0.1, 0.01, 0.012), Deviation(0.5, 0.02, 0.018)), time=0.5, timed=True)
TUNING = Tuning(
    size=(64, 48),
    candidates=({"method": "corrected", "agent_ratio": 0.98}, {"method": "pool", "sx": 2, "sy": 2}),
    since=(0.0, 0.3),
    plan=PLAN,
    structure="12345678",
    weights="abcdef",
    blocks=(Block("down.0", 1), Block("down.1", 2), Block("up.0", 1)),
    frontier=(TunedPlan(0.01, ("a..", "a.."), (Deviation(0.1, 0.008), Deviation(0.5, 0.002)), 0.75), PLAN),
    seconds_full=2.0,
    covers=(0.2, 1.0),
    conditions={"lora": "detail 0.8"},
    versions={"agentsd": "1"},
)


def with_choices(*choices):
    return replace(TUNING, plan=replace(PLAN, choices=choices))


def test_text_comes_back_as_the_same_plan():
    back = Tuning.from_text(TUNING.text)
    assert back.text == TUNING.text == Tuning.from_text(f"plan: {TUNING.text}\n").text, "also as reports show it"
    assert not set(TUNING.text) & set(",:;\"'\n"), "it fits into an infotext"
    assert str(back)
    assert (back.choices, back.since, back.size, back.tolerance) == (TUNING.choices, (0.0, 0.3), (64, 48), 0.02)
    assert [dict(c) for c in back.candidates] == [dict(c) for c in TUNING.candidates]


def test_text_leaves_out_what_no_block_uses_and_writes_parts_that_do_the_same_once():
    part = with_choices("b.b", "b.b")
    back = Tuning.from_text(part.text)
    assert [c["method"] for c in back.candidates] == ["pool"]
    assert (back.since, back.choices) == ((0.0,), ("a.a",))
    assert Tuning.from_text(with_choices("...", "...").text).choices == ("...",)


def test_rules_are_those_of_the_choices():
    config = agentsd.AgentConfig(rules=TUNING.rules(TUNING.blocks), max_downsample=8)

    def at(name, level, progress):
        found = config.at(progress, agentsd.config.Block(name, level))
        return None if found is None else found.method

    assert [at("down.0", 1, p) for p in (0.0, 0.29, 0.3, 1.0)] == ["corrected"] * 4
    assert [at("down.1", 2, p) for p in (0.0, 0.29, 0.3, 1.0)] == [None, None, "corrected", "corrected"]
    assert [at("up.0", 1, p) for p in (0.0, 1.0)] == ["pool"] * 2
    assert TUNING.rules(TUNING.blocks)[0] == Rule(None)
    # as many tokens as were measured
    assert {rule.settings["min_tokens"] for rule in TUNING.rules(TUNING.blocks)[1:]} == {64 * 48, 32 * 24}


def test_a_file_comes_back(tmp_path):
    TUNING.save(tmp_path / "t.json")
    assert Tuning.load(tmp_path / "t.json") == TUNING
    assert Tuning.from_dict(json.loads(json.dumps(TUNING.to_dict()))) == TUNING


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("a.b", "b.b"),
        lambda text: "{}",
        lambda text: "[1]",
        lambda text: text.replace("agentsd tuning", "something"),
        lambda text: text.replace('"version": 1', '"version": 99'),
    ],
)
def test_a_damaged_file_is_an_error_that_says_so(tmp_path, damage):
    path = tmp_path / "t.json"
    TUNING.save(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(TuningError, match=r"damaged|version 99"):
        Tuning.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("tuning 1", "tuning 2"),
        lambda text: text.replace("a.b", "a.c"),
        lambda text: text.replace("a.b", "a."),
        lambda text: text.replace("0.3 aab", "0.0 aab"),
        lambda text: text.replace("sx=2", "sx=99"),
        lambda text: text.split("|")[0],
        *(lambda text, forged=forged: text.replace(" 0.02 ", f" {forged} ") for forged in ("nan", "x", "-1", "inf")),
        lambda text: "nonsense",
        lambda text: "",
    ],
)
def test_damaged_text_is_an_error_that_says_so(damage):
    with pytest.raises(TuningError, match=r"damaged|version"):
        Tuning.from_text(damage(TUNING.text))


NAN, INF = float("nan"), float("inf")
FORGED = {
    "plan": [None, *({**asdict(PLAN), "tolerance": value} for value in ("x", NAN, 2.0))]
    + [{**asdict(PLAN), **forged} for forged in ({"time": INF}, {"time": "fast"}, {"choices": [1, 2]})],
    "frontier": [[{**asdict(PLAN), "deviations": [{"progress": NAN, "predicted": 0.1}]}]],
    "seconds_full": [NAN],
    "since": [[0.0, NAN], [0.0, "later"]],
    "size": [[64.5, 48], [0, 48]],
    "covers": [[0.2, "end"]],
    "candidates": [[{"method": "none"}, {"sx": 2}]],
    "weights": [7],
    "notes": [[7]],
    "unknown": [1],
}


@pytest.mark.parametrize("forged", [{name: value} for name, values in FORGED.items() for value in values], ids=str)
def test_a_forged_tuning_is_refused(forged):
    with pytest.raises(TuningError, match="damaged"):
        Tuning.from_dict({**TUNING.to_dict(), **forged})


@pytest.mark.parametrize(
    ("tolerance", "choices", "gain", "reached"),
    [
        (0.02, PLAN.choices, "2.00× measured", "1.8% measured"),
        (0.5, PLAN.choices, "2.00× measured", "1.8% measured"),
        (0.01, ("a..", "a.."), "1.33× expected", "0.8% expected"),
        (0.001, ("...", "..."), "nothing is faster within 0.1%", ""),
    ],
)
def test_another_tolerance_takes_its_plan_from_the_frontier_and_tells_it(tolerance, choices, gain, reached):
    tuning = TUNING.at(tolerance)
    assert tuning.choices == choices
    assert (tuning.plan.gain, tuning.plan.reached) == (gain, reached)
    assert gain in str(tuning)
    assert Tuning.from_text(tuning.text).plan.gain in (gain, "")
    assert tuning.seconds == pytest.approx(2.0 * tuning.plan.time)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"conditions": {"lora": "detail 0.8"}, "start": 0.2}, ""),
        ({"start": 0.15}, ""),
        ({"conditions": {"lora": ""}}, "tuned with lora detail 0.8 and not none"),
        ({"conditions": {"lora": "detail 1"}}, "tuned with lora detail 0.8 and not detail 1"),
        ({"start": 0.0}, "tuned from 0.2 of the diffusion on"),
    ],
)
def test_it_knows_what_it_holds_for(given, said):
    told = TUNING.doubts(**{"start": 0.2, **given})
    assert said in told
    assert bool(said) == bool(told)


def test_the_table_says_what_was_asked_and_reached():
    text = str(TUNING)
    assert text.startswith("tuned to 2% at a latent of 48×64: deviation 1.8% measured, 2.00× measured, 2 → 1 s a model")
    assert "1 corrected agent_ratio=0.98" in text
    assert "0% – 30%" in text


def test_a_tuning_loads_no_torch():
    from test_imports import in_a_process_of_its_own

    in_a_process_of_its_own("import sys, agentsd; agentsd.Tuning; assert 'torch' not in sys.modules")
