"""What was measured here: seconds with and without agents, in passes that were made anyway.

On an accelerator the first pass of its kind times its own layers (`agentsd.Patch.measure`). On a CPU the seconds of
ordinary U-Net calls do, with and without. Imports neither gradio nor a WebUI: the host's cache is passed in.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..hosts.base import weight_of

# Name of our section in the host's cache
SECTION = "agent-attention-timings"
CLEARLY = 1.05  # what is less is noise, in seconds of whole calls
_RUNS = 5  # the last ones count


@dataclass(frozen=True)
class Timing:
    """Seconds per U-Net call.

    Attributes:
        patched: seconds with agents.
        untouched: seconds without.
        layers: whether they are those of the changed layers' self-attention alone.
    """

    patched: float
    untouched: float
    layers: bool = False

    @property
    def slower(self) -> bool:
        """Whether agents were clearly slower."""
        return self.patched > (1.0 if self.layers else CLEARLY) * self.untouched

    @property
    def gain(self) -> float:
        """Seconds without / seconds with."""
        return self.untouched / self.patched

    def words(self) -> str:
        """Describe both, such as "410 → 330 ms per U-Net call"."""
        what = "self-attention " if self.layers else ""
        return f"{what}{_digits(self.untouched)} → {_digits(self.patched)} ms per U-Net call"


def _digits(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.2g}"


def case_of(unet: nn.Module, checkpoint: str, latent: tuple[int, int], rows: int) -> str:
    """Describe what the seconds of a U-Net call depend on beside the settings."""
    weight = weight_of(unet)
    device = weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    height, width = latent
    return f"{checkpoint} {width}x{height} {rows} {weight.dtype} {name} torch {torch.__version__}"


class Timings:
    """Seconds kept in a host's cache. What is damaged there counts as absent.

    Args:
        open_section: opens a section of it by its name and a default, a mapping of texts to JSON types.
    """

    def __init__(self, open_section: Callable[[str, dict[str, Any]], MutableMapping[str, Any]]) -> None:
        self._open = open_section

    def find(self, key: tuple[str, str]) -> Timing | None:
        """Return what was measured of passes like it: of one case, and settings as text; None if not both are known."""
        layers = self._read(key, "layers")
        if len(layers) == 2:
            return Timing(*layers, layers=True)
        with_, without = self._read(key, "calls"), self._read((key[0], ""), "calls")
        return Timing(statistics.median(with_), statistics.median(without)) if with_ and without else None

    def put_layers(self, key: tuple[str, str], patched: float, untouched: float) -> None:
        """Keep the seconds of the changed layers in a U-Net call."""
        self._write(key, "layers", [patched, untouched])

    def add_calls(self, key: tuple[str, str], patched: float | None, untouched: float | None) -> None:
        """Keep the seconds of a U-Net call in a run; None where there was no such call."""
        for at, seconds in ((key, patched), ((key[0], ""), untouched)):
            if seconds is not None:
                self._write(at, "calls", [*self._read(at, "calls"), seconds][-_RUNS:])

    def _section(self) -> MutableMapping[str, Any]:
        return self._open(SECTION, {})

    def _read(self, key: tuple[str, str], kind: str) -> list[float]:
        found = self._section().get(_text(key))
        seconds = found.get(kind) if isinstance(found, dict) else None
        valid = isinstance(seconds, list) and all(isinstance(s, float) and s > 0 for s in seconds)
        return seconds if valid else []

    def _write(self, key: tuple[str, str], kind: str, seconds: list[float]) -> None:
        self._section()[_text(key)] = {kind: seconds}


def _text(key: tuple[str, str]) -> str:
    case, settings = key
    return f"{case} {hashlib.sha1(settings.encode()).hexdigest()[:16] if settings else 'without'}"
