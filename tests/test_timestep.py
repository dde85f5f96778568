"""The timestep is read only where something depends on it: reading it waits for the device."""

import pytest
from blocks import run
from kinds import CORRECTED, GRID, MERGING, POOL, SIMILARITY
from patching import at

import agentsd
from agentsd import Rule, get_patch, paper_stages, patched

NEVER = {
    "grid agents": GRID,
    "a method that merges nothing, whatever the ratio": {**POOL, "ratio": 0.4},
    "corrected agents": CORRECTED,
    "the first token of each cell": {**SIMILARITY, "use_rand": False},
    "rules by block": {**GRID, "rules": (Rule(POOL, blocks="middle_block.*"), Rule(None, downsample=2))},
    "random clusters where no layer is reached": {**SIMILARITY, "min_tokens": 10**6},
}
ONCE = {
    "random clusters in many layers": {**MERGING, "max_downsample": 2, "merge_mlp": True},
    "grid agents among merged tokens": {**GRID, "ratio": 0.3},
    "stages and random clusters": {"stages": paper_stages()},
    "a rule for a part of the diffusion that names no block": {**GRID, "rules": (Rule(POOL, until=0.5, blocks="x"),)},
}


@pytest.fixture
def read(monkeypatch):
    """What was read, call by call."""
    seen = []

    def spy(t):
        seen.append(agentsd.hosts.read_timestep(t))
        return seen[-1]

    monkeypatch.setattr("agentsd.patching.call.read_timestep", spy)
    return seen


@pytest.mark.parametrize("name", [*NEVER, *ONCE])
def test_never_or_once_a_call_of_the_u_net(unet, read, name):
    with patched(unet, **(NEVER | ONCE)[name]):
        run(unet, at(900))
        run(unet, at(100))
    assert read == ([900, 100] if name in ONCE else [])


def test_an_observer_is_told_of_it(unet, read):
    with patched(unet, **GRID):
        answers = []
        get_patch(unet).observer = answers.append
        run(unet, at(900))
    assert {answer.call.timestep for answer in answers} == {900}
    assert read == [900]
