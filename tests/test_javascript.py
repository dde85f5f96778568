"""The page's arithmetic, run by node, against the same tables as Python's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import agentsd
from agentsd import AgentConfig
from agentsd.costs import estimate, layouts
from agentsd.webui import settings
from agentsd.webui.readout import page_data

HERE = Path(__file__).parent
NODE = shutil.which("node")
CASES = json.loads(HERE.joinpath("cases", "costs.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def by_node(call: str, cases: list) -> list:
    """What javascript/agent_attention.js answers to each case."""
    asked = json.dumps({"call": call, "cases": cases})
    done = subprocess.run([NODE, HERE / "js" / "run.js"], input=asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def for_node(case: dict) -> dict:
    """A case with everything spelt out that the page gets from the server."""
    defaults = {**dataclasses.asdict(AgentConfig()), "stages": []}
    layout = case["layout"] if isinstance(case["layout"], dict) else layouts()[case["layout"]].to_dict()
    return {**case, "config": {**defaults, **case["config"]}, "layout": layout}


def test_the_table_of_cases():
    answers = by_node("costs", [for_node(case) for case in CASES])
    wrong = [case["name"] for case, answer in zip(CASES, answers, strict=True) if answer != case["expected"]]
    assert not wrong


# What the panel's controls come to: agentsd/webui/settings.py


def page() -> dict:
    return page_data(None)


CONTROLS = [
    {},
    {"enabled": False},
    {"passes": "first"},
    {"passes": "hires"},
    {"until": 1.0},
    {"since": 0.2, "until": 0.7, "after": "token merging"},
    {"since": 0.6, "until": 0.6},
    {"since": 0.8, "hires_until": 0.7},
    {"max_downsample": "4", "max_agents": 100, "min_tokens": 1024, "fp32": True},
    {"agent_source": "similarity", "ratio": 0.4, "sx": 3, "sy": 5, "use_rand": False, "seed": 7},
    {"method": "pool", "merge_attn": False, "merge_mlp": True, "merge_crossattn": True, "after": "token merging"},
]


def by_python(given: dict, hires: bool, first_downsample: int) -> dict | str | None:
    values = settings.check({"enabled": True, **given})
    try:
        config = settings.to_config(values, hires=hires, first_downsample=first_downsample)
    except agentsd.SettingError:
        return "error"
    return None if config is None else json.loads(json.dumps(dataclasses.asdict(config)))


def test_the_controls_mean_the_same_to_both():
    asked, expected = [], []
    for given in CONTROLS:
        for hires in (False, True):
            for name, first in (("SD 1", 1), ("SDXL", 2)):
                values = settings.check({"enabled": True, **given})
                layout = layouts()[name].to_dict()
                asked.append({"values": values, "hires": hires, "layout": layout, "data": page()})
                expected.append(by_python(given, hires, first))
    answers = ["error" if answer and "error" in answer else answer for answer in by_node("config", asked)]
    assert answers == expected
    assert "error" in expected
    assert None in expected


# The sentences


def say(given: dict, *passes: dict, layout: str = "SD 1") -> list[dict]:
    """The panel's summary for these passes; each has a size, and where the diffusion stands when it begins."""
    plain = {"width": 512, "height": 512, "start": 0.0, "hires": False, "obstacle": None}
    passes = [{**plain, "layout": layouts()[layout].to_dict(), **one} for one in passes or ({},)]
    return by_node(
        "summary", [{"values": settings.check({"enabled": True, **given}), "passes": passes, "data": page()}]
    )[0]


def test_what_happens_is_said_with_tokens_agents_layers_and_flops():
    [said] = say({"agent_source": "grid", "ratio": 0.0, "agent_ratio": 0.95, "until": 1.0, "min_tokens": 0})
    share = estimate(layouts()["SD 1"], AgentConfig(agent_source="grid", ratio=0.0, agent_ratio=0.95), 64, 64).share
    left = f"{share:.0%}".replace("%", "\u00a0%")
    assert said["text"] == f"512×512: 4096 tokens → 256 agents in 5 layers; {left} of the U-Net's FLOPs left"
    assert (said["acts"], said["sentence"]) == (True, "")


