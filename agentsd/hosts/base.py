"""Interface of a host: a call of self-attention, and the seam through which it is answered.

A family of U-Nets is one file in this folder, with a `Seam`; one of transformers is a row in one of them.
No file outside knows class names, call signatures or dtypes of hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """The model has neither a Stable Diffusion U-Net with transformer blocks to patch nor a known transformer."""


@dataclass
class Call:
    """One self-attention call, as made by the host."""

    x: Tensor  # tokens (B, N, C)
    context: Tensor | None  # input of the key and value projections; None means x
    mask: Any  # the attention mask, if any
    extras: Mapping[str, Any]  # other arguments that are neither None nor empty, by name
    # makes the host's original call; given tokens, makes the same call with these in place of x
    proceed: Callable[..., Tensor]
    wanted: Any = None  # what the seam's `wants` returned for it
    chosen: Any = None  # takes the cells that windows open, where somebody looks on

    def veto(self, tokens: int) -> str:
        """Say why this is no plain self-attention of so many tokens; empty if it is."""
        if self.mask is not None:
            return "self-attention was given a mask"
        if self.extras:
            return f"self-attention was given {', '.join(sorted(self.extras))}"
        if self.context is not None and self.context is not self.x:
            return "self-attention was given a context of its own"
        shape = self.x.shape
        if len(shape) != 3 or shape[1] != tokens:
            return "self-attention got another number of tokens than the layer has"
        return ""


Handler = Callable[[Call], Tensor]


def always() -> bool:
    """Want every call."""
    return True


class Seam:
    """Replacement point in one attention module, through which a handler answers its calls.

    This one replaces nothing: it is for hosts that call the handler by themselves, and project the output.
    """

    obstacle = ""  # why its calls can't be answered; empty if they can

    def __init__(self, attn: Any) -> None:
        self.attn = attn

    def install(self, handler: Handler, wants: Callable[[], Any] = always) -> None:
        """Send calls to `handler` while `wants()` returns something, the others on unread; at most once per seam."""

    def refresh(self) -> None:
        """See whether the host computes the attention in another way since, and go on answering if that can be."""

    def remove(self) -> None:
        """Restore the module."""

    def project_out(self, x: Tensor) -> Tensor:
        """Apply the attention's output projection."""
        return x


def weight_of(module: nn.Module) -> Tensor:
    """Return the first floating-point parameter, for its device and dtype."""
    return next(p for p in module.parameters() if p.is_floating_point())
