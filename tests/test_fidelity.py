"""The fidelity run: a miniature on the embedded model, kept and taken up again, also with sharper attention."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib (requirements/dev.txt)")

from agentsd import AgentConfig
from agentsd.embedded import load
from agentsd.hosts import find_sites
from benchmarks import fidelity

SIZE = (16, 16)


@pytest.fixture(autouse=True)
def two_timesteps(monkeypatch):
    monkeypatch.setattr(fidelity, "TIMESTEPS", (900, 100))


@pytest.fixture(scope="module")
def pipe():
    return load()


@pytest.fixture
def few() -> list[fidelity.Method]:
    return [
        fidelity.Method("unpatched", "unpatched", pictures=True),
        fidelity.Method("pooled", "pooled", AgentConfig(method="pool", sx=4, sy=4, ratio=0.0)),
        fidelity.Method("corrected", "corrected", AgentConfig(method="corrected", ratio=0.0, agent_ratio=0.75)),
    ]


def run(pipe, folder, few, **settings) -> dict[str, dict]:
    settings = {"sizes": [SIZE], "samples": 1, "rounds": 1, "prompts": 0, "clock": None} | settings
    with torch.inference_mode():
        fidelity.run(pipe, folder, few, **settings)
    return {row["method"]: row for row in json.loads((folder / "fidelity.json").read_text())["rows"].values()}


def test_a_run_goes_on_where_it_stopped_and_measures_anew_on_request(tmp_path, pipe, few, monkeypatch):
    measured, really = [], fidelity.deviations
    monkeypatch.setattr(fidelity, "deviations", lambda p, m, c: (measured.append(m.name), really(p, m, c))[1])
    budget = itertools.chain([True, True], itertools.repeat(False))
    run(pipe, tmp_path, few, more=lambda: next(budget))
    assert measured == ["unpatched", "pooled"]
    assert not (tmp_path / "table.md").exists()
    rows = run(pipe, tmp_path, few)
    assert measured == ["unpatched", "pooled", "corrected"]
    assert fidelity.mean(rows["unpatched"]) == 0
    assert 0 < fidelity.mean(rows["corrected"]) < fidelity.mean(rows["pooled"])
    run(pipe, tmp_path, few, again=["pool"])
    assert measured[3:] == ["pooled"]


def test_pictures_are_made_once(tmp_path, pipe, few, monkeypatch):
    sampled, really = [], pipe.sample
    monkeypatch.setattr(fidelity, "STEPS", 1)
    monkeypatch.setattr(
        pipe, "sample", lambda prompts, **kwargs: (sampled.append(prompts), really(prompts, **kwargs))[1]
    )
    few[1] = dataclasses.replace(few[1], pictures=True)
    budget = itertools.chain([True] * 4, itertools.repeat(False))  # two deviations and two pairs of pictures
    run(pipe, tmp_path, few[:2], prompts=3, more=lambda: next(budget))
    assert len(sampled) == 2
    rows = run(pipe, tmp_path, few[:2], prompts=3)
    assert len(sampled) == 4
    assert rows["unpatched"]["picture_deviation"] == 0
    assert rows["pooled"]["picture_deviation"] > 0
    assert rows["pooled"]["pictures"] == 3


def test_without_seconds_the_table_has_no_column_for_them(tmp_path, pipe, few):
    run(pipe, tmp_path, few[:2])
    assert "speed-up" not in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))
    ticks = itertools.count()
    run(pipe, tmp_path, few[:2], clock=lambda: next(ticks))
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| pooled | 1.000 | 1.00× |" in table
    assert (tmp_path / "frontier-16x16.png").exists()


def test_sharper_queries_move_the_model_and_are_taken_back(pipe):
    weights = [site.block.attn1.to_q.weight.detach().clone() for site in find_sites(pipe.unet)]
    with torch.inference_mode():
        before = fidelity.cases(pipe, SIZE, 1)[0]
        with fidelity.sharpened(pipe.unet, 4):
            sharp = fidelity.cases(pipe, SIZE, 1)[0]
    assert torch.equal(before.x, sharp.x)
    assert (sharp.unpatched - before.unpatched).norm() > 0.01 * before.unpatched.norm()
    for site, weight in zip(find_sites(pipe.unet), weights, strict=True):
        assert torch.equal(site.block.attn1.to_q.weight, weight)


def test_all_methods_have_names_of_their_own_and_pass_the_planner():
    found = fidelity.methods()
    assert len({method.name for method in found}) == len(found)
    assert found[0].name == "unpatched"


def test_todo_attends_to_the_first_token_of_each_cell_and_leaves_no_trace(pipe):
    first, every = (fidelity.Method("ToDo", "ToDo", todo=s) for s in (2, 1))
    with torch.inference_mode():
        noised = fidelity.cases(pipe, SIZE, 1)
        assert max(fidelity.deviations(pipe, every, noised))[0] < 1e-5
        assert min(fidelity.deviations(pipe, first, noised))[0] > 1e-4
        assert max(fidelity.deviations(pipe, fidelity.methods()[0], noised)) == [0]


def test_a_name_selects_its_method_and_a_part_of_a_name_all_that_contain_it():
    every = fidelity.methods()
    names = [method.name for method in fidelity.named(every, ["grid 4×4", "tomesd"])]
    assert names == ["unpatched", "tomesd .3", "tomesd .5", "grid 4×4"]
