"""U-Nets of LDM and its descendants: sgm (SDXL), Forge and reForge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .arguments import attention_call
from .base import Handler, Seam, always


class ForwardSeam(Seam):
    """Replacement of the `forward` of one LDM, sgm or Forge attention module, on the instance."""

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        _, *parameters = inspect.signature(type(attn).forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._names = names or ("x", "context", "mask")  # LDM's if a wrapper hides them
        self._previous: Callable[..., Tensor] | None = None
        self._handler: Handler | None = None
        self._wants: Callable[[], Any] = always

    def install(self, handler: Handler, wants: Callable[[], Any] = always) -> None:
        self._handler, self._wants = handler, wants
        self._previous = self.attn.__dict__.get("forward")
        # a bound method, not a closure, so that a deep copy of the model gets its own seam
        self.attn.forward = self._answer

    def remove(self) -> None:
        """Restore `forward`. A wrapper put on top since then stays, and now wraps a pass-through."""
        self._handler, self._wants = None, always
        if self.attn.__dict__.get("forward") != self._answer:
            return
        if self._previous is None:
            del self.attn.forward
        else:
            self.attn.forward = self._previous

    def project_out(self, x: Tensor) -> Tensor:
        return self.attn.to_out(x)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        handler = self._handler  # None once it was removed, though a reference to this method survives
        wanted = None if handler is None else self._wants()
        if not wanted:
            return self._original(*args, **kwargs)
        return handler(attention_call(self._original, self._names, args, kwargs, wanted))

    def _original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.attn).forward(self.attn, *args, **kwargs)
