"""The machine that a benchmark runs on, its clock, and the time that is left."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

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

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def seconds(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call of `run`: by CUDA's events, or by the wall clock elsewhere."""
        self.sync()
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            self.sync()
            return begin.elapsed_time(end) / 1e3 / calls
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.sync()
        return (time.perf_counter() - start) / calls

    def describe(self) -> dict[str, Any]:
        """All that must be the same in two runs for their rounds to count together."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "code": _digest(),
        }


def parser_for(module: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser of the command line of `python -m module`."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, epilog=epilog, formatter_class=formatter
    )


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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
