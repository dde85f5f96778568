"""Agent attention for Stable Diffusion: faster self-attention without training."""

from .attention import AgentAttention, AgentBias, agent_attention
from .calibrate import Calibration, Timing, calibrate
from .config import (
    TOKEN_MERGING,
    AgentConfig,
    LayerPlan,
    SettingError,
    Stage,
    early,
    paper_stages,
    plan_layer,
)
from .hosts import UnsupportedModelError
from .patch import LayerReport, Patch, apply_patch, get_patch, patch_unet, patched, remove_patch

__version__ = "1.0.0"

__all__ = [
    "TOKEN_MERGING",
    "AgentAttention",
    "AgentBias",
    "AgentConfig",
    "Calibration",
    "LayerPlan",
    "LayerReport",
    "Patch",
    "SettingError",
    "Stage",
    "Timing",
    "UnsupportedModelError",
    "agent_attention",
    "apply_patch",
    "calibrate",
    "early",
    "get_patch",
    "paper_stages",
    "patch_unet",
    "patched",
    "plan_layer",
    "remove_patch",
]
