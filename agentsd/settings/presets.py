"""Presets: settings by intention. The page offers them and names the one that the controls match."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .schema import HIRES, MERGING, SETTINGS, check
from .tunings import AUTO

CUSTOM = "Custom"
# Settings that depend on the machine, the model or the user: presets neither set nor compare them
KEPT = ("enabled", "fp32", "min_tokens", "seed", *(row.name for row in SETTINGS if row.local))
TUNED = "Tuned"

# Differences from the panel's defaults, chosen by deviation and time: see docs/measurements.md
_DIFFERENCES: Mapping[str, Mapping[str, Any]] = {
    # Corrected agents over 4×4 cells, over 8×8 cells, and with a seventh of the keys seen exactly
    "Balanced": {},
    "Fast": {"agent_ratio": 0.98},
    "Faithful": {"exact_ratio": 0.14},
    # AgentSD: agents for 40% of the steps, then token merging (Han et al., ECCV 2024, section 5). A hires pass at
    # denoising strength 0.5 has done 40% of its steps when 70% of the diffusion is done.
    "Paper": {"method": "agent", "ratio": 0.4, "agent_source": "similarity", "until": 0.4, "hires_until": 0.7}
    | {"after": MERGING},
    "Hires only": {"passes": HIRES},
    # Its largest layers are at level 2, most of its attention at level 4
    "SDXL": {"max_downsample": "4"},
    # What was tuned on the checkpoint at hand, at the size at hand; elsewhere the defaults
    TUNED: {"tuning": AUTO},
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    preset: MappingProxyType({name: value for name, value in check(values).items() if name not in KEPT})
    for preset, values in _DIFFERENCES.items()
}


def preset_of(values: Mapping[str, Any]) -> str:
    """Return the name of the preset that these settings match, or CUSTOM."""
    return next((name for name, preset in PRESETS.items() if preset.items() <= values.items()), CUSTOM)
