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
    """Run one command and return the exit code; `argv` excludes the program name."""
    # set before the libraries that read it are imported: no telemetry is sent, and no model is looked up online
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their warnings are meant for programmers
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from .parser import parse

    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has printed the reason
        return DONE if stop.code is None else int(stop.code)
    if not args.download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return args.run(args) or DONE
    except KeyboardInterrupt:
        _say("interrupted; all files written so far are complete")
        return INTERRUPTED
    except CommandError as error:
        _say(f"error: {error}")
        return error.code
    except Exception as error:  # from a library: its message is enough for most users
        if args.debug:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        _say(f"error: {type(error).__name__}: {first} (--debug shows where)")
        return FAILED


def _say(text: str) -> None:
    print(f"agentsd: {text}", file=sys.stderr)
