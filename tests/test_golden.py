"""The algorithm is the reference's: its own outputs, and an independent oracle at other sizes and settings."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from blocks import actions, inputs, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from patching import FLAT, patched_output
from patching import GOLDEN as UNET

import agentsd

safetensors = pytest.importorskip("safetensors", reason="needs safetensors to read the golden outputs")

GOLDEN = Path(__file__).parent / "golden" / "agentsd_golden.safetensors"
CLOSE = {"rtol": 0, "atol": 1e-4}


def golden_cases() -> dict[str, dict]:
    with safetensors.safe_open(GOLDEN, "pt") as file:
        return {name: json.loads(case) for name, case in sorted(file.metadata().items())}


def stored(name: str) -> torch.Tensor:
    with safetensors.safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(name)


def golden_inputs(case: dict):
    return inputs(case["B"], case["h"], case["w"], case["seed"], t=[500, 20, 981][: case["B"]])


def oracle_output(unet, given_inputs, **kw) -> torch.Tensor:
    with oracle.answering(unet, oracle.Oracle(**kw), tuple(given_inputs[0].shape[2:])):
        return run(unet, given_inputs)


@pytest.mark.parametrize("name", golden_cases())
class TestGoldenCases:
    def test_unpatched_output(self, name):
        torch.testing.assert_close(run(UNET, golden_inputs(golden_cases()[name])), stored(f"{name}.base"), **CLOSE)

    def test_patched_output(self, name):
        case = golden_cases()[name]
        out = patched_output(UNET, golden_inputs(case), use_rand=False, **case["kw"])
        torch.testing.assert_close(out, stored(f"{name}.out"), **CLOSE)
        assert (out - stored(f"{name}.base")).abs().max() > 0.1

    def test_oracle_output(self, name):
        case = golden_cases()[name]
        out = oracle_output(UNET, golden_inputs(case), **case["kw"])
        torch.testing.assert_close(out, stored(f"{name}.out"), **CLOSE)


CASES = {
    "agents": (2, 16, 16, {}),
    "agents at level 1 too": (1, 16, 20, {"max_downsample": 2, "sx": 2, "sy": 4, "ratio": 0.1, "agent_ratio": 0.9}),
    "batch of three": (3, 12, 12, {"ratio": 0.25, "agent_ratio": 0.9}),
    "ragged": (2, 14, 18, {"ratio": 0.3, "sx": 5, "sy": 3}),
    "wide cells": (2, 12, 10, {"sx": 8, "sy": 1, "agent_ratio": 0.99}),
    "all capped": (2, 12, 16, {"sx": 2, "sy": 2, "ratio": 0.99, "agent_ratio": 0.99}),
    "merging everywhere": (
        2,
        16,
        12,
        {"sx": 2, "sy": 2, "agent_ratio": 0.5, "merge_crossattn": True, "merge_mlp": True, "max_downsample": 2},
    ),
    "mlp beside agents": (2, 16, 12, {"ratio": 0.3, "merge_mlp": True}),
    "cross-attention alone": (2, 16, 12, {"merge_attn": False, "merge_crossattn": True}),
    "mlp alone": (2, 16, 12, {"merge_attn": False, "merge_mlp": True}),
    "other constants": (1, 16, 16, {"k_scale2": 1.0, "k_shortcut": 0.5}),
    "fp32": (1, 16, 16, {"attn_precision": "fp32"}),
    # what the reference can't do
    "no merging": (2, 16, 16, {"ratio": 0.0}),
    "agents beside merged cross-attention": (2, 16, 16, {"merge_crossattn": True, "ratio": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name):
    B, h, w, kw = CASES[name]
    example = inputs(B, h, w, seed=7)
    out = patched_output(UNET, example, use_rand=False, **kw)
    expected = oracle_output(UNET, example, **{k: v for k, v in kw.items() if k != "attn_precision"})
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (out - run(UNET, example)).abs().max() > 1e-2


@settings(max_examples=40)
@given(
    B=st.integers(1, 3),
    h=st.integers(1, 13),
    w=st.integers(1, 13),
    seed=st.integers(0, 1000),
    ratio=st.floats(0, 0.99),
    agent_ratio=st.floats(0, 0.99),
    sx=st.integers(1, 5),
    sy=st.integers(1, 5),
    k_scale2=st.floats(0, 2),
    k_shortcut=st.floats(0, 1),
    merge_attn=st.booleans(),
    merge_crossattn=st.booleans(),
    merge_mlp=st.booleans(),
)
def test_agrees_with_the_oracle_at_any_size_and_setting(B, h, w, seed, **kw):
    assume(h * w > 1)  # GroupNorm of the unpatched U-Net needs two values
    example = inputs(B, h, w, seed)
    out = patched_output(FLAT, example, use_rand=False, **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, **kw), **CLOSE)


@pytest.mark.parametrize(
    ("h", "w", "agent_ratio", "s"), [(16, 16, 0.95, 4), (15, 13, 0.95, 4), (9, 12, 0.75, 2), (17, 5, 0.99, 8)]
)
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_grid_agents_agree_with_the_oracle(h, w, agent_ratio, s, ratio):
    example = inputs(2, h, w)
    kw = {"ratio": ratio, "agent_ratio": agent_ratio}
    out = patched_output(FLAT, example, use_rand=False, agent_source="grid", **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, grid=s, **kw), **CLOSE)
    assert (out - run(FLAT, example)).abs().max() > 1e-2


def test_random_partition_agrees_with_the_oracle():
    example = inputs(2, 14, 11)
    seed = agentsd.attention.merging.partition_seed(5, 500.0, 14, 11, 3, 2)

    def drawn(height, width):
        return agentsd.attention.merging.partition(height, width, 3, 2, seed).dst.tolist()

    kw = {"sx": 3, "sy": 2, "ratio": 0.3, "agent_ratio": 0.8}
    out = patched_output(FLAT, example, seed=5, **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, destinations=drawn, **kw), **CLOSE)
    assert (out - patched_output(FLAT, example, use_rand=False, **kw)).abs().max() > 1e-2


def test_agents_are_used_exactly_where_the_reference_uses_them():
    """Strictly 2 · agents < queries: at N = 64 and cells of 4 × 4, 4 agents; 2 · 4 = 8 queries are not enough."""
    example = inputs(1, 8, 8)
    for ratio, action in [(0.86, "agents"), (0.88, "merge")]:  # 9 and 8 queries
        with agentsd.patched(FLAT, use_rand=False, ratio=ratio, agent_ratio=0.99):
            run(FLAT, example)
            assert set(actions(agentsd.get_patch(FLAT))) == {action}
