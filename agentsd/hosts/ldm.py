"""U-Nets of LDM and its descendants: sgm (SDXL), Forge and reForge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .arguments import is_set, named
from .base import Call, Handler, Seam, always


def stages(unet: Any) -> Iterator[tuple[str, int]]:
    """Yield (name, downsample) of each stage of the U-Net; nothing if its layout is another family's."""

    def factor(stage: nn.Module, resampler: str) -> int:
        return 2 if any(type(module).__name__ == resampler for module in stage.modules()) else 1

    if not hasattr(unet, "input_blocks"):
        return
    d = 1
    for i, stage in enumerate(unet.input_blocks):
        d *= factor(stage, "Downsample")
        yield f"input_blocks.{i}", d
    yield "middle_block", d
    for i, stage in enumerate(getattr(unet, "output_blocks", ())):  # a ControlNet has none
        yield f"output_blocks.{i}", d
        d //= factor(stage, "Upsample")


class ForwardSeam(Seam):
    """Replacement of the `forward` of one LDM, sgm or Forge attention module, on the instance."""

    # Arguments that do not affect attention itself: Forge's transformer_options carries patches that its block applies
    # around attn1.
    _HARMLESS = ("transformer_options",)

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        _, *parameters = inspect.signature(type(attn).forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._names = names or ("x", "context", "mask")  # LDM's if a wrapper hides them
        self._previous: Callable[..., Tensor] | None = None
        self._forward: Callable[..., Tensor] | None = None
        self._handler: Handler | None = None
        self._wants: Callable[[], Any] = always

    def install(self, handler: Handler, wants: Callable[[], Any] = always) -> None:
        self._handler, self._wants = handler, wants
        self._previous = self.attn.__dict__.get("forward")
        # a bound method, not a closure, so that a deep copy of the model gets its own seam
        self._forward = self.attn.forward = self._answer

    def remove(self) -> None:
        """Restore `forward`. A wrapper put on top since then stays, and now wraps a pass-through."""
        forward, self._forward, self._handler, self._wants = self._forward, None, None, always
        if forward is None or self.attn.__dict__.get("forward") != forward:  # equal, not identical, in a deep copy
            return
        if self._previous is None:
            del self.attn.forward
        else:
            self.attn.forward = self._previous

    def project_out(self, x: Tensor) -> Tensor:
        return self.attn.to_out(x)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        # without a handler it was removed, but a reference to this method survives
        wanted = None if self._handler is None else self._wants()
        return self._handler(self._read(args, kwargs, wanted)) if wanted else self._original(*args, **kwargs)

    def _original(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.attn).forward(self.attn, *args, **kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> Call:
        if len(args) == 1 and all(value is None for value in kwargs.values()):  # nearly every call
            return Call(args[0], None, None, {}, lambda x=args[0]: self._original(x, **kwargs), wanted)
        arguments = named(self._names, args, kwargs)
        x, context, mask = (arguments.pop(name, None) for name in (self._names[0], "context", "mask"))
        value = arguments.pop("value", None)
        # Forge and reForge pass context and value whenever an attn1_patch is active; it is self-attention all the same
        plain = value is None or value is x or value is context
        sources = {name: tensor for name, tensor in (("context", context), ("value", value)) if tensor is not None}

        def proceed(tokens: Tensor | None = None) -> Tensor:
            if tokens is None:
                return self._original(*args, **kwargs)
            return self._original(tokens, **dict.fromkeys(sources, tokens), **arguments)

        extras = {} if plain else {"value": value}
        extras |= {name: v for name, v in arguments.items() if name not in self._HARMLESS and is_set(v)}
        return Call(x, context, mask, extras, proceed, wanted)
