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

# Module that defines each public name
_HOMES = {
    "apply": ("apply_patch", "get_patch", "patch_unet", "patched", "remove_patch"),
    "checks": ("SettingError",),
    "config": ("TOKEN_MERGING", "AgentConfig", "early", "paper_stages"),
    "hosts": ("UnsupportedModelError",),
    "attention.agent": ("agent_attention",),
    "methods.base": ("LayerPlan",),
    "attention.module": ("AgentAttention", "AgentBias"),
    "patching.layer": ("LayerReport",),
    "patching.patch": ("Patch",),
    "plan": ("plan_layer",),
    "schedule": ("Rule", "Stage", "progress_of_sigma"),
    "rules": ("format_rules", "parse_rules"),
    "tuning.result": ("Tuning", "TuningCancelled", "TuningError"),
    "tuning.record": ("record_calls",),
    "tuning.tuner": ("tune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["TOKEN_MERGING", "AgentAttention", "AgentBias", "AgentConfig", "LayerPlan", "LayerReport", "Patch"]
__all__ += ["Rule", "SettingError", "Stage", "Tuning", "TuningCancelled", "TuningError", "UnsupportedModelError"]
__all__ += ["agent_attention", "apply_patch", "early", "format_rules", "get_patch", "paper_stages", "parse_rules"]
__all__ += ["patch_unet", "patched", "plan_layer", "progress_of_sigma", "record_calls", "remove_patch", "tune"]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
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
