"""The machine that a benchmark runs on, its clock, and the time that is left."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from agentsd.clock import now

ROOT = Path(__file__).resolve().parents[1]
PAGE, DATA = ROOT / "docs/measurements.md", ROOT / "docs/measurements"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The code that the figures depend on; the rest of the repository may change between two runs.
_MEASURED = (
    *("agentsd/*.py", "agentsd/attention/*.py", "agentsd/methods/*.py", "agentsd/hosts/*.py", "agentsd/patching/*.py"),
    *("benchmarks/methods.py", "benchmarks/models.py"),
)


@dataclass
class Machine:
    """A device, and the time that is left on it."""

    device: torch.device
    skipped: list[dict[str, str]] = field(default_factory=list)  # what was left out, and why
    deadline: float = math.inf  # in seconds of `time.monotonic`

    def time_left(self) -> float:
        """Seconds until the program has to end."""
        return self.deadline - time.monotonic()

    def skip(self, case: str, method: str, reason: str) -> None:
        """Record that a method is left out, and say so."""
        self.skipped[:] = [s for s in self.skipped if (s["case"], s["method"]) != (case, method)]
        self.skipped.append({"case": case, "method": method, "reason": reason})
        tqdm.write(f"skipped: {method} at {case}: {reason}")

    def seconds(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call of `run`: by CUDA's events, or by the wall clock elsewhere."""
        start = now(self.device)
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / calls
        for _ in range(calls):
            run()
        return (now(self.device) - start) / calls

    def describe(self) -> dict[str, Any]:
        """All that must be the same in two runs for their rounds to count together."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "code": _digest(),
        }


def in_turn(runs: Mapping[Any, Callable[[], Any]], rounds: int, machine: Machine) -> dict[Any, list[float]]:
    """Seconds of each of `runs` in interleaved rounds of random order, after a first call of each."""
    taken: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in range(rounds):
        for name in random.Random(number).sample(list(runs), len(runs)):
            taken[name].append(machine.seconds(runs[name]))
    return taken


def relative(taken: Mapping[Any, list[float]], base: Any) -> dict[Any, float]:
    """Medians of the seconds over those of `base` in the same round."""
    return {name: median(a / b for a, b in zip(each, taken[base], strict=True)) for name, each in taken.items()}


def parser_for(module: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser of the command line of `python -m module`."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, epilog=epilog, formatter_class=formatter
    )


def parser_of_rows(module: str, description: str | None, out: str) -> argparse.ArgumentParser:
    """That of a program which adds what is missing in `out`; `more()` of its options tells whether there is time."""
    parser = parser_for(module, description)
    add = parser.add_argument
    add("--out", type=Path, help=f"place of the results ({out}, or one in out/ with --quick)")
    add("--quick", action="store_true", help="a small part, into out/")
    add("--again", nargs="+", default=[], metavar="NAME", help="measure these anew")
    add("--minutes", type=_until, dest="more", default="inf", help="begin nothing new after so many minutes")
    return parser


def _until(minutes: str) -> Callable[[], bool]:
    end = time.monotonic() + 60 * float(minutes)
    return lambda: time.monotonic() < end


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" stands for the first of CUDA, MPS and CPU that there is."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _digest() -> str:
    """Identify the state of the measured code."""
    files = sorted(file for pattern in _MEASURED for file in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
