"""What the panel asks of the program that it is shown in: a WebUI, or the playground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from ..config import AgentConfig


@dataclass(frozen=True)
class Hint:
    """Something that the user should know or change.

    Attributes:
        text: a clause without a full stop.
        remedy: what would change it: names of settings, or places in the host's own settings.
    """

    text: str
    remedy: tuple[str, ...] = ()


class Busy(RuntimeError):
    """The model is in use."""


class PanelHost(Protocol):
    """A program that shows the panel."""

    def unet(self) -> nn.Module | None:
        """The U-Net of the model in use; None where none is loaded. Loads none."""

    def config(self, values: Mapping[str, Any], hires: bool) -> AgentConfig | None:
        """The config of a pass with these settings, canonical; None where that pass is to be left alone.

        Raises:
            SettingError: settings that exclude each other.
        """

    def obstacle(self, hires: bool, img2img: bool) -> Hint | None:
        """What keeps a pass from being patched, as far as the host's options say; None where nothing does."""

    def advice(self, values: Mapping[str, Any]) -> Sequence[Hint]:
        """What to say about the loaded model, given the settings."""

    def at_rest(self) -> AbstractContextManager[tuple[nn.Module, Any]]:
        """A `with` block that holds (U-Net, kv_context), for running the U-Net while nothing is generated.

        Raises:
            Busy: the model is in use, or there is none.
        """
