"""The cost model against torch's own counter, on U-Nets of diffusers, and against the table that JavaScript shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd import AgentConfig, Stage
from agentsd.costs import Layout, estimate, layouts, positions, share_of_run
from agentsd.layout import layout_of

diffusers = pytest.importorskip("diffusers", reason="the U-Nets to count are diffusers'")

CASES = json.loads(Path(__file__).with_name("cases").joinpath("costs.json").read_text(encoding="utf-8"))
FULL = {
    "SD 1": {"cross_attention_dim": 768},
    "SD 2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "SDXL": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SMALL = {"cross_attention_dim": 24, "block_out_channels": (32, 32, 64, 64), "attention_head_dim": 2}


def unet(device: str, **config):
    with torch.device(device):
        return diffusers.UNet2DConditionModel(**config).eval()


def counted(model, height: int, width: int) -> int:
    """FLOPs of one forward pass of one row, by torch's counter."""
    config, device = model.config, model.device
    added = None
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.zeros(1, 1280, device=device), "time_ids": torch.zeros(1, 6, device=device)}
    x = torch.zeros(1, 4, height, width, device=device)
    prompt = torch.zeros(1, 77, config.cross_attention_dim, device=device)
    # the counter knows the products of the math kernel on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.zeros(1, device=device), prompt, added_cond_kwargs=added)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def small():
    return unet("cpu", **SMALL)


@pytest.mark.parametrize("name", FULL)
def test_the_stored_layouts_are_those_of_the_real_unets(name):
    model = unet("meta", **FULL[name])
    layout = layout_of(model, name)
    assert layout == layouts()[name]
    for height, width in ((64, 64), (96, 64), (128, 128)):
        assert estimate(layout, None, height, width).flops == counted(model, height, width)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"agent_source": "grid", "ratio": 0.0},
        {"agent_source": "grid", "ratio": 0.0, "max_agents": 9},
        {"agent_source": "grid", "max_downsample": 4},
        {"ratio": 0.0},
        {"merge_crossattn": True, "merge_mlp": True},
        {"merge_attn": False, "merge_mlp": True},
        {"ratio": 0.0, "agent_ratio": 0.0},
        {"max_downsample": 8, "sx": 3, "sy": 2, "agent_ratio": 0.9},
        {"min_tokens": 200, "max_downsample": 4},
        {"method": "pool", "sx": 2, "sy": 2},
        {"method": "pool", "sx": 2, "sy": 2, "merge_mlp": True},
        {"method": "corrected"},
        {"method": "corrected", "agent_ratio": 0.98, "max_downsample": 8},
        dict(agentsd.TOKEN_MERGING),
    ],
    ids=str,
)
def test_the_patch_costs_what_the_model_says(small, settings):
    layout = layout_of(small)
    config = AgentConfig(**settings)
    for height, width in ((32, 32), (24, 40)):
        expected = estimate(layout, config, height, width)
        assert expected.flops == counted(small, height, width)
        with agentsd.patched(small, **settings):
            assert expected.flops_left == counted(small, height, width)


def test_a_patched_layer_of_the_full_unet_costs_what_the_model_says():
    settings = {"agent_source": "grid", "ratio": 0.0, "agent_ratio": 0.9375, "use_rand": False}
    model = unet("meta", **FULL["SD 1"])
    expected = estimate(layouts()["SD 1"], AgentConfig(**settings), 64, 64)
    assert (expected.layers, expected.acted[0].plan.agents) == (5, 256)
    with agentsd.patched(model, **settings):
        assert counted(model, 64, 64) == expected.flops_left


def test_odd_sizes_are_rounded_up_at_every_level():
    assert positions(65, 41, 1) == 65 * 41
    assert positions(65, 41, 2) == 33 * 21
    assert positions(65, 41, 4) == 17 * 11


def test_nothing_happens_without_a_config_or_where_no_layer_is_reached():
    assert estimate(layouts()["SDXL"], None, 128, 128).share == 1
    assert estimate(layouts()["SDXL"], AgentConfig(max_downsample=1), 128, 128).layers == 0


def test_a_run_is_the_average_of_its_stages_from_where_it_starts():
    layout = layouts()["SD 1"]
    config = AgentConfig(stages=(Stage(0.6), Stage(1.0, None)))
    inside = estimate(layout, config, 64, 64).share
    assert inside < 1
    assert share_of_run(layout, config, 64, 64) == pytest.approx(0.6 * inside + 0.4)
    assert share_of_run(layout, config, 64, 64, start=0.5) == pytest.approx(0.2 * inside + 0.8)
    assert share_of_run(layout, config, 64, 64, start=0.7) == 1
    assert share_of_run(layout, config, 64, 64, start=1.0) == 1


def answer(case: dict) -> dict:
    """What the table of cases records of a case."""
    given = dict(case["config"])
    stages = tuple(Stage(stage["until"], stage["settings"]) for stage in given.pop("stages", []))
    config = AgentConfig(**given, stages=stages)
    layout = Layout.from_dict(case["layout"]) if isinstance(case["layout"], dict) else layouts()[case["layout"]]
    found = estimate(layout, config, case["height"], case["width"])
    levels = [
        {
            "action": level.plan.action,
            "tokens": level.plan.tokens,
            "queries": level.plan.queries,
            "agents": level.plan.agents,
            "cell": None if level.plan.cell is None else list(level.plan.cell),
            "r": level.plan.r,
            "agent_r": level.plan.agent_r,
            "reason": level.plan.reason,
            "flops": level.flops,
            "flops_left": level.flops_left,
        }
        for level in found.levels
    ]
    run = share_of_run(layout, config, case["height"], case["width"], case.get("start", 0.0))
    return {"levels": levels, "flops": found.flops, "flops_left": found.flops_left, "layers": found.layers, "run": run}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_table_of_cases(case):
    assert answer(case) == case["expected"]


def test_the_cost_model_imports_no_torch():
    code = "import sys; sys.modules['torch'] = None; import importlib.util as u\n"
    code += "import types; p = types.ModuleType('agentsd'); p.__path__ = [sys.argv[1]]; sys.modules['agentsd'] = p\n"
    code += "from agentsd.costs import layouts; assert set(layouts()) == {'SD 1', 'SD 2', 'SDXL'}"
    folder = os.path.dirname(agentsd.__file__)
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)
