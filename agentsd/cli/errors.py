"""Failures reported in one sentence."""


class CommandError(Exception):
    """A command failed; the message is a sentence."""
