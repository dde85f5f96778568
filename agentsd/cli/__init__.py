"""The command line: generate, compare, sweep, info and demo.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import CommandError

__all__ = ["CommandError", "main"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name. Returns the exit code."""
    # before anything imports the libraries that would ask: nothing is sent, and no model is looked up on line
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their advice is for programmers
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from .parser import parse

    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has said why
        return DONE if stop.code is None else int(stop.code)
    if not args.download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return args.run(args) or DONE
    except KeyboardInterrupt:
        _say("interrupted; the files that were written are whole")
        return INTERRUPTED
    except CommandError as error:
        _say(f"error: {error}")
        return error.code
    except Exception as error:  # a library's: its message is all that most people need
        if args.debug:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _say(f"error: {type(error).__name__}: {first} (--debug shows where)")
        return FAILED


def _say(text: str) -> None:
    print(f"agentsd: {text}", file=sys.stderr)
