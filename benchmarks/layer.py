"""Time of one self-attention layer (SD 1.5's first level: 8 heads of 40) over the number of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from agentsd.attention import add_scaled, agent_attention, join_heads, pool_tokens, split_heads
from agentsd.config import AgentConfig, plan_layer
from agentsd.merging import match, partition

WIDTH, HEADS, BATCH = 320, 8, 2
# images of 256², 512², 768², 1024², 1536² and 2048²
TOKENS = (1024, 4096, 9216, 16384, 36864, 65536)
ROUNDS = 5

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """The four projections of a self-attention."""

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
        part = partition(side, side, 4, 4, 0).to(q.device)
        return _agents(q, k, v, match(q, part, 0, plan.agent_r).agents.merge(q))

    return step


def steps(side: int) -> dict[str, Step]:
    """What is compared, by label."""
    return {
        "SDPA": _sdpa,
        "limit": _limit,
        "naive": _naive,
        "grid agents, 8 × 8 cells": _grid(side, agent_ratio=1 - 1 / 64),
        "grid agents, 4 × 4 cells": _grid(side, agent_ratio=1 - 1 / 16),
        "grid agents, at most 64": _grid(side, agent_ratio=1 - 1 / 64, max_agents=64),
        "similarity agents, .95": _similarity(side),
        "keys and values pooled 2 × 2": _pool(side),
    }


def measure_layer(machine: Any, dtype: torch.dtype, tokens: list[int], patience: float) -> list[dict[str, Any]]:
    """Median seconds of each method for each number of tokens; `patience` is for a whole point of one method."""
    layer = Layer().to(machine.device, dtype)
    rows: list[dict[str, Any]] = []
    last: dict[str, tuple[int, float]] = {}
    for n in tqdm(sorted(tokens), desc="one layer", unit="size"):
        side = round(n**0.5)
        x = torch.randn(BATCH, side * side, WIDTH, device=machine.device).to(dtype)
        for label, step in steps(side).items():
            n_last, t_last = last.get(label, (n, 0.0))
            expected = t_last * (side * side / n_last) ** 2
            scores = 2 * BATCH * HEADS * side**4 * dtype.itemsize if label == "naive" else 0
            if expected > patience / 4 or scores > 0.5 * machine.available_memory():
                machine.skipped.append({"case": f"one layer, {n} tokens", "method": label, "reason": "out of reach"})
                continue
            times = _times(lambda step=step, x=x: layer(x, step), machine, 1 if expected > patience / 20 else ROUNDS)
            last[label] = side * side, median(times)
            rows.append({"tokens": side * side, "label": label, "seconds": median(times), "times": times})
    return rows


def _times(run: Callable[[], Any], machine: Any, rounds: int) -> list[float]:
    times = []
    with torch.inference_mode():
        for _ in range(rounds + (rounds > 1)):
            machine.sync()
            start = time.perf_counter()
            run()
            machine.sync()
            times.append(time.perf_counter() - start)
    return times[1:] if rounds > 1 else times  # the first is a warm-up
