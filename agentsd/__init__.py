"""Agent attention for Stable Diffusion: faster self-attention without training.

Importing the package loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Calibration, Timing, calibrate
    from .config import (
        TOKEN_MERGING,
        AgentConfig,
        Rule,
        SettingError,
        Stage,
        early,
        paper_stages,
    )
    from .hosts import UnsupportedModelError
    from .layer import LayerReport
    from .methods.agents import agent_attention
    from .methods.base import LayerPlan
    from .module import AgentAttention, AgentBias
    from .patch import Patch, apply_patch, get_patch, patch_unet, patched, remove_patch
    from .plan import plan_layer
    from .rules import format_rules, parse_rules
    from .tuning.data import Tuning, TuningCancelled, TuningError
    from .tuning.record import record_calls
    from .tuning.tuner import tune

__version__ = "1.1.0"

# Module that defines each public name
_HOMES = {
    "calibration": ("Calibration", "Timing", "calibrate"),
    "config": ("TOKEN_MERGING", "AgentConfig", "Rule", "SettingError", "Stage", "early", "paper_stages"),
    "hosts": ("UnsupportedModelError",),
    "methods.agents": ("agent_attention",),
    "methods.base": ("LayerPlan",),
    "module": ("AgentAttention", "AgentBias"),
    "layer": ("LayerReport",),
    "patch": ("Patch", "apply_patch", "get_patch", "patch_unet", "patched", "remove_patch"),
    "plan": ("plan_layer",),
    "rules": ("format_rules", "parse_rules"),
    "tuning.data": ("Tuning", "TuningCancelled", "TuningError"),
    "tuning.record": ("record_calls",),
    "tuning.tuner": ("tune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "TOKEN_MERGING",
    "AgentAttention",
    "AgentBias",
    "AgentConfig",
    "Calibration",
    "LayerPlan",
    "LayerReport",
    "Patch",
    "Rule",
    "SettingError",
    "Stage",
    "Timing",
    "Tuning",
    "TuningCancelled",
    "TuningError",
    "UnsupportedModelError",
    "agent_attention",
    "apply_patch",
    "calibrate",
    "early",
    "format_rules",
    "get_patch",
    "paper_stages",
    "parse_rules",
    "patch_unet",
    "patched",
    "plan_layer",
    "record_calls",
    "remove_patch",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):  # a submodule, as in agentsd.merging
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
