"""What torch.compile makes of the patch's hooks, without importing the compiler for users who never compile.

A hook that the compiler can follow (`followed`) becomes part of the host's graph: it tells by `compiling` that it is
being traced, counts nothing then, and takes what was planned for constants. What cannot be traced is
`not_compiled`: the graph breaks there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_COMPILER = "torch._dynamo"  # loaded on first use
# Compilers before 2.9 guard on what hooks keep, and would compile every call anew.
FOLLOWS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)

# Whether torch.compile is tracing the caller into a graph; PyTorch 2.1 cannot tell, and is not.
compiling: Callable[[], bool] = getattr(torch.compiler, "is_dynamo_compiling", bool)


def compiler_loaded() -> bool:
    """Whether anything may be compiled."""
    return FOLLOWS and _COMPILER in sys.modules


def followed(function: F) -> F:
    """Decorator: a hook that the compiler may trace; older ones are kept out of it."""
    return function if FOLLOWS else not_compiled(function)


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
            keep_out()
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # the compiler checks this before it traces into a function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@not_compiled
def _any() -> None:
    pass


def keep_out() -> None:
    """Keep the compiler from compiling the frames of what is `not_compiled` by themselves.

    It would do that behind a broken graph, and where the whole call has to be one graph it would fail there.
    """
    try:  # without the compiler's modules, where this PyTorch can
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(_any.__code__, skip)  # all of them are one piece of code
    except (AttributeError, TypeError):
        if _COMPILER in sys.modules:
            sys.modules[_COMPILER].decorators.skip(_any)


keep_out._torchdynamo_disable = True  # type: ignore[attr-defined]
