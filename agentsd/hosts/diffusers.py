"""U-Nets of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ..schedule import Moment, progress_of_edm, progress_of_flow
from .arguments import attention_call
from .base import Handler, Seam, always

# Processors that compute plain attention, each with a different kernel: diffusers', InvokeAI's, and SD.Next's in slices
_PLAIN_PROCESSORS = {
    *("AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "FusedAttnProcessor2_0", "SlicedAttnProcessor"),
    *("XFormersAttnProcessor", "XLAFlashAttnProcessor2_0", "CustomAttnProcessor2_0", "DynamicAttnProcessorBMM"),
}
# Attributes by which diffusers chooses how processors compute
_SETTINGS = ("_attention_backend", "_parallel_config")


def unet_progress(model: Any, unet: nn.Module) -> Moment | None:
    """Return what the timesteps of a model's U-Net mean; None where they are training steps, as far as it tells."""
    scheduler = getattr(model, "scheduler", None)
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    continuous = (config.get("timestep_type"), config.get("prediction_type")) == ("continuous", "v_prediction")
    if continuous or name.startswith("EDM") or type(unet).__name__ == "UNetSpatioTemporalConditionModel":
        return progress_of_edm
    return progress_of_flow if name.startswith("FlowMatch") or config.get("use_flow_sigmas") else None


class ProcessorSeam(Seam):
    """Replacement of the processor of one diffusers attention module."""

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        self.obstacle = self.obstacle_of(attn)
        self._answered: tuple[Handler, Callable[[], Any]] | None = None
        self._processor: Processor | None = None

    def install(self, handler: Handler, wants: Callable[[], Any] = always) -> None:
        self._answered = handler, wants
        self.refresh()

    def refresh(self) -> None:
        if self._answered is None or self.attn.processor is self._processor:
            return
        self.obstacle = self.obstacle_of(self.attn)
        if self.obstacle:
            return
        self._retire()
        self._processor = self.wrap(host_processor(self.attn), *self._answered)
        self.attn.set_processor(self._processor)

    def remove(self) -> None:
        """Restore the processor, unless another one has been set since."""
        self._answered = None
        processor = self._processor
        self._retire()
        if processor is not None and self.attn.processor is processor:
            self.attn.set_processor(processor.previous)

    def obstacle_of(self, attn: Any) -> str:
        """Say why the calls of an attention can't be answered; empty if they can."""
        # __class__ instead of type(): an active processor of ours reports the one underneath
        processor = host_processor(attn)
        if isinstance(processor, nn.Module) or processor.__class__.__name__ not in _PLAIN_PROCESSORS:
            return f"its attention processor is {processor.__class__.__name__}"
        for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
            if getattr(attn, name, None) is not None:
                return f"its attention has {name}"
        if getattr(attn, "residual_connection", False) or getattr(attn, "rescale_output_factor", 1) != 1:
            return "its attention rescales its output"
        return ""

    def wrap(self, previous: Callable[..., Tensor], handler: Handler, wants: Callable[[], Any]) -> Processor:
        return around(Processor, previous, handler, wants)

    def _retire(self) -> None:
        """Let our processor pass calls on: others may keep it."""
        if self._processor is not None:
            self._processor.handler, self._processor = None, None

    def project_out(self, x: Tensor) -> Tensor:
        for module in self.attn.to_out:
            x = module(x)
        return x


class Processor:
    """A diffusers attention processor that asks a handler first.

    It presents the class and the call signature of the processor underneath: diffusers decides by the class (and
    creates a new instance of it when an IP-Adapter is loaded), and passes only the arguments that `__call__` names.
    Made by `around`, in a class of its own for each signature: torch.compile follows calls that a class defines.
    """

    _NAMES = ("hidden_states", "encoder_hidden_states", "attention_mask", "temb")
    _kind: type[Processor]
    previous: Any

    def __init__(self, previous: Callable[..., Tensor], handler: Handler | None, wants: Callable[[], Any]) -> None:
        self.previous, self.handler, self.wants = previous, handler, wants

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "previous"}
        return around, (self._kind, self.previous, None, always), state

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.previous.__class__

    def answer(self, attn: nn.Module, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Answer a call of self-attention."""
        handler, previous = self.handler, self.previous  # another thread may remove it meanwhile
        wanted = None if handler is None else self.wants()
        if not wanted:
            return previous(attn, hidden_states, *args, **kwargs)
        return handler(attention_call(partial(previous, attn), self._NAMES, (hidden_states, *args), kwargs, wanted))


def around(kind: type[Processor], previous: Any, handler: Handler | None, wants: Callable[[], Any]) -> Processor:
    return _processor_like(kind, type(previous))(previous, handler, wants)  # type: ignore[arg-type]


def _forwarded(name: str) -> property:
    return property(lambda self: getattr(self.previous, name), lambda self, value: setattr(self.previous, name, value))


@cache
def _processor_like(kind: type[Processor], cls: type) -> type[Processor]:
    """Make a subclass of `kind` whose calls have the signature of `cls`."""

    def call(self: Processor, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.answer(attn, hidden_states, args, kwargs)

    # not by functools.wraps, which the compiler does not follow; and it asks for the number of defaults
    call.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]
    call.__defaults__ = ()
    settings = {name: _forwarded(name) for name in _SETTINGS if hasattr(cls, name)}
    return type(kind.__name__, (kind,), {"__call__": call, "_kind": kind, **settings})


def host_processor(attn: Any) -> Any:
    """Return an attention's processor, skipping ours that were removed but are still referenced by others."""
    processor = attn.processor
    while issubclass(type(processor), Processor) and processor.handler is None:
        processor = processor.previous
    return processor
