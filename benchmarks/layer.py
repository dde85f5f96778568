"""Time of one self-attention layer over the number of tokens; the layer is SD 1.5's at its first level."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from agentsd.attention.agent import agent_attention
from agentsd.attention.merging import match, partition
from agentsd.attention.tensors import add_scaled, join_heads, pool_tokens, split_heads
from agentsd.config import AgentConfig
from agentsd.plan import plan_layer

WIDTH, HEADS, BATCH = 320, 8, 2
# images of 256×256, 512×512, 768×768, 1024×1024 and 2048×2048
TOKENS = (1024, 4096, 9216, 16384, 65536)
# (most tokens, rounds): a call of the smallest layer takes less than a millisecond, one of the largest minutes.
ROUNDS = ((1500, 200), (10_000, 5), (2**31, 1))

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """The four projections of a self-attention, around a step in between."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.to_out(step(self.to_q(x), self.to_k(x), self.to_v(x)))


def _heads(*tensors: Tensor) -> list[Tensor]:
    return [split_heads(t, HEADS) for t in tensors]


def _limit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return join_heads(F.scaled_dot_product_attention(*_heads(q, k, v)))


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads(q, k, v)
    return join_heads((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v)


def _agents(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    q, k, v, a = _heads(q, k, v, a)
    return join_heads(add_scaled(agent_attention(q, k, v, a, k_scale2=0.3), v, 0.075))


def _grid(side: int, **settings: Any) -> Step:
    cell = plan_layer(AgentConfig(ratio=0.0, agent_source="grid", **settings), side, side, 1).cell
    return lambda q, k, v: _agents(q, k, v, pool_tokens(q, side, side, cell))


def _pool(side: int) -> Step:
    return lambda q, k, v: _sdpa(q, *(pool_tokens(t, side, side, (2, 2)) for t in (k, v)))


def _similarity(side: int) -> Step:
    plan = plan_layer(AgentConfig(ratio=0.0), side, side, 1)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cells = partition(side, side, 4, 4, 0).to(q.device)
        return _agents(q, k, v, match(q, cells, 0, plan.agent_r).agents.merge(q))

    return step


def steps(side: int) -> dict[str, Step]:
    """The methods that are compared, by label."""
    return {
        "SDPA": _sdpa,
        "limit": _limit,
        "naive": _naive,
        "grid agents, 8×8 cells": _grid(side, agent_ratio=1 - 1 / 64),
        "grid agents, 4×4 cells": _grid(side, agent_ratio=1 - 1 / 16),
        "grid agents, at most 64": _grid(side, agent_ratio=1 - 1 / 64, max_agents=64),
        "similarity agents, .95": _similarity(side),
        "keys and values pooled 2×2": _pool(side),
    }


def measure_layer(machine: Any, dtype: torch.dtype, tokens: list[int], patience: float) -> list[dict[str, Any]]:
    """Median seconds of each method for each number of tokens; a method is skipped where it would take patience / 8."""
    layer = Layer().to(machine.device, dtype)
    rows: list[dict[str, Any]] = []
    last: dict[str, dict[str, Any]] = {}
    for n in tqdm(sorted(tokens), desc="one layer", unit="size"):
        side = round(n**0.5)
        x = torch.randn(BATCH, side * side, WIDTH, device=machine.device).to(dtype)
        active = {}
        for label, step in steps(side).items():
            reason = _out_of_reach(label, side * side, dtype, last.get(label), machine, patience / 8)
            if reason:
                machine.skip(f"one layer, {side * side} tokens", label, reason)
            else:
                active[label] = step
        times = _interleaved(layer, x, active, machine, next(count for most, count in ROUNDS if n <= most))
        for label, seconds in times.items():
            last[label] = {"tokens": side * side, "label": label, "seconds": median(seconds), "times": seconds}
            rows.append(last[label])
        _captured(rows, side * side)
    return rows


def _out_of_reach(
    label: str, tokens: int, dtype: torch.dtype, last: dict[str, Any] | None, machine: Any, patience: float
) -> str:
    expected = last["seconds"] * (tokens / last["tokens"]) ** 2 if last else 0.0
    scores = 2 * BATCH * HEADS * tokens**2 * dtype.itemsize if label == "naive" else 0
    if scores > 0.3 * machine.available_memory():
        return f"needs {scores / 2**30:.0f} GiB for its scores"
    return f"would take up to {expected:.0f} s per call" if expected > patience else ""


def _interleaved(layer: Layer, x: Tensor, active: dict[str, Step], machine: Any, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {label: [] for label in active}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for label, step in active.items():
                machine.sync()
                start = time.perf_counter()
                layer(x, step)
                machine.sync()
                times[label].append(time.perf_counter() - start)
    return {label: seconds[1:] for label, seconds in times.items()}  # the first is a warm-up


def _captured(rows: list[dict[str, Any]], tokens: int) -> None:
    """Add the median over the rounds of (t_sdpa − t) / (t_sdpa − t_limit) to each row."""
    by_label = {row["label"]: row for row in rows if row["tokens"] == tokens}
    if "SDPA" not in by_label:
        return
    for row in by_label.values():
        rounds = zip(by_label["SDPA"]["times"], row["times"], by_label["limit"]["times"], strict=True)
        row["captured"] = median((sdpa - t) / (sdpa - limit) for sdpa, t, limit in rounds)
