"""The nodes, built from the table of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..settings.table import BY_NAME, DEFAULTS, Row, check, to_config

if TYPE_CHECKING:
    from ..config import AgentConfig

CATEGORY = "model_patches/unet"
CUSTOM = "custom: agent_ratio"
# Side in tokens of a square cell
CELLS: Mapping[str, int | None] = {"2×2, closest": 2, "4×4": 4, "8×8, fastest": 8, CUSTOM: None}

# The inputs of the node, each with its row in the table of settings. Graphs keep the values by position: append only.
_ROWS: Mapping[str, str] = {
    "method": "method",
    "from": "since",
    "until": "until",
    "layers": "max_downsample",
    "ratio": "ratio",
    "agent_ratio": "agent_ratio",
    "k_scale2": "k_scale2",
    "k_shortcut": "k_shortcut",
    "fp32": "fp32",
    "agent_source": "agent_source",
    "rules": "rules",
    "landmarks": "landmarks",
}
_OPTIONAL = ("agent_source", "rules", "landmarks")
# Corrected agents in every step, as the preset Faithful of the WebUI's panel
_DEFAULTS = {**DEFAULTS, "method": "corrected", "until": 1.0}
_CELLS_HELP = "Size of the cells of tokens that one agent stands for. Smaller is closer to the original, larger faster."


def _widget(row: Row) -> tuple[Any, dict[str, Any]]:
    """Describe a setting as an input of a node."""
    options: dict[str, Any] = {"default": _DEFAULTS[row.name], "tooltip": row.help}
    if row.kind in ("slider", "number"):
        kind = "INT" if row.whole else "FLOAT"
        return kind, {**options, "min": row.low, "max": row.high, "step": row.step}
    if row.kind == "choice":
        return list(row.choices), options
    return {"flag": "BOOLEAN", "text": "STRING"}[row.kind], options


def config_of(inputs: Mapping[str, Any]) -> tuple[AgentConfig, float]:
    """Make the core's config from a node's inputs, and say where its agents begin.

    Raises:
        SettingError: a value is outside its range, or From is not below Until.
    """
    values = {row: inputs[name] for name, row in _ROWS.items() if name in inputs}
    side = CELLS[inputs.get("cells", CUSTOM)]
    if side is not None:
        values.update(agent_ratio=1 - 1 / side**2, sx=side, sy=side)
    checked = check({**_DEFAULTS, **values, "enabled": True})
    return to_config(checked), checked["since"]


class _OnModel:
    """What nodes have in common that give a model back."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"


class AgentAttention(_OnModel):
    """Agent attention on a model."""

    DESCRIPTION = (
        "Faster self-attention for large images, without training. Only the model that comes out is changed. "
        "For SD 1, SD 2 and SDXL."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        widgets = {name: _widget(BY_NAME[row]) for name, row in _ROWS.items()}
        optional = {name: widgets.pop(name) for name in _OPTIONAL}
        cells = list(CELLS), {"default": "4×4", "tooltip": _CELLS_HELP}
        return {
            "required": {"model": ("MODEL",), "method": widgets.pop("method"), "cells": cells, **widgets},
            "optional": optional,
        }

    def apply(self, model: Any, **inputs: Any) -> tuple[Any]:
        from .model import attach

        return (attach(model, *config_of(inputs)),)


class AgentAttentionTuned(_OnModel):
    """Agent attention within a tolerance, tuned on the first sampling."""

    DESCRIPTION = (
        "The fastest attention of each block that keeps a tolerance. The first sampling is made without it and then "
        "tunes on your model, prompt and machine, which takes a while; the next ones use what was found."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tolerance = {"default": 0.02, "min": 0.001, "max": 0.5, "step": 0.001, "round": 0.001}
        tolerance["tooltip"] = "Upper limit on the relative deviation of the U-Net's output: 0.02 is 2%."
        plan = {"default": "", "tooltip": "A plan that a report has shown, to use instead of tuning."}
        return {
            "required": {"model": ("MODEL",), "tolerance": ("FLOAT", tolerance)},
            "optional": {"plan": ("STRING", plan)},
        }

    def apply(self, model: Any, tolerance: float, plan: str = "") -> tuple[Any]:
        from .tuned import attach_tuned

        return (attach_tuned(model, tolerance, plan),)


class AgentAttentionReport:
    """What agent attention did in the last sampling with a model, as text."""

    CATEGORY = CATEGORY
    DESCRIPTION = "What Agent Attention did in the last sampling: connect the sampler's output, so that it comes after."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        after = {"tooltip": "Output of the sampler to report on, or of anything behind it."}
        return {"required": {"model": ("MODEL", {"tooltip": "The model that was sampled."}), "after": ("*", after)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Mapping[str, str]) -> bool:
        return True  # hosts that don't take "*" for any type skip their check where this is asked

    def report(self, model: Any, after: Any) -> tuple[str]:
        from .model import report_on

        return (report_on(model),)


NODE_CLASS_MAPPINGS = {
    "AgentAttention": AgentAttention,
    "AgentAttentionTuned": AgentAttentionTuned,
    "AgentAttentionReport": AgentAttentionReport,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AgentAttention": "Agent Attention",
    "AgentAttentionTuned": "Agent Attention (Tuned)",
    "AgentAttentionReport": "Agent Attention Report",
}
