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

# family, head size, tokens of text
SHAPES = {
    "SD 3 medium": ("SD3Transformer2DModel", 64, 333),
    "Flux": ("FluxTransformer2DModel", 128, 512),
}
HEADS, SIDES, EXACT = 24, (64, 96, 128), (0.14, 0.0)
SETTINGS = {"method": "corrected", "agent_ratio": 0.95}


def attention_call(
    family: str, tokens: int, text: int, heads: int, head: int, dtype: torch.dtype, device: str
) -> JointCall:
    """A call of one attention, as the processor makes it from a transformer's."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, heads, tokens + text, head)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return JointCall(FAMILIES[family], F.scaled_dot_product_attention, q, k, v, {})


def answer(call: JointCall, grid: Grid, exact: float) -> tuple[Callable[[], Tensor], LayerPlan]:
    """What the patch does in place of a call, and its plan."""
    config = AgentConfig(**SETTINGS, exact_ratio=exact)
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
def measure(name: str, side: int, dtype: str, heads: int, rounds: int, device: str) -> list[str]:
    """A row of the table for one shape at one size."""
    family, head, text = SHAPES[name]
    grid = Grid(side, side)
    call = attention_call(family, grid.tokens, text, heads, head, DTYPES[dtype], device)
    runs = {"sdpa": call.proceed}
    shares = []
    for exact in EXACT:
        runs[f"{exact}"], plan = answer(call, grid, exact)
        shares.append(f"{share_left(plan, text):.2f}")
    for run in runs.values():
        seconds(run)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for key in random.sample(list(runs), len(runs)):
            taken[key].append(seconds(runs[key]))
    ratios = [median(a / b for a, b in zip(taken[f"{exact}"], taken["sdpa"], strict=True)) for exact in EXACT]
    whole = median(taken["sdpa"]) * HEADS / heads
    return [
        name,
        f"{grid.tokens:,}",
        dtype,
        f"{whole:.2f}",
        *(f"{r:.2f} ({c})" for r, c in zip(ratios, shares, strict=True)),
    ]


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
    print(f"{where}, PyTorch {torch.__version__}, {args.heads} of {HEADS} heads, {args.rounds} rounds\n")
    head = ["shape", "image tokens", "dtype", "SDPA, s", *(f"exact_ratio {exact} over SDPA (FLOPs)" for exact in EXACT)]
    rows = []
    for name in SHAPES:
        for dtype in args.dtypes:
            rows += [measure(name, side, dtype, args.heads, args.rounds, device) for side in args.sides]
            print(*rows[-len(args.sides) :], sep="\n", flush=True)
    print(*table(head, rows), sep="\n")


if __name__ == "__main__":
    main()