def test_times_are_told_once_they_are_measured():
    [said] = say({"min_tokens": 0}, {"measured": {"before": 412.4, "after": 330.6}})
    assert said["text"].endswith("; measured: 412 → 331\u00a0ms a U-Net call")


def test_a_hires_pass_has_a_line_of_its_own():
    hires = {"width": 1024, "height": 1536, "start": 0.5, "hires": True}
    first, second = say({"min_tokens": 0}, {}, hires)
    assert first["text"].startswith("512×512: 4096 tokens")
    assert second["text"].startswith("Hires 1024×1536: 24576 tokens → 1536 agents in 5 layers")
    assert [line["text"][:5] for line in say({"passes": "hires", "min_tokens": 0}, {}, hires)] == ["Hires"]


@pytest.mark.parametrize(
    ("given", "where", "layout", "reason", "control"),
    [
        ({"min_tokens": 8192}, {}, "SD 1", "size is too small", "Minimum tokens"),
        ({"agent_ratio": 0.2, "min_tokens": 0}, {}, "SD 1", "4096 agents are too many", "Agent ratio"),
        (
            {"ratio": 0.9, "sx": 1, "agent_source": "similarity", "agent_ratio": 0.9},
            {},
            "SD 1",
            "too many",
            "Cell width",
        ),
        ({"max_downsample": "1"}, {}, "SDXL", "attention starts at level 2", "Layers down to"),
        ({}, {"obstacle": ["HyperTile is on", "Settings → HyperTile"]}, "SD 1", "HyperTile is on", "HyperTile"),
        ({"until": 0.6}, {"start": 0.7}, "SD 1", "70\u00a0% of the diffusion is done", "Until"),
        ({"hires_until": 0.4}, {"start": 0.5, "hires": True}, "SD 1", "agents end at 40\u00a0%", "Until, hires pass"),
        ({"since": 0.7, "until": 0.6}, {}, "SD 1", "begin at 0.7 and end at 0.6", "From"),
        ({"merge_attn": False}, {}, "SD 1", "self-attention is left out", "Merge self-attention"),
        ({"method": "pool", "sx": 1, "sy": 1}, {}, "SD 1", "1 × 1", "Cell width"),
        ({"passes": "hires"}, {}, "SD 1", "only the hires pass is chosen", "Passes"),
    ],
)
def test_where_nothing_happens_the_reason_and_the_control_are_named(given, where, layout, reason, control):
    [said] = say({"min_tokens": 0, **given}, where, layout=layout)
    assert not said["acts"] or said["sentence"].startswith("No agents")
    assert reason.lower() in said["sentence"].lower()
    assert f"“{control}" in said["sentence"] or control in said["sentence"]


def test_what_comes_afterwards_is_told_apart():
    late = {"after": "token merging", "until": 0.6, "min_tokens": 0}
    [said] = say(late, {"start": 0.7})
    assert "2458 merged in 5 layers" in said["text"]
    assert "only what comes afterwards" in said["sentence"]


def test_sizes_of_the_hires_pass_are_the_hosts():
    plain = {"width": 512, "height": 768, "scale": 1.55, "resizeX": 0, "resizeY": 0}
    cases = [plain, {**plain, "resizeX": 1000}, {**plain, "resizeY": 1000}, {**plain, "resizeX": 640, "resizeY": 640}]
    assert by_node("hiresSize", cases) == [[793, 1190], [1000, 1500], [666, 1000], [640, 640]]


def test_options_of_the_host_that_exclude_us():
    def reasons(opts: dict, **where: bool) -> str | None:
        found = by_node("hostObstacle", [{"opts": opts, "hires": False, "img2img": False, **where}])[0]
        return found and found[0]

    assert reasons({}) is None
    assert "HyperTile" in reasons({"hypertile_enable_unet": True})
    assert reasons({"hypertile_enable_unet_secondpass": True}) is None
    assert "HyperTile" in reasons({"hypertile_enable_unet_secondpass": True}, hires=True)
    assert "token merging" in reasons({"token_merging_ratio": 0.5}, img2img=True)
    assert reasons({"token_merging_ratio_hr": 0.5}) is None
    assert "token merging" in reasons({"token_merging_ratio_hr": 0.5}, hires=True)
