"""The fidelity run: a miniature on the embedded model, kept and taken up again, also with sharper attention."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch

from agentsd import AgentConfig
from agentsd.embedded import load
from agentsd.hosts import find_sites
from benchmarks import fidelity
from benchmarks.methods import patched, todo
from benchmarks.results import Rows

SIDE = 16


@pytest.fixture(autouse=True)
def two_timesteps(monkeypatch):
    monkeypatch.setattr(fidelity, "TIMESTEPS", (900, 100))


@pytest.fixture(scope="module")
def pipe():
    return load()


FEW = {
    "unpatched": nullcontext,
    "pooled": patched(AgentConfig(method="pool", sx=2, sy=2, ratio=0, k_shortcut=0)),
    "corrected": patched(AgentConfig(method="corrected", ratio=0, agent_ratio=0.75)),
}


def run(pipe, file, methods=FEW, **more):
    rows = Rows(file, fidelity.HEAD)
    fidelity.run(pipe, rows, methods, **{"factors": (1.0,), "side": SIDE, "samples": 2, **more})
    return {(row["method"], row["queries"]): row for row in Rows(file, fidelity.HEAD).rows}


def test_a_run_goes_on_where_it_ended_and_measures_anew_what_is_dropped(tmp_path, pipe, monkeypatch):
    measured, really, file = [], fidelity.deviations, tmp_path / "a.csv"
    monkeypatch.setattr(fidelity, "deviations", lambda p, m, c: (measured.append(m), really(p, m, c))[1])
    budget = itertools.chain([True] * 3, itertools.repeat(False))
    run(pipe, file, more=lambda: next(budget))
    assert measured == [FEW["unpatched"], FEW["pooled"]]
    rows = run(pipe, file)
    assert measured == list(FEW.values())
    assert float(rows["unpatched", "1"]["mean"]) == 0
    assert 0 < float(rows["corrected", "1"]["mean"]) < float(rows["pooled", "1"]["mean"])
    Rows(file, fidelity.HEAD).drop(lambda name: "pool" in name)
    assert run(pipe, file) == rows
    assert measured[3:] == [FEW["pooled"]]


def test_sharper_attention_reaches_the_table_and_is_taken_back(tmp_path, pipe):
    weights = [site.block.attn1.to_q.weight.detach().clone() for site in find_sites(pipe.unet)]
    rows = run(pipe, tmp_path / "a.csv", {name: FEW[name] for name in ("unpatched", "pooled")}, factors=(1.0, 4.0))
    assert float(rows["pooled", "4"]["mean"]) != float(rows["pooled", "1"]["mean"])
    head, _, plain, pooled = fidelity.summary([*rows.values()]).splitlines()
    assert head == "| method | queries × 1 | queries × 4 |"
    assert plain == "| unpatched | 0.0000 (0.0000) | 0.0000 (0.0000) |"
    assert len(pooled.split(" | ")) == 3
    for site, weight in zip(find_sites(pipe.unet), weights, strict=True):
        assert torch.equal(site.block.attn1.to_q.weight, weight)


def test_todo_attends_to_the_first_token_of_each_cell_and_leaves_no_trace(pipe):
    with torch.inference_mode():
        noised = fidelity.cases(pipe, SIDE, 1)
        every, first, plain = (max(fidelity.deviations(pipe, m, noised)) for m in (todo(1), todo(2), nullcontext))
    assert every < 1e-5 < 1e-4 < first
    assert plain == 0
