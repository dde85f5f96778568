"""Read the infotext of the older extension sd-webui-agentattention ("AgAt …" keys)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..checks import SettingError
from .schema import BY_NAME, FIRST, HIRES, IMPLIED, MERGING, NOTHING

_SAME = {"ratio": "First Pass Ratio", "agent_ratio": "First Pass Agent Ratio", "sx": "First Pass sx"}
_SAME |= {"sy": "First Pass sy", "max_downsample": "Max Downsample", "fp32": "Use FP32 Precision"}


def read(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read our settings from an image made with the older extension; None for any other image.

    It patches either the first pass or the hires pass. What it does from "Second Pass Step" on becomes our token
    merging, whatever its settings. What cannot be read gets our defaults.
    """

    def entry(key: str) -> str:
        return str(params.get(f"AgAt {key}"))

    if entry("Active") != "True":
        return None
    # the host's parser can't see past the full stop
    hires_only = "True" in (entry("Apply to Hires. Fix Only"), str(params.get("Fix Only")))
    values = {**IMPLIED, "enabled": True, "agent_source": "similarity", "passes": HIRES if hires_only else FIRST}
    values["after"] = MERGING if entry("Use Second Pass") == "True" else NOTHING
    for name, key in _SAME.items():
        with suppress(SettingError):
            values[name] = BY_NAME[name].parse(entry(key))
    with suppress(KeyError, ValueError, ZeroDivisionError):
        steps = float((hires_only and params.get("Hires steps")) or params["Steps"])
        part = min(1.0, float(entry("Second Pass Step")) / steps)
        start = 1.0 - float(params.get("Denoising strength", 1.0)) if hires_only else 0.0
        end = BY_NAME["hires_until" if hires_only else "until"]
        values[end.name] = end.check(max(end.low, round(start + (1.0 - start) * part, 2)))
    return values
