"""The command line: generate, compare, sweep, tune, info, demo and playground.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import CommandError, first_line

__all__ = ["CommandError", "main"]

DONE, FAILED, INTERRUPTED = 0, 1, 130
# What the extras of the package bring, and the package alone does not
_EXTRAS = {"PIL", "accelerate", "diffusers", "numpy", "safetensors", "tqdm", "transformers"}
_EXTRAS |= {"fastapi", "gradio", "starlette", "uvicorn"}


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
        from . import commands

        getattr(commands, args.command)(args)
        return DONE
    except KeyboardInterrupt:
        print("agentsd: interrupted; all files written so far are complete", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        told = str(error)  # a sentence, if it is of ours
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in _EXTRAS:
            extra = "playground" if args.command == "playground" else "diffusers"
            told = f"{args.command} needs {error.name}: pip install 'agentsd[{extra}]' brings it"
        elif not type(error).__module__.startswith("agentsd."):
            told = f"{type(error).__name__}: {first_line(error)} (--debug shows where)"
        print(f"agentsd: error: {told}", file=sys.stderr)
    return FAILED
