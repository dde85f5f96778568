"""Which settings have no effect beside the others, and why, by what methods read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

from ..config import AGENT_SOURCES, FIELDS, TOKEN_MERGING
from ..methods import METHODS
from ..plan import settings_read
from .schema import BOTH, BY_NAME, FIRST, HIRES, MERGING, SETTINGS

# Settings on which it depends whether others have an effect, each with values that may give them one
_DECISIVE: dict[str, Any] = {"passes": (BOTH,), "until": (0.5,), "hires_until": (0.5,), "merge_attn": (True,)}
_DECISIVE |= {"ratio": (0.4,), "use_rand": (True,), "agent_source": AGENT_SOURCES, "method": METHODS}
_DECISIVE["merge_mlp"] = (True,)


def idle(values: Mapping[str, Any]) -> dict[str, str]:
    """Say which settings have no effect beside the others, and why: {name: sentence}. Rules may give any an effect."""
    return {} if values["rules"] else dict(_idle(tuple(METHODS), tuple(values.items())))


@lru_cache(maxsize=64)  # asked for at every move of a slider
def _idle(methods: tuple[str, ...], given: tuple[tuple[str, Any], ...]) -> dict[str, str]:
    values = dict(given)
    read = _read(values)
    return {name: _reason(name, values) for name in BY_NAME if name not in read}


def _reason(name: str, values: Mapping[str, Any]) -> str:
    """Name the fewest settings without which this one would have an effect."""
    for names in (*combinations(_DECISIVE, 1), *combinations(_DECISIVE, 2)):
        for others in product(*map(_DECISIVE.__getitem__, names)):
            if name in _read({**values, **dict(zip(names, others, strict=True))}):
                causes = (f"{BY_NAME[each].label} is {BY_NAME[each].format(values[each])}" for each in names)
                return f"No effect while {' and '.join(causes)}."
    return "No effect beside the other settings."


def _read(values: Mapping[str, Any]) -> set[str]:
    ends = [end for end, other in (("until", HIRES), ("hires_until", FIRST)) if values["passes"] != other]
    read = settings_read(SimpleNamespace(**values))
    if any(values[end] < 1 for end in ends):
        ends.append("after")
        if values["after"] == MERGING:
            read |= settings_read(SimpleNamespace(**{**values, **TOKEN_MERGING})) - TOKEN_MERGING.keys()
    if "attn_precision" in read:
        read.add("fp32")
    panel = {row.name for row in SETTINGS if row.name not in FIELDS} - {"fp32", "until", "hires_until", "after"}
    return read | panel | set(ends)
