"""The table of predicted speed-ups, by size and method, of cards that nothing was measured on.

python -m benchmarks.predicted        # the tables of docs/performance.md
"""

from __future__ import annotations

import sys

from agentsd import AgentConfig
from agentsd.costs import layouts
from agentsd.predict import CARDS, Device, pays_from, seconds, speedup

WHOLE = {"ratio": 0.0, "agent_source": "grid", "max_downsample": "auto"}
METHODS = {
    "grid agents, 4×4 cells": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 16),
    "grid agents, 8×8 cells": AgentConfig(**WHOLE, agent_ratio=1 - 1 / 64),
    "corrected agents, 4×4 cells": AgentConfig(**WHOLE, method="corrected", agent_ratio=1 - 1 / 16),
    "local attention": AgentConfig(**WHOLE, method="local", agent_ratio=1 - 1 / 16),
    "keys and values pooled 2×2": AgentConfig(**WHOLE, method="pool", sx=2, sy=2),
    "AgentSD's settings": AgentConfig(max_downsample="auto"),
}
SIDES = {"SD 1": (512, 768, 1024, 1536, 2048), "SDXL": (1024, 1536, 2048)}
# Where a method begins to pay is looked for at these sides.
FINE = tuple(range(256, 4097, 128))


def table(device: Device) -> list[str]:
    """Lines of one card's table: ratios, and in the first row milliseconds."""
    columns = [(name, side) for name, sides in SIDES.items() for side in sides]
    head = [f"{name} {side}²" for name, side in columns]
    lines = [f"| {device.name} | " + " | ".join([*head, "SD 1 pays from", "SDXL pays from"]) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    plain = [f"{1e3 * seconds(device, layouts()[name], None, side // 8, side // 8):.3g}" for name, side in columns]
    lines.append("| SDPA, ms | " + " | ".join([*plain, "–", "–"]) + " |")
    for label, config in METHODS.items():
        cells = [f"{speedup(device, layouts()[name], config, side // 8, side // 8):.2f}×" for name, side in columns]
        first = (pays_from(device, layouts()[name], config, FINE) for name in SIDES)
        lines.append(f"| {label} | " + " | ".join([*cells, *(f"{s}²" if s else "–" for s in first)]) + " |")
    return lines


def main() -> int:
    """Print the tables."""
    print("\n\n".join("\n".join(table(device)) for device in CARDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
