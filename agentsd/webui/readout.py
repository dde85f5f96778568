"""What the page needs to know to say what the settings do: asked for once, and again when the model changes.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from agentsd.config import TOKEN_MERGING, AgentConfig
from agentsd.costs import Layout, layouts
from agentsd.layout import layout_of

from .presets import CUSTOM, PRESETS
from .settings import DEFAULTS, MERGING, SETTINGS

# Reading a layout walks over every module of the U-Net.
_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def page_data(unet: nn.Module | None, notes: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The tables and the model, in JSON's types.

    Args:
        unet: the U-Net in use; None where no model is loaded.
        notes: advice about the model: "hint" (a sentence without its full stop), "controls" (settings by name) and
            "unless" (the setting that makes the advice moot).
    """
    return {
        "layouts": {name: layout.to_dict() for name, layout in layouts().items()},
        "config": {**asdict(AgentConfig()), "stages": []},
        "after": {MERGING: dict(TOKEN_MERGING)},
        "rows": [_row(row) for row in SETTINGS],
        "labels": {row.name: row.label for row in SETTINGS},
        "defaults": dict(DEFAULTS),
        "presets": {name: dict(values) for name, values in PRESETS.items()},
        "custom": CUSTOM,
        "model": None if unet is None else {"layout": _layout(unet).to_dict(), "notes": list(notes)},
    }


def advice(is_sd2: bool, upcasts: bool) -> list[dict[str, Any]]:
    """When to compute in 32 bits: "notes" for `page_data`.

    Args:
        is_sd2: whether the model is an SD 2.x, whose self-attention can overflow in half precision.
        upcasts: whether the host is told to compute attention in float32.
    """
    if not (is_sd2 or upcasts):
        return []
    hint = "the host's upcast option is on" if upcasts else "attention of SD 2 models can overflow in half precision"
    return [{"hint": f"{hint}: 32 bits are advised", "controls": ["fp32"], "unless": "fp32"}]


def _row(row: Any) -> Mapping[str, Any]:
    return {"name": row.name, "kind": row.kind, "low": row.low, "high": row.high, "choices": list(row.choices)}


def _layout(unet: nn.Module) -> Layout:
    if unet not in _LAYOUTS:
        _LAYOUTS[unet] = layout_of(unet)
    return _LAYOUTS[unet]
