"""What it costs to say how close a run was: time of U-Net calls in which closeness is observed, beside others.

    python -m benchmarks.closeness              # alone on the machine, about five minutes on two cores
    python -m benchmarks.closeness --pairs 3    # a rough look

Pairs of patched calls, one observed and one not, in changing order; medians and quartiles of the ratios. One call in
`agentsd.patching.closeness.EVERY` is observed, so a run takes that part of the extra time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import agentsd
from agentsd import AgentConfig, embedded
from agentsd.clock import timed
from agentsd.hosts import example_call
from agentsd.patching.closeness import EVERY
from agentsd.settings import check, to_config
from agentsd.settings.presets import PRESETS

from .cases import DTYPES
from .machine import choose_device
from .models import LAYOUTS, build

ROWS = 2  # cond and uncond


@dataclass(frozen=True)
class Case:
    """A model at a size.

    Attributes:
        label: what it is.
        model: its name; "embedded", or one of `LAYOUTS`.
        size: (height, width) of the latent.
        dtype: name of its dtype.
        share: of the pairs that were asked for, how many times as many to make: short calls vary more.
    """

    label: str
    model: str
    size: tuple[int, int]
    dtype: str
    share: int = 1


CASES = (
    Case("SD 1.5, 512×512, bfloat16", "sd15", (64, 64), "bfloat16"),
    Case("SD 1.5, 256×256, bfloat16", "sd15", (32, 32), "bfloat16", 4),
    Case("embedded model, 64×64, float32", "embedded", (64, 64), "float32", 8),
)


def config_of(preset: str) -> AgentConfig:
    """The config of a preset, in all layers that it has, however small."""
    return to_config(check({"enabled": True, **PRESETS[preset], "min_tokens": 0}))


def extra(call: Callable[[], Any], patch: agentsd.Patch, device: torch.device, pairs: int) -> list[float]:
    """Share of a call's time that observing it adds, for each pair of calls."""
    found = []
    for i in range(pairs + 1):
        seconds = {}
        for on in (True, False) if i % 2 else (False, True):
            patch.observe_closeness = on  # the first call after this is observed
            _, seconds[on] = timed(call, device)
        found.append(seconds[True] / seconds[False] - 1)
    return found[1:]  # the first is a warm-up


def rows(case: Case, presets: list[str], pairs: int, device: torch.device) -> list[str]:
    """Lines of the table: a case under each preset."""
    dtype, lines = DTYPES[case.dtype], []
    unet: nn.Module = embedded.load().unet if case.model == "embedded" else build(LAYOUTS[case.model], device, dtype)
    made = example_call(unet.to(device, dtype), *case.size, 0.3, ROWS)
    for preset in tqdm(presets, desc=case.label, leave=False):
        patch = agentsd.patch_unet(unet, config_of(preset))
        with torch.inference_mode():
            shares = extra(lambda: unet(*made.args, **made.kwargs), patch, device, case.share * pairs)
        assert not patch.notes, patch.notes
        patch.remove()
        low, _, high = quantiles(shares, n=4)
        cells = f"{median(shares):+.1%} ({low:+.1%} to {high:+.1%}) | {median(shares) / EVERY:+.2%} | {len(shares)}"
        lines.append(f"| {case.label} | {preset} | {cells} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closeness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=12, help="pairs of SD 1.5's calls at 512×512 (default 12)")
    parser.add_argument("--presets", nargs="+", choices=("Faithful", "Fast"), default=["Faithful", "Fast"])
    options = parser.parse_args(arguments)
    device = choose_device("auto")
    print(f"PyTorch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    print("| model | preset | an observed call | of a run | pairs |\n|---|---|---|---|---|")
    for case in CASES:
        for line in rows(case, options.presets, options.pairs, device):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
