"""Read the infotext of the older extension sd-webui-agentattention ("AgAt …" keys)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..checks import SettingError
from .schema import BY_NAME, FIRST, HIRES, IMPLIED, MERGING, NOTHING

SWITCH = "AgAt Active"
# The older extension's key is "AgAt Apply to Hires. Fix Only"; the host's parser can't see past the full stop.
_HIRES_ONLY = ("AgAt Apply to Hires. Fix Only", "Fix Only")
_SAME = {
    "ratio": "AgAt First Pass Ratio",
    "agent_ratio": "AgAt First Pass Agent Ratio",
    "sx": "AgAt First Pass sx",
    "sy": "AgAt First Pass sy",
    "max_downsample": "AgAt Max Downsample",
    "fp32": "AgAt Use FP32 Precision",
}


def read(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read our settings from an image made with the older extension; None for any other image.

    The older extension patches either the first pass or the hires pass, changes settings at "Second Pass Step", and has
    neither k_scale2 nor k_shortcut. Its second settings become our token merging, whatever their values. Settings that
    cannot be read get our defaults.
    """
    if str(params.get(SWITCH)) != "True":
        return None
    hires_only = any(str(params.get(key)) == "True" for key in _HIRES_ONLY)
    second = str(params.get("AgAt Use Second Pass")) == "True"
    values = {**IMPLIED, "enabled": True, "agent_source": "similarity", "passes": HIRES if hires_only else FIRST}
    texts = {name: params[key] for name, key in _SAME.items() if key in params}
    texts["hires_until" if hires_only else "until"] = _end(params, hires_only)
    for name, text in texts.items():
        with suppress(SettingError):
            values[name] = BY_NAME[name].parse(str(text))
    return {**values, "after": MERGING if second else NOTHING}


def _end(params: Mapping[str, Any], hires: bool) -> float | None:
    """Return the progress at the older extension's "Second Pass Step"."""
    try:
        steps = float((hires and params.get("Hires steps")) or params["Steps"])
        part = min(1.0, float(params["AgAt Second Pass Step"]) / steps)
        start = 1.0 - float(params.get("Denoising strength", 1.0)) if hires else 0.0
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return max(BY_NAME["until"].low, round(start + (1.0 - start) * part, 2))
