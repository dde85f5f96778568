"""Failures reported in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A command failed; the message is a sentence."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def told(text: str, *errors: type[Exception], hint: str = "") -> Iterator[None]:
    """Turn errors into a CommandError: the text, and the first line of what they say."""
    try:
        yield
    except errors as error:
        raise CommandError(f"{text}: {getattr(error, 'strerror', None) or first_line(error)}{hint}") from error
