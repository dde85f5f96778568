"""Settings of each kind, and tests that run once for each of them."""

from typing import Any

import pytest
from hypothesis import strategies as st

import agentsd

GRID = {"ratio": 0.0, "agent_ratio": 0.95, "agent_source": "grid"}
SIMILARITY = {"ratio": 0.4, "agent_ratio": 0.95}
MERGING = dict(agentsd.TOKEN_MERGING)
EVERYWHERE = {"ratio": 0.4, "max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}
REST_ALONE = {"merge_attn": False, "merge_crossattn": True, "merge_mlp": True}
POOL = {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0}
CORRECTED = {"method": "corrected", "agent_ratio": 0.75, "ratio": 0.0}
KINDS = {"grid": GRID, "similarity": SIMILARITY, "merging": MERGING, "everywhere": EVERYWHERE}
KINDS |= {"rest alone": REST_ALONE, "pool": POOL, "corrected": CORRECTED}
SELF_ATTENTION = {name: kw for name, kw in KINDS.items() if name != "rest alone"}


def kinds(table: dict[str, Any]) -> Any:
    """Run a test once for each entry of the table, as its argument `kw`."""
    return pytest.mark.parametrize("kw", table.values(), ids=table.keys())


def of(*names: str) -> Any:
    """Run a test once for each of these kinds, as its argument `kw`."""
    return kinds({name: KINDS[name] for name in names})


by_kind, self_attention_kinds = kinds(KINDS), kinds(SELF_ATTENTION)

# AgentSD's settings, drawn at random
DRAWN = dict.fromkeys(("ratio", "agent_ratio"), st.floats(0, 0.99))
DRAWN |= dict.fromkeys(("merge_attn", "merge_crossattn", "merge_mlp"), st.booleans())
DRAWN |= {"k_scale2": st.floats(0, 2), "k_shortcut": st.floats(0, 1)}
