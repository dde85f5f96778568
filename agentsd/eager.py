"""Keep functions out of torch.compile without importing the compiler for users who never compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_COMPILER = "torch._dynamo"


def not_compiled(function: F) -> F:
    """Decorator: make torch.compile break its graph at calls of `function`, and compile nothing inside.

    Like `torch.compiler.disable`, but without loading the compiler at import, which costs a second or two.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:  # nothing can be compiled
            return function(*args, **kwargs)
        if not disabled:
            _skip(call)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # the compiler checks this before it traces into a function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _skip(function: Callable[..., Any]) -> None:
    """Keep the compiler from compiling the frame of `function` by itself, which it does behind a broken graph."""
    try:
        from torch._dynamo.decorators import skip
    except ImportError:
        return
    skip(function)


_skip._torchdynamo_disable = True  # type: ignore[attr-defined]
