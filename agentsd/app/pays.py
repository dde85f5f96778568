"""Whether a pass pays on the card at hand, by prediction: where nothing was measured, and where the card is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import AgentConfig
from ..costs import Layout
from ..predict import NOISE, device_named, speedup_of_run
from ..settings.presets import CUSTOM, preset_of

if TYPE_CHECKING:
    from torch import nn


class Prediction(NamedTuple):
    """A predicted gain.

    Attributes:
        speed: how many times as fast the pass is predicted to be.
        device: name of the card.
    """

    speed: float
    device: str

    def slower(self, values: Mapping[str, Any]) -> str:
        """Say why a preset is better not applied, in a clause; empty where it is not slower.

        Settings of one's own (`values`, in canonical form) are applied all the same: whoever made them means them.
        """
        if self.speed >= 1 - NOISE or preset_of(values) == CUSTOM:
            return ""
        return f"predicted to be slower than without on the {self.device}, {self.speed:.2f}× the speed"


def prediction(
    unet: nn.Module,
    layout: Layout,
    config: AgentConfig,
    latent: tuple[int, int],
    start: float = 0.0,
    rows: int = 2,
) -> Prediction | None:
    """Predict the gain of a pass; None on devices whose rates are not known, and for weights in float32.

    Args:
        unet: the U-Net, where it will run.
        layout: its layout.
        config: the settings of the pass.
        latent: (height, width) of the latent.
        start: progress at which the pass begins, 0–1.
        rows: rows of the batch; 2 for cond and uncond of one image.
    """
    name, itemsize = _device_of(unet)
    device = device_named(name)
    # its rates are those of half precision
    if device is None or itemsize > 2:
        return None
    return Prediction(speedup_of_run(device, layout, config, *latent, start, rows=rows), device.name)


def _device_of(unet: nn.Module) -> tuple[str, int]:
    """(name of the card that holds the weights, bytes of a weight); no name where that is no CUDA device."""
    import torch

    weight = next(unet.parameters(), None)
    if weight is None or weight.device.type != "cuda":
        return "", 0
    return torch.cuda.get_device_name(weight.device), weight.element_size()
