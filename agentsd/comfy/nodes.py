"""The nodes, built from the table of settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checks import Setting, SettingError
from ..settings import SETTINGS, check, to_config
from ..settings.idle import idle
from ..tuning.result import Tuning, TuningError

CUSTOM = "custom: agent_ratio"
# Side in tokens of a square cell
CELLS: Mapping[str, int | None] = {"2×2, closest": 2, "4×4": 4, "8×8, fastest": 8, CUSTOM: None}
_HELP = "Size of the cells of tokens that one agent stands for. Smaller is closer to the original, larger faster."
_CELLS = Setting("cells", "choice", "4×4", help=_HELP, choices=tuple(CELLS))
_HELP = "Upper limit on the relative deviation of the U-Net's output: 0.02 is 2%."
_TOLERANCE = Setting("tolerance", "number", 0.02, help=_HELP, low=0.001, high=0.5, step=0.001)
_PLAN = Setting("plan", "text", "", help="A plan that a report has shown, to use instead of tuning.")
_REQUIRED = ("method", "cells")

# The settings by the names of their inputs. Graphs keep the values by position: new ones come last.
_ROWS: Mapping[str, Setting] = {row.node or row.name: row for row in SETTINGS if row.node is not None}
_FIRST = ("method", "cells", "from", "until", "layers")
INPUTS = {name: _CELLS if name == "cells" else _ROWS[name] for name in dict.fromkeys((*_FIRST, *_ROWS))}
# The inputs by the names of their settings
_INPUT_OF = {"sx": "cells", "sy": "cells", "how_close": "tolerance"} | {row.name: name for name, row in _ROWS.items()}


def _widget(row: Setting) -> tuple[Any, dict[str, Any]]:
    """Describe a setting as an input of a node."""
    options: dict[str, Any] = {"default": row.default, "tooltip": row.tooltip}
    if row.numeric:
        kind = "INT" if row.kind == "whole" else "FLOAT"
        return kind, {**options, "min": row.low, "max": row.high, "step": row.step}
    if row.kind == "choice":
        return list(row.choices), options
    return ("STRING", {**options, "multiline": True}) if row.kind == "text" else ("BOOLEAN", options)


def _side(inputs: Mapping[str, Any]) -> int | None:
    return CELLS[_CELLS.check(inputs.get("cells", CUSTOM))]


def values_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a node's inputs stand for, in canonical form; raise SettingError where one is wrong."""
    values = {row.name: inputs[name] for name, row in _ROWS.items() if name in inputs}
    try:
        values = check({**values, "enabled": True})
        if (side := _side(inputs)) is not None:
            values.update(agent_ratio=1 - 1 / side**2, sx=side, sy=side)
        to_config(values)
        return values
    except SettingError as error:  # which knows the inputs by the names of their settings
        raise SettingError(re.sub(r"\w+", lambda word: _INPUT_OF.get(word[0], word[0]), str(error))) from None


def idle_inputs(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Say which inputs have no effect beside the others, and why: {name: sentence}."""
    reasons = idle(values_of(inputs))
    found = {name: reasons[row.name] for name, row in _ROWS.items() if row.name in reasons}
    if _side(inputs) is not None:
        found.setdefault("agent_ratio", f"No effect while cells is {inputs['cells']}.")
    if {"agent_ratio", "sx", "sy"} <= reasons.keys():
        found["cells"] = reasons["agent_ratio"]
    return found


class _Node:
    """A node that gives a model back."""

    CATEGORY, FUNCTION, RETURN_TYPES = "model_patches/unet", "apply", ("MODEL",)


class AgentAttention(_Node):
    """Agent attention on a model."""

    DESCRIPTION = (
        "Faster self-attention for large images, without training. Only the model that comes out is changed. "
        "For SD 1, SD 2 and SDXL; the method corrected for SD 3, Flux, Qwen-Image, Lumina and AuraFlow as well."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), **{name: _widget(INPUTS[name]) for name in _REQUIRED}},
            "optional": {name: _widget(row) for name, row in INPUTS.items() if name not in _REQUIRED},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool | str:
        try:
            values_of({name: value for name, value in inputs.items() if value is not None})  # None comes by a link
        except SettingError as error:
            return str(error)
        return True

    def apply(self, model: Any, **inputs: Any) -> tuple[Any]:
        from .model import Slot, attach
        from .transformers import attach_transformer, transformer_of

        changed = {name for name, value in inputs.items() if value != INPUTS[name].default}
        hints = [f"{name} is set: {why}" for name, why in idle_inputs(inputs).items() if name in changed]
        values = values_of(inputs)
        if transformer_of(model) is not None:
            return (attach_transformer(model, to_config(values), hints),)
        return (attach(model, lambda unet: Slot(unet, values, hints)),)


class AgentAttentionTuned(_Node):
    """Agent attention within a tolerance, tuned on the first sampling."""

    DESCRIPTION = (
        "The fastest attention of each block that keeps a tolerance. The first sampling is made without it and then "
        "tunes on your model, prompt and machine, which takes a while; the next ones use what was found."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"model": ("MODEL",), "tolerance": _widget(_TOLERANCE)}
        return {"required": required, "optional": {"plan": _widget(_PLAN)}}

    @classmethod
    def VALIDATE_INPUTS(cls, plan: str | None = None) -> bool | str:
        try:
            if plan and plan.strip():  # None comes by a link
                Tuning.from_text(plan)
        except TuningError as error:
            return str(error)
        return True

    def apply(self, model: Any, tolerance: float, plan: str = "") -> tuple[Any]:
        from .tuned import attach_tuned

        return (attach_tuned(model, tolerance, plan),)


class AgentAttentionReport(_Node):
    """What agent attention did in the last sampling with a model, as text."""

    DESCRIPTION = "What Agent Attention did in the last sampling: connect the sampler's output, so that it comes after."
    FUNCTION, RETURN_TYPES, RETURN_NAMES = "report", ("STRING",), ("report",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        after = {"tooltip": "Output of the sampler to report on, or of anything behind it."}
        return {"required": {"model": ("MODEL", {"tooltip": "The model that was sampled."}), "after": ("*", after)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Mapping[str, str]) -> bool:
        return True  # hosts that don't take "*" for any type skip their check where this is asked

    def report(self, model: Any, after: Any) -> tuple[str]:
        from .model import report_on
        from .transformers import report_on_transformer

        return (report_on_transformer(model) or report_on(model, _worded),)


def _worded(line: Any) -> str:
    """Word a line of a report, with the inputs of the nodes that would change it."""
    if line.hint is None:
        return str(line)
    inputs = " or ".join(dict.fromkeys(_INPUT_OF[name] for name in line.hint.remedy if name in _INPUT_OF))
    told = str(replace(line, hint=replace(line.hint, remedy=())))
    return f"{told} Change {inputs}." if inputs else told


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (AgentAttention, AgentAttentionTuned, AgentAttentionReport)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AgentAttention": "Agent Attention",
    "AgentAttentionTuned": "Agent Attention (Tuned)",
    "AgentAttentionReport": "Agent Attention Report",
}
