"""The fidelity run: a miniature on the embedded model, kept and taken up again, also with sharper attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from agentsd import AgentConfig
from agentsd.embedded import load
from agentsd.hosts import find_sites
from benchmarks import fidelity
from benchmarks.methods import patched, todo, unpatched
from benchmarks.results import Rows

SIDE = 16


@pytest.fixture(autouse=True)
def two_timesteps(monkeypatch):
    monkeypatch.setattr(fidelity, "TIMESTEPS", (900, 100))
    monkeypatch.setattr(fidelity, "STEPS", 1)


@pytest.fixture(scope="module")
def pipe():
    return load()


FEW = [
    fidelity.Method("unpatched", unpatched, pictures=True),
    fidelity.Method("pooled", patched(AgentConfig(method="pool", sx=2, sy=2, ratio=0, k_shortcut=0)), pictures=True),
    fidelity.Method("corrected", patched(AgentConfig(method="corrected", ratio=0, agent_ratio=0.75))),
]


def run(pipe, file, methods, **more):
    rows = Rows(file, fidelity.HEAD)
    fidelity.run(pipe, rows, methods, **{"factors": (1.0,), "side": SIDE, "samples": 2, "prompts": 0, **more})
    return {(row["method"], row["queries"]): row for row in Rows(file, fidelity.HEAD).rows}


def test_a_run_goes_on_where_it_ended_and_measures_anew_what_is_dropped(tmp_path, pipe, monkeypatch):
    measured, really, file = [], fidelity.deviations, tmp_path / "a.csv"
    monkeypatch.setattr(fidelity, "deviations", lambda p, m, c: (measured.append(m.name), really(p, m, c))[1])
    budget = itertools.chain([True] * 3, itertools.repeat(False))
    run(pipe, file, FEW, more=lambda: next(budget))
    assert measured == ["unpatched", "pooled"]
    rows = run(pipe, file, FEW)
    assert measured == ["unpatched", "pooled", "corrected"]
    assert float(rows["unpatched", "1"]["mean"]) == 0
    assert 0 < float(rows["corrected", "1"]["mean"]) < float(rows["pooled", "1"]["mean"])
    Rows(file, fidelity.HEAD).drop(lambda name: "pool" in name)
    assert run(pipe, file, FEW) == rows
    assert measured[3:] == ["pooled"]


def test_final_pictures_and_sharper_attention_reach_the_table(tmp_path, pipe):
    rows = run(pipe, tmp_path / "a.csv", FEW[:2], prompts=2, factors=(1.0, 4.0))
    assert float(rows["unpatched", "1"]["picture"]) == 0 < float(rows["pooled", "1"]["picture"])
    assert rows["pooled", "4"]["mean"] != rows["pooled", "1"]["mean"]
    head, _, plain, pooled = fidelity.summary([*rows.values()]).splitlines()
    assert head == "| method | queries × 1 | queries × 4 | picture, × 1 | picture, × 4 |"
    assert plain.startswith("| unpatched | 0.0000 (0.0000) |")
    assert len(pooled.split(" | ")) == 5


def test_sharper_queries_move_the_model_and_are_taken_back(pipe):
    weights = [site.block.attn1.to_q.weight.detach().clone() for site in find_sites(pipe.unet)]
    with torch.inference_mode():
        before = fidelity.cases(pipe, SIDE, 1)[0]
        with fidelity.sharpened(pipe.unet, 4):
            sharp = fidelity.cases(pipe, SIDE, 1)[0]
    assert torch.equal(before.x, sharp.x)
    assert (sharp.unpatched - before.unpatched).norm() > 0.01 * before.unpatched.norm()
    for site, weight in zip(find_sites(pipe.unet), weights, strict=True):
        assert torch.equal(site.block.attn1.to_q.weight, weight)


def test_all_methods_have_names_of_their_own():
    found = [method.name for method in fidelity.methods()]
    assert len(set(found)) == len(found)
    assert found[0] == "unpatched"
    assert set(fidelity.QUICK) <= set(found)


def test_todo_attends_to_the_first_token_of_each_cell_and_leaves_no_trace(pipe):
    first, every = (fidelity.Method("ToDo", todo(s)) for s in (2, 1))
    with torch.inference_mode():
        noised = fidelity.cases(pipe, SIDE, 1)
        assert max(fidelity.deviations(pipe, every, noised))[0] < 1e-5
        assert min(fidelity.deviations(pipe, first, noised))[0] > 1e-4
        assert max(fidelity.deviations(pipe, FEW[0], noised)) == [0]
