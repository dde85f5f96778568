"""Interface between the panel and the program that shows it: a WebUI, or the playground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from ..config import AgentConfig
    from .kept_tunings import Kept


@dataclass(frozen=True)
class Hint:
    """Advice to the user.

    Attributes:
        text: a clause without a full stop.
        remedy: names of the settings to change, or places in the host's own settings.
    """

    text: str
    remedy: tuple[str, ...] = ()


class PanelHost(Protocol):
    """A program that shows the panel."""

    def unet(self) -> nn.Module | None:
        """Return the U-Net of the current model; None if no model is loaded. Never loads one."""

    def config(self, values: Mapping[str, Any], hires: bool) -> AgentConfig | None:
        """Make the config of a pass from settings in canonical form; None if the pass is to be left alone.

        Raises:
            SettingError: settings contradict each other.
        """

    def kept(self, of: str, size: tuple[int, int]) -> Kept | None:
        """Return the tuning that is kept for the current model and a pass of a latent of (height, width)."""

    def obstacle(self, hires: bool, img2img: bool) -> Hint | None:
        """Say what in the host's options prevents a pass from being patched; None if nothing does."""

    def advice(self, values: Mapping[str, Any]) -> Sequence[Hint]:
        """Give hints about the loaded model, given the settings."""
