"""Reading the arguments and outputs of hosts' modules, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Call

# Names that hosts give the argument with an image-shaped tensor (B, C, height, width), tokens (B, N, C), the timestep
_IMAGES, _TOKENS = ("x", "sample", "hidden_states"), ("x", "hidden_states")
# and those from which keys and values are projected
_TIMESTEPS, _SOURCES = ("timesteps", "t", "timestep"), ("context", "encoder_hidden_states", "value")


def is_set(value: Any) -> bool:
    """Whether an argument can change the result: it is neither None, empty, zero nor False."""
    # bool of a tensor would wait for the device, or raise
    return bool(value) if isinstance(value, (bool, int, float, str, dict, list, tuple)) else value is not None


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Map the arguments of a call to names, given the names of the positional ones."""
    more = {f"argument {i}": value for i, value in enumerate(args[len(names) :])}
    return {**dict(zip(names, args, strict=False)), **kwargs, **more}


def attention_call(
    original: Callable[..., Tensor], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any
) -> Call:
    """Read a call of self-attention, which `original` makes; `names` are those of its arguments, the tokens' first."""
    if len(args) == 1 and all(value is None for value in kwargs.values()):  # nearly every call
        return Call(args[0], None, None, {}, lambda x=args[0]: original(x, **kwargs), wanted)
    arguments = named(names, args, kwargs)
    x, masks = arguments.pop(names[0]), [arguments.pop(name, None) for name in ("mask", "attention_mask")]
    mask = next((each for each in masks if each is not None), None)
    sources = {name: arguments.pop(name) for name in _SOURCES if arguments.get(name) is not None}
    context, value = sources.get("context", sources.get("encoder_hidden_states")), sources.get("value")

    def proceed(tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            return original(*args, **kwargs)
        return original(tokens, **dict.fromkeys(sources, tokens), **arguments)

    # Forge's options are patches that its block applies around attn1
    extras = {name: v for name, v in arguments.items() if name != "transformer_options" and is_set(v)}
    # Forge and reForge pass context and value whenever an attn1_patch is active; it is self-attention all the same
    if value is not None and value is not x and value is not context:
        extras["value"] = value
    return Call(x, context, mask, extras, proceed, wanted)


def output_tensor(output: Any) -> Tensor:
    """Extract the tensor from a model's output: bare or first in it; of a ControlNet, the last; of a list, all."""
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output[0], Tensor) else output[-1]
    return torch.stack(found) if isinstance(found, list) else found


def _find(place: int, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[place] if len(args) > place else next((kwargs[name] for name in names if name in kwargs), None)


def read_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Read the tokens (B, N, C) from a block's arguments."""
    return _find(0, _TOKENS, args, kwargs)


def find_timestep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Find the timesteps among a U-Net's arguments, unread; None if there are none."""
    return _find(1, _TIMESTEPS, args, kwargs)


def read_timestep(t: Any) -> float | None:
    """Read the largest timestep of a batch; None if there is none. Waits for the device."""
    if isinstance(t, Tensor):
        return float(t.detach().max()) if t.numel() else None
    return float(t) if isinstance(t, (int, float)) else None


def read_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read (height, width) off the image (B, C, height, width), or video of five dimensions, among the arguments."""
    x = _find(0, _IMAGES, args, kwargs)
    shape: Any = x.shape if isinstance(x, Tensor) else ()
    return (shape[-2], shape[-1]) if len(shape) in (4, 5) else None
