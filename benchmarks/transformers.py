"""Seconds of one attention of a transformer over text and image, and over SDPA's: `python -m benchmarks.transformers`.

Queries, keys and values are random, in the shapes of SD 3 medium (heads of 64, 333 tokens of text) and Flux (heads of
128, 512 tokens of text); what is timed is what the patch does in place of `F.scaled_dot_product_attention`. Heads are
independent, so a few of the 24 stand for all. Each round calls everything once, in random order; ratios are medians
over rounds of the ratio within a round. No transformer is run, and nothing is said about pictures.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from agentsd import AgentConfig
from agentsd.attention.grid import Grid
from agentsd.hosts import FAMILIES, JointCall
from agentsd.methods import LayerPlan, method_named
from agentsd.patching.call import Planned
from agentsd.patching.joint import JointAnswerer, share_left

from .machine import DTYPES, choose_device, processor
from .results import table

# family, head size, tokens of text, whether tokens stand before heads in memory
SHAPES = {
    "SD 3 medium": ("SD3Transformer2DModel", 64, 333, False),
    "Flux": ("FluxTransformer2DModel", 128, 512, True),
}
HEADS, SIDES = 24, (64, 96, 128)
SETTINGS = {
    f"{exact}, {side}×{side}": AgentConfig(method="corrected", agent_ratio=1 - 1 / side**2, exact_ratio=exact)
    for exact in (0.14, 0.0)
    for side in (4, 8)
}


def attention_call(name: str, tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> JointCall:
    """A call of one attention, as the processor makes it from a transformer's."""
    family, head, text, by_tokens = SHAPES[name]
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(3, 1, tokens + text, heads, head, generator=generator).to(device, dtype).transpose(2, 3)
    q, k, v = qkv if by_tokens else qkv.contiguous()
    return JointCall(FAMILIES[family], F.scaled_dot_product_attention, q, k, v, {})


def answer(call: JointCall, grid: Grid, config: AgentConfig) -> tuple[Callable[[], Tensor], LayerPlan]:
    """What the patch does in place of a call, and its plan."""
    plan = method_named(config.method).plan(config, *grid, 0)
    planned = Planned(config, plan, grid)
    return lambda: JointAnswerer().answer(None, call, planned, None), plan


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    out = run()
    if out.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, side: int, dtype: str, heads: int, rounds: int, device: torch.device) -> list[str]:
    """A row of the table for one shape at one size."""
    grid = Grid(side, side)
    call = attention_call(name, grid.tokens, heads, DTYPES[dtype], device)
    runs, shares = {"sdpa": call.proceed}, {}
    for key, config in SETTINGS.items():
        runs[key], plan = answer(call, grid, config)
        shares[key] = share_left(plan, SHAPES[name][2])
    for run in runs.values():
        seconds(run)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for key in random.sample(list(runs), len(runs)):
            taken[key].append(seconds(runs[key]))
    ratios = {key: median(a / b for a, b in zip(taken[key], taken["sdpa"], strict=True)) for key in SETTINGS}
    whole = median(taken["sdpa"]) * HEADS / heads
    cells = [f"{ratios[key]:.2f} ({shares[key]:.2f})" for key in SETTINGS]
    return [name, f"{grid.tokens:,}", dtype, f"{whole:.2f}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4, help="heads to compute, of 24")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="sides of the image in tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = choose_device(args.device)
    random.seed(0)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print("Seconds over SDPA's (FLOPs over its), by exact_ratio and cells;", end=" ")
    print(f"{where}, PyTorch {torch.__version__}, {args.heads} of {HEADS} heads, {args.rounds} rounds\n")
    head = ["shape", "image tokens", "dtype", "SDPA, s", *SETTINGS]
    rows = []
    for name in SHAPES:
        for dtype in args.dtypes:
            rows += [measure(name, side, dtype, args.heads, args.rounds, device) for side in args.sides]
            print(*rows[-len(args.sides) :], sep="\n", flush=True)
    print(*table(head, rows), sep="\n")


if __name__ == "__main__":
    main()
