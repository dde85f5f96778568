"""The cost model against torch's own counter, on U-Nets of diffusers and LDM."""

from collections import Counter

import pytest
import torch
from blocks import stable_diffusion_unet
from patching import answer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd import AgentConfig, Rule, Stage
from agentsd.costs import estimate, layouts
from agentsd.hosts.layout import layout_of

diffusers = pytest.importorskip("diffusers", reason="the U-Nets to count are diffusers'")

from agentsd.cli.models import UNETS  # noqa: E402

KNOWN = {"SD 1": (768, 16), "SD 2": (1024, 16), "SDXL": (2048, 70)}
FULL = {name: {"cross_attention_dim": kind[0], **UNETS[kind]} for name, kind in KNOWN.items()}
SMALL = {"cross_attention_dim": 24, "block_out_channels": (32, 32, 64, 64), "attention_head_dim": 2}


def unet(device: str, **config):
    with torch.device(device):
        return diffusers.UNet2DConditionModel(**config).eval()


def counted(model, height: int, width: int) -> int:
    """FLOPs of one forward pass of one row, by torch's counter."""
    # the counter knows the products of the math kernel on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer(model, height, width, rows=1)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def small():
    return unet("cpu", **SMALL)


@pytest.mark.parametrize("name", FULL)
def test_the_stored_layouts_are_those_of_the_real_unets(name):
    model = unet("meta", **FULL[name])
    layout, stored = layout_of(model, name), layouts()[name]
    # diffusers' blocks go by other names than LDM's, and its middle comes last
    order = ("down_blocks", "mid_block", "up_blocks")
    in_order = sorted(layout.blocks, key=lambda block: order.index(block.name.split(".")[0]))
    assert [(b.downsample, b.channels) for b in in_order] == [(b.downsample, b.channels) for b in stored.blocks]
    assert (layout.rest, layout.constant) == (stored.rest, stored.constant)
    assert {estimate(known, None, 96, 64).flops for known in (layout, stored)} == {counted(model, 96, 64)}
    if name != "SDXL":
        assert layout_of(stable_diffusion_unet(name == "SD 2"), name) == stored


def test_sdxl_s_stored_names_are_those_of_its_depths():
    depths = Counter(block.name.rsplit(".", 1)[0] for block in layouts()["SDXL"].blocks)
    shallow, deep = "input_blocks.{}.1.transformer_blocks", "output_blocks.{}.1.transformer_blocks"
    assert depths == {
        **{shallow.format(i): depth for i, depth in ((4, 2), (5, 2), (7, 10), (8, 10))},
        "middle_block.1.transformer_blocks": 10,
        **{deep.format(i): depth for i, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2))},
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"agent_source": "grid", "ratio": 0.0, "max_agents": 9},
        {"agent_source": "grid", "max_downsample": "auto"},
        {"merge_crossattn": True, "merge_mlp": True},
        {"merge_attn": False, "merge_mlp": True},
        {"ratio": 0.0, "agent_ratio": 0.0},
        {"max_downsample": 8, "sx": 3, "sy": 2, "agent_ratio": 0.9},
        {"min_tokens": 200, "max_downsample": 4},
        {"method": "pool", "sx": 2, "sy": 2, "merge_mlp": True},
        dict(agentsd.TOKEN_MERGING),
        {"max_downsample": 8, "rules": [Rule({"method": "pool"}, downsample=2), Rule(None, blocks="mid_block.*")]},
    ],
    ids=str,
)
def test_the_patch_costs_what_the_model_says(small, settings):
    expected = estimate(layout_of(small), AgentConfig(**settings), 24, 40)
    with agentsd.patched(small, **settings):
        assert expected.flops_left == counted(small, 24, 40)


MERGED = Rule({"agent_ratio": 0.75, "merge_mlp": True}, blocks="down_blocks.0.*")


@pytest.mark.parametrize("more", [{"max_downsample": 8, "agent_ratio": 0.98}, {"rules": [MERGED]}], ids=str)
def test_a_fit_costs_about_what_the_model_says(small, more):
    """The planner knows no heads, on whose number the fit depends, and the counter counts no factorisation."""
    expected = estimate(layout_of(small), AgentConfig(method="corrected", **more), 32, 32)
    with agentsd.patched(small, method="corrected", **more):
        assert expected.flops_left == pytest.approx(counted(small, 32, 32), rel=0.06)


def test_each_part_of_a_run_has_a_cost_of_its_own():
    layout = layouts()["SD 1"]
    assert estimate(layouts()["SDXL"], None, 128, 128).share == 1
    assert estimate(layouts()["SDXL"], AgentConfig(max_downsample=1), 128, 128).changed == ()
    config = AgentConfig(stages=(Stage(0.6), Stage(1.0, None)))
    inside = estimate(layout, config, 64, 64, 0.3).share
    assert inside == estimate(layout, AgentConfig(), 64, 64).share < 1
    assert estimate(layout, config, 64, 64, 0.7).share == 1
    assert estimate(layout, config, 64, 64).share == 1  # nobody says when
    config = AgentConfig(rules=[Rule(None, since=0.6), Rule({"method": "pool"}, downsample=1, until=0.2)])
    pooled, inside, outside = (estimate(layout, config, 64, 64, progress).share for progress in (0.1, 0.5, 0.7))
    assert pooled != inside < outside == 1


def test_blocks_that_are_alike_but_treated_otherwise_are_told_apart():
    config = AgentConfig(rules=[Rule(None, blocks="output_blocks.*"), Rule({"sx": 2}, blocks="output_blocks.11.*")])
    levels = [level for level in estimate(layouts()["SD 1"], config, 64, 64).levels if level.downsample == 1]
    found = sorted((level.count, level.plan.action) for level in levels)
    assert found == [(1, "agents"), (2, "agents"), (2, "untouched")]
