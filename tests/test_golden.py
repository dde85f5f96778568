"""The algorithm is the reference's: its own outputs, and an independent oracle at other sizes and settings."""

import json
from pathlib import Path

import oracle
import pytest
import torch
from blocks import inputs, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kinds import DRAWN
from patching import FLAT, difference, patched_output
from patching import GOLDEN as UNET

import agentsd

safetensors = pytest.importorskip("safetensors", reason="needs safetensors to read the golden outputs")

GOLDEN = Path(__file__).parent / "golden" / "agentsd_golden.safetensors"
CLOSE = {"rtol": 0, "atol": 1e-4}
with safetensors.safe_open(GOLDEN, "pt") as file:
    CASES = {name: json.loads(case) for name, case in sorted(file.metadata().items())}
    STORED = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def oracle_output(unet, example, **kw):
    with oracle.answering(unet, oracle.Oracle(**kw), tuple(example[0].shape[2:])):
        return run(unet, example)


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_reference(name):
    case, plain, expected = CASES[name], STORED[f"{name}.base"], STORED[f"{name}.out"]
    example = inputs(case["B"], case["h"], case["w"], case["seed"], t=[500, 20, 981][: case["B"]])
    torch.testing.assert_close(run(UNET, example), plain, **CLOSE)
    torch.testing.assert_close(patched_output(UNET, example, use_rand=False, **case["kw"]), expected, **CLOSE)
    torch.testing.assert_close(oracle_output(UNET, example, **case["kw"]), expected, **CLOSE)
    assert difference(plain, expected) > 0.1


@pytest.mark.parametrize(
    "kw",
    [
        {"max_downsample": 2, "sx": 2, "sy": 4, "ratio": 0.1, "agent_ratio": 0.9, "attn_precision": "fp32"},
        {"max_downsample": 2, "sx": 2, "sy": 2, "agent_ratio": 0.5, "merge_crossattn": True, "merge_mlp": True},
    ],
)
def test_agrees_with_the_oracle_at_two_levels(kw):
    example = inputs(1, 16, 20, seed=7)
    out = patched_output(UNET, example, use_rand=False, **kw)
    expected = oracle_output(UNET, example, **{k: v for k, v in kw.items() if k != "attn_precision"})
    torch.testing.assert_close(out, expected, **CLOSE)
    assert difference(out, run(UNET, example)) > 1e-2


SIDES = dict.fromkeys(("h", "w"), st.integers(1, 13)) | dict.fromkeys(("sx", "sy"), st.integers(1, 5))


@settings(max_examples=40)
@given(B=st.integers(1, 3), seed=st.integers(0, 1000), **SIDES, **DRAWN)
def test_agrees_with_the_oracle_at_any_size_and_setting(B, h, w, seed, **kw):
    assume(h * w > 1)  # GroupNorm of the unpatched U-Net needs two values
    example = inputs(B, h, w, seed)
    out = patched_output(FLAT, example, use_rand=False, **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, **kw), **CLOSE)


@pytest.mark.parametrize(("h", "w", "agent_ratio", "s"), [(15, 13, 0.95, 4), (9, 12, 0.75, 2), (17, 5, 0.99, 8)])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_grid_agents_agree_with_the_oracle(h, w, agent_ratio, s, ratio):
    example = inputs(2, h, w)
    kw = {"ratio": ratio, "agent_ratio": agent_ratio}
    out = patched_output(FLAT, example, use_rand=False, agent_source="grid", **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, grid=s, **kw), **CLOSE)
    assert difference(out, run(FLAT, example)) > 1e-2


def test_random_partition_agrees_with_the_oracle():
    example = inputs(2, 14, 11)
    seed = agentsd.attention.merging.partition_seed(5, 500.0, 14, 11, 3, 2)

    def drawn(height, width):
        return agentsd.attention.merging.partition(height, width, 3, 2, seed).dst.tolist()

    kw = {"sx": 3, "sy": 2, "ratio": 0.3, "agent_ratio": 0.8}
    out = patched_output(FLAT, example, seed=5, **kw)
    torch.testing.assert_close(out, oracle_output(FLAT, example, destinations=drawn, **kw), **CLOSE)
    assert difference(out, patched_output(FLAT, example, use_rand=False, **kw)) > 1e-2
