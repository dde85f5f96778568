"""Keeping functions out of torch.compile, without importing the compiler for those who never use it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_COMPILER = "torch._dynamo"


def not_compiled(function: F) -> F:
    """Function decorator: torch.compile breaks its graph at calls of it, and compiles nothing inside.

    It does what `torch.compiler.disable` does, which loads the compiler: a second or two at every start.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:  # then nothing is compiled
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # what the compiler looks for before it follows a call into a function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
