"""Failures reported in one sentence."""

from __future__ import annotations


class CommandError(Exception):
    """A command failed. The message is a sentence; `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
