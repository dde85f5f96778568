"""The prediction of speed: against the CPU's measured table, and against what kernels and bytes are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentsd import AgentConfig, early
from agentsd.costs import layouts
from agentsd.methods import LayerPlan, selectable
from agentsd.predict import CARDS, COUNTS, CPU, counts_of, device_named, pays_from, seconds, speedup, speedup_of_run

BENCH = Path(__file__).parents[1] / "docs" / "bench"
FILES = ("bench.json", "bench-large.json", "bench-dtypes.json")
NAMES = {"sd15": "SD 1", "sd21": "SD 2", "sdxl": "SDXL"}
WHOLE = {"ratio": 0.0, "agent_source": "grid"}
CONFIGS = {
    "sdpa": None,
    "grid4": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 16),
    "grid8": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 64),
    "grid8d2": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 64, max_downsample=2),
    "grid8d4": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 64, max_downsample=4),
    "grid64d8": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 64, max_downsample=8, max_agents=64),
    # as many agents as when that was measured
    "corrected4": AgentConfig(**WHOLE, method="corrected", agent_ratio=1 - 1 / 16, max_agents=1024),
    "corrected8": AgentConfig(**WHOLE, method="corrected", agent_ratio=1 - 1 / 64),
    "pool2": AgentConfig(**WHOLE, method="pool", sx=2, sy=2),
    "paper": AgentConfig(),
    "panel": AgentConfig(**WHOLE, agent_ratio=0.95),  # its defaults when that was measured
}
SIDES = (512, 640, 768, 1024, 1536, 2048)


def measured() -> dict[tuple[str, int, str], tuple[float, float | None]]:
    """(seconds, speed-up) of each row of the CPU's table in bfloat16, by U-Net, side and method."""
    found = {}
    for file in FILES:
        for case in json.loads((BENCH / file).read_text(encoding="utf-8"))["cases"]:
            if case["dtype"] != "bfloat16" or case["channels_last"] or case["layout"] not in NAMES:
                continue
            for method, result in case["results"].items():
                if method in CONFIGS and result.get("seconds"):
                    found[case["layout"], case["size"][0], method] = result["seconds"], result["speedup"]
    return found


MEASURED = measured()


def predicted(layout: str, side: int, method: str) -> float:
    return seconds(CPU, layouts()[NAMES[layout]], CONFIGS[method], side // 8, side // 8, progress=0.0)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(map(str, row)))
def test_the_cpu_s_table_is_predicted_within_15_percent(row):
    layout, side, _ = row
    measured_seconds, measured_speedup = MEASURED[row]
    assert predicted(*row) == pytest.approx(measured_seconds, rel=0.15)
    if measured_speedup:
        ratio = predicted(layout, side, "sdpa") / predicted(*row)
        assert ratio == pytest.approx(measured_speedup, rel=0.15)


def test_there_is_a_table_to_predict():
    assert {row[0] for row in MEASURED} == set(NAMES)
    assert {row[1] for row in MEASURED} >= {64, 128, 256, 512, 768, 1024, 2048}
    assert len(MEASURED) > 40


@pytest.mark.parametrize("device", CARDS, ids=lambda device: device.name)
class TestCards:
    def test_the_gain_grows_with_the_image(self, device):
        ratios = [speedup(device, layouts()["SD 1"], CONFIGS["grid4"], s // 8, s // 8) for s in SIDES]
        assert ratios == sorted(ratios)
        assert ratios[-1] > 1.5

    def test_a_method_pays_from_where_it_is_faster_on(self, device):
        layout, config = layouts()["SD 1"], CONFIGS["grid4"]
        first = pays_from(device, layout, config, SIDES)
        assert first in SIDES
        assert all((speedup(device, layout, config, s // 8, s // 8) > 1.02) == (s >= first) for s in SIDES)

    def test_small_images_are_bound_by_launches(self, device):
        """More work on the device takes no longer there, and more kernels do."""
        layout = layouts()["SD 1"]
        assert seconds(device, layout, None, 8, 8) >= COUNTS["SD 1"].kernels * device.launch
        assert speedup(device, layout, CONFIGS["corrected4"], 64, 64, rows=2) > 0.5


def test_what_cannot_be_told_is_no_size():
    assert pays_from(CARDS[2], layouts()["SD 1"], CONFIGS["grid4"], (64, 128)) is None


def test_a_card_is_known_by_the_name_that_its_driver_reports():
    assert device_named("NVIDIA GeForce RTX 4090") is CARDS[1]
    assert device_named("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert device_named("") is None


class TestARun:
    def test_without_stages_it_is_a_call(self):
        how = (CARDS[1], layouts()["SD 1"], CONFIGS["corrected4"], 64, 96)
        assert speedup_of_run(*how) == pytest.approx(speedup(*how))
        assert speedup_of_run(*how, start=0.5) == pytest.approx(speedup(*how))

    def test_a_stage_counts_by_its_length(self):
        device, layout = CARDS[0], layouts()["SD 1"]
        half = AgentConfig(**WHOLE, method="corrected", agent_ratio=1 - 1 / 16, stages=early(0.5))
        patched, plain = (seconds(device, layout, config, 64, 64) for config in (CONFIGS["corrected4"], None))
        assert speedup_of_run(device, layout, half, 64, 64) == pytest.approx(2 * plain / (patched + plain))
        assert speedup_of_run(device, layout, half, 64, 64, start=0.5) == pytest.approx(1.0)
        assert speedup_of_run(device, layout, half, 64, 64, start=1.0) == 1.0


def test_an_unknown_layout_counts_as_the_nearest_known_one():
    sdxl = layouts()["SDXL"]
    assert counts_of(type(sdxl)("", sdxl.blocks, sdxl.rest, sdxl.constant)) is COUNTS["SDXL"]


@pytest.mark.parametrize("method", selectable(), ids=lambda method: method.name)
def test_every_method_can_be_predicted(method):
    settings = {"ratio": 0.4, "method": method.name, "agent_ratio": 0.9}
    assert 0.3 < speedup(CARDS[1], layouts()["SD 1"], AgentConfig(**settings), 128, 128) < 10
    assert method.kernels(LayerPlan(method.action, 4096, 4096, 256, (4, 4))) <= 40
