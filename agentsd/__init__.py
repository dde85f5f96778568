"""Agent attention for Stable Diffusion: faster self-attention without training.

Importing the package loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION

if TYPE_CHECKING:
    from .apply import apply_patch, get_patch, patch_unet, patched, remove_patch
    from .attention.agent import agent_attention
    from .attention.module import AgentAttention, AgentBias
    from .checks import SettingError
    from .config import TOKEN_MERGING, AgentConfig, early, paper_stages
    from .hosts import UnsupportedModelError
    from .methods.base import LayerPlan
    from .patching.layer import LayerReport
    from .patching.patch import Patch
    from .plan import plan_layer
    from .rules import format_rules, parse_rules
    from .schedule import Rule, Stage, progress_of_sigma
    from .tuning.record import record_calls
    from .tuning.result import Tuning, TuningCancelled, TuningError
    from .tuning.tuner import tune

__version__ = VERSION

# Modules that define the public names, those that load no torch first
_HOMES = ["checks", "config", "methods.base", "plan", "rules", "schedule", "tuning.result", "hosts", "patching.layer"]
_HOMES += ["patching.patch", "apply", "tuning.record", "tuning.tuner", "attention.agent", "attention.module"]

__all__ = ["TOKEN_MERGING", "AgentAttention", "AgentBias", "AgentConfig", "LayerPlan", "LayerReport", "Patch"]
__all__ += ["Rule", "SettingError", "Stage", "Tuning", "TuningCancelled", "TuningError", "UnsupportedModelError"]
__all__ += ["agent_attention", "apply_patch", "early", "format_rules", "get_patch", "paper_stages", "parse_rules"]
__all__ += ["patch_unet", "patched", "plan_layer", "progress_of_sigma", "record_calls", "remove_patch", "tune"]


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        if (value := getattr(import_module(f"{__name__}.{home}"), name, None)) is not None:
            globals()[name] = value
            return value
    if not name.startswith("_"):  # a submodule, as in agentsd.attention.merging
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
