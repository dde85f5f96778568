"""Write costs.json, the table of cases that Python and JavaScript must both reproduce to the last digit.

Run it after a change of the cost model that is meant: `python tests/cases/make_costs.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent)]
from test_costs import answer  # noqa: E402 (found on the path just set)

EARLY = [{"until": 0.6, "settings": {}}, {"until": 1.0, "settings": None}]
PAPER = [
    {"until": 0.4, "settings": {}},
    {"until": 1.0, "settings": {"ratio": 0.4, "sx": 2, "sy": 2, "agent_ratio": 0.0, "agent_source": "similarity"}},
]
LATE = [
    {"until": 0.3, "settings": None},
    {"until": 0.7, "settings": {"k_scale2": 1.0}},
    {"until": 1.0, "settings": None},
]
GRID = {"agent_source": "grid", "ratio": 0.0, "agent_ratio": 0.94}
ODD = {
    "name": "odd",
    "blocks": [{"downsample": 4, "channels": 48, "count": 3}],
    "rest": [[1, 7], [2, 11]],
    "constant": 5,
}

CONFIGS = {
    "defaults": {},
    "paper": {"stages": PAPER},
    "grid 4x4": {**GRID, "stages": EARLY},
    "grid 8x8": {**GRID, "agent_ratio": 0.98},
    "grid half": {**GRID, "agent_ratio": 0.5, "stages": LATE},
    "grid too many agents": {**GRID, "agent_ratio": 0.3},
    "grid merged": {**GRID, "ratio": 0.5, "sx": 2, "sy": 2},
    "grid at most 100": {**GRID, "max_agents": 100},
    "grid at most 1": {**GRID, "max_agents": 1},
    "threshold": {**GRID, "min_tokens": 4096},
    "all levels": {**GRID, "max_downsample": 8},
    "level 2": {**GRID, "max_downsample": 2, "min_tokens": 1024},
    "similarity 0.29": {"ratio": 0.29, "agent_ratio": 0.57, "sx": 3, "sy": 2},
    "similarity at most 77": {"ratio": 0.0, "max_agents": 77, "sx": 8, "sy": 16},
    "similarity capped": {"ratio": 0.99, "agent_ratio": 0.99, "sx": 2, "sy": 1, "max_downsample": 4},
    "no cell fits": {"sx": 16, "sy": 16, "max_downsample": 8},
    "one token a cell": {"sx": 1, "sy": 1},
    "no agents": {"ratio": 0.0, "agent_ratio": 0.0},
    "merging": {"ratio": 0.4, "sx": 2, "sy": 2, "agent_ratio": 0.0, "merge_crossattn": True, "merge_mlp": True},
    "mlp only": {"merge_attn": False, "merge_mlp": True},
    "nothing": {"merge_attn": False},
    "pool": {"method": "pool", "sx": 2, "sy": 2},
    "pool ragged": {"method": "pool", "sx": 5, "sy": 3, "merge_crossattn": True, "max_downsample": 8},
    "corrected": {"method": "corrected", "stages": EARLY},
    "corrected 8x8": {"method": "corrected", "agent_ratio": 0.98, "max_downsample": 8, "merge_mlp": True},
    "corrected nothing": {"method": "corrected", "agent_ratio": 0.1},
    "pool nothing": {"method": "pool", "sx": 1, "sy": 1},
}
SIZES = {"SD 1": [(64, 64), (65, 41)], "SD 2": [(96, 96)], "SDXL": [(104, 152)]}


def cases():
    """Every config at every size of every layout, and a few odd ones."""
    for layout, sizes in SIZES.items():
        for height, width in sizes:
            for name, config in CONFIGS.items():
                yield {
                    "name": f"{layout} {height}x{width} {name}",
                    "layout": layout,
                    "height": height,
                    "width": width,
                    "config": config,
                }
    for start in (0.0, 0.3, 0.5, 0.65, 1.0):
        for name in ("paper", "grid 4x4", "grid half"):
            case = {"layout": "SD 1", "height": 128, "width": 64, "config": CONFIGS[name], "start": start}
            yield {"name": f"from {start} {name}", **case}
    for height, width in ((1, 1), (7, 9), (512, 512)):
        case = {"layout": ODD, "height": height, "width": width, "config": {**GRID, "max_downsample": 4}}
        yield {"name": f"odd layout {height}x{width}", **case}
    yield {"name": "4096 square", "layout": "SDXL", "height": 512, "width": 512, "config": {"max_downsample": 4}}


if __name__ == "__main__":
    lines = [json.dumps({**case, "expected": answer(case)}, ensure_ascii=False) for case in cases()]
    FOLDER.joinpath("costs.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(lines)} cases")
