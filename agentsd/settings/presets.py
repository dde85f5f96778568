"""Presets: settings by intention. The page offers them and names the one that the controls match."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .schema import BY_NAME, DEFAULTS, HIRES, MERGING, NAMES, SETTINGS
from .tunings import AUTO

CUSTOM = "Custom"
# Settings that depend on the machine, the model or the user: presets neither set nor compare them
KEPT = ("enabled", "fp32", "min_tokens", "seed", *(row.name for row in SETTINGS if row.local))
TUNED = "Tuned"

# Values of the presets, as differences from the panel's defaults, chosen by the deviation of the U-Net's output and the
# time of a forward pass: see docs/measurements.md.
_DIFFERENCES: Mapping[str, Mapping[str, Any]] = {
    # Corrected agents over 4×4 cells, over 8×8 cells, and with a seventh of the keys seen exactly
    "Balanced": {},
    "Fast": {"agent_ratio": 0.98},
    "Faithful": {"exact_ratio": 0.14},
    # AgentSD: agents for 40% of the steps, then token merging (Han et al., ECCV 2024, section 5). A hires pass at
    # denoising strength 0.5 has done 40% of its steps when 70% of the diffusion is done.
    "Paper": {
        "method": "agent",
        "ratio": 0.4,
        "agent_source": "similarity",
        "until": 0.4,
        "hires_until": 0.7,
        "after": MERGING,
    },
    "Hires only": {"passes": HIRES},
    # SDXL has no attention at full resolution: its largest layers are at level 2, most of its attention at level 4
    "SDXL": {"max_downsample": "4"},
    # What was tuned on the checkpoint at hand, at the size at hand; elsewhere the defaults
    TUNED: {"tuning": AUTO},
}


def _complete(differences: Mapping[str, Any]) -> Mapping[str, Any]:
    values = {**DEFAULTS, **{name: BY_NAME[name].check(value) for name, value in differences.items()}}
    return MappingProxyType({name: values[name] for name in NAMES if name not in KEPT})


PRESETS: Mapping[str, Mapping[str, Any]] = {name: _complete(values) for name, values in _DIFFERENCES.items()}


def preset_of(values: Mapping[str, Any]) -> str:
    """Return the name of the preset that these settings match, or CUSTOM."""
    for name, preset in PRESETS.items():
        if all(values[setting] == value for setting, value in preset.items()):
            return name
    return CUSTOM
