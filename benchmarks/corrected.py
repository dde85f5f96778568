"""Error of corrected agents in single self-attentions, on real calls of the embedded model.

Writes two tables. The first is an ablation: the relative error of attention's output at level 0 over the timestep, for
every choice in the method and for its rivals. The second looks for spikes: calls of all layers, at random timesteps,
prompts, sizes, cells and dtypes, compared with pooling over the same cells. Both use the patch's cells.

    python -m benchmarks.corrected                    # docs/fidelity/corrected.md
    python -m benchmarks.corrected --forwards 20      # a quick look
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from agentsd import AgentConfig, plan_layer
from agentsd.attention.agent import agent_attention
from agentsd.attention.fit import MU, fit_tikhonov, fit_values
from agentsd.attention.grid import Grid
from agentsd.attention.tensors import lost_by_pooling, pool_tokens, sample_tokens, split_heads
from agentsd.hosts import Call, find_sites

from .fidelity import TIMESTEPS, covering

# (height, width) of the latents in the second table
SIZES = ((64, 64), (40, 56), (48, 72), (24, 104), (32, 32), (64, 96))
CELLS = (2, 4, 8)
# (fewest, most) tokens of the layers in one row of it
CLASSES = ((16, 64), (65, 256), (257, 1024), (1025, 8192))


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values (B, N, C) of one self-attention, whose tokens form a grid of `height` rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    height: int
    width: int

    def split(self, *tensors: Tensor) -> list[Tensor]:
        return [split_heads(t.float(), self.heads) for t in tensors]

    def sampled(self, x: Tensor, cell: tuple[int, int]) -> Tensor:
        return sample_tokens(x, self.height, self.width, cell)

    def pooled(self, x: Tensor, cell: tuple[int, int]) -> Tensor:
        return pool_tokens(x, self.height, self.width, cell)

    def full(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.split(self.q, self.k, self.v))

    def error(self, out: Tensor, full: Tensor) -> Tensor:
        """‖out − full‖ / ‖full‖ of each row and head (B, H)."""
        return (out - full).flatten(2).norm(dim=-1) / full.flatten(2).norm(dim=-1)


@contextmanager
def observed(unet: torch.nn.Module, latent: tuple[int, int], visit: Callable[[Attention], None]) -> Iterator[None]:
    """Pass every self-attention to `visit` in a `with` block; the U-Net's output stays what it is."""
    seams = []

    def handler(site: Any) -> Callable[[Call], Tensor]:
        attn, size = site.block.attn1, Grid(*latent).at(site.downsample)

        def answer(call: Call) -> Tensor:
            x = call.x
            visit(Attention(attn.to_q(x), attn.to_k(x), attn.to_v(x), site.heads, *size))
            return call.proceed()

        return answer

    try:
        for site in find_sites(unet):
            seam = site.seam()
            seam.install(handler(site))
            seams.append(seam)
        yield
    finally:
        for seam in seams:
            seam.remove()


@dataclass(frozen=True)
class Corrected:
    """Corrected agents, with every choice in the method open.

    Attributes:
        cell: (height, width) of a cell.
        mu: weight of the fit's penalty.
        steps: number of conjugate steps in place of Tikhonov's fit; None for Tikhonov's fit.
        a: how the agents are made: "sampled" or "pooled".
        k: the same for the few keys.
        v: the same for the few values.
        shortcut: weight of what pooling V loses.
        scale: factor on the few keys.
    """

    cell: tuple[int, int] = (4, 4)
    mu: float = MU
    steps: int | None = None
    a: str = "sampled"
    k: str = "sampled"
    v: str = "sampled"
    shortcut: float = 0.0
    scale: float = 1.0

    def __call__(self, at: Attention) -> Tensor:
        q, k_bar, _, y = self.fit(at)
        out = F.scaled_dot_product_attention(q, k_bar, y)
        if self.shortcut:
            lost = lost_by_pooling(at.v, at.pooled(at.v, self.cell), at.height, at.width, self.cell)
            out = out + self.shortcut * at.split(lost)[0]
        return out

    def fit(self, at: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, the few keys, their values and the fitted ones."""
        few = [
            at.sampled(x, self.cell) if how == "sampled" else at.pooled(x, self.cell)
            for x, how in ((at.q, self.a), (at.k, self.k), (at.v, self.v))
        ]
        q, k, v, a, k_bar, v_bar = at.split(at.q, at.k, at.v, *few)
        k_bar = k_bar * self.scale
        w = (a @ k_bar.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        v_a = F.scaled_dot_product_attention(a, k, v)
        y = fit_tikhonov(w, v_a, v_bar, self.mu) if self.steps is None else fit_values(w, v_a, v_bar, self.steps)
        return q, k_bar, v_bar, y


def _grid(at: Attention, k_scale2: float = 0.3, k_shortcut: float = 0.075) -> Tensor:
    q, k, v, a = at.split(at.q, at.k, at.v, at.pooled(at.q, (4, 4)))
    return agent_attention(q, k, v, a, k_scale2=k_scale2) + k_shortcut * v


def _pool(at: Attention, cell: tuple[int, int]) -> Tensor:
    return F.scaled_dot_product_attention(*at.split(at.q, at.pooled(at.k, cell), at.pooled(at.v, cell)))


def _solved(at: Attention, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Means as in Nyströmformer, with `solve`(W, V_A) as the values."""
    q, k, v, a, k_bar = at.split(at.q, at.k, at.v, at.pooled(at.q, (4, 4)), at.pooled(at.k, (4, 4)))
    w = (a @ k_bar.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    return F.scaled_dot_product_attention(q, k_bar, solve(w, F.scaled_dot_product_attention(a, k, v)))


def _ridge(w: Tensor, v_a: Tensor, weight: float = 0.02) -> Tensor:
    return torch.linalg.solve(w + weight * torch.eye(w.shape[-1]), v_a)


def _tikhonov(w: Tensor, v_a: Tensor, mu: float = 1e-5) -> Tensor:
    return torch.linalg.solve(w.mT @ w + mu * torch.eye(w.shape[-1]), w.mT @ v_a)


VARIANTS: dict[str, Callable[[Attention], Tensor]] = {
    "grid agents 4×4, .3 / .075": _grid,
    "grid agents 4×4, 1 / 0": lambda at: _grid(at, 1.0, 0.0),
    "K/V pooled 2×2": lambda at: _pool(at, (2, 2)),
    "K/V pooled 4×4": lambda at: _pool(at, (4, 4)),
    "Nyström of means, ridge (W + .02 I)⁻¹": lambda at: _solved(at, _ridge),
    "Nyström of means, Tikhonov, μ 10⁻⁵": lambda at: _solved(at, _tikhonov),
    **{f"sampled, {n} conjugate steps": Corrected(steps=n) for n in (0, 3, 5, 8)},
    **{f"sampled, μ {mu}": Corrected(mu=mu) for mu in (0.001, 0.01, MU, 0.1)},
    "agents: means of the queries": Corrected(a="pooled"),
    "keys and values: means": Corrected(k="pooled", v="pooled"),
    "values: means": Corrected(v="pooled"),
    "keys: means": Corrected(k="pooled"),
    "+ .02 · (V − up(V̄))": Corrected(shortcut=0.02),
    "− .02 · (V − up(V̄))": Corrected(shortcut=-0.02),
    "keys' scale × 1.1": Corrected(scale=1.1),
    "keys' scale × .9": Corrected(scale=0.9),
    "2×2 cells": Corrected((2, 2)),
    "8×8 cells": Corrected((8, 8)),
}


def _noised(pipe: Any, size: tuple[int, int], index: list[int], t: int, generator: torch.Generator) -> Tensor:
    clean = covering(pipe.latents_of(pipe.pictures[index]).float(), *size)
    alpha = pipe.scheduler.alphas_cumprod[t]
    return (alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(clean.shape, generator=generator)).to(pipe.dtype)


def ablation(pipe: Any, samples: int, tokens: int) -> dict[str, dict[int, list[float]]]:
    """Errors in layers of `tokens` tokens: {variant: {timestep: one value for each layer, row and head}}."""
    errors: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in VARIANTS}
    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    for t in tqdm(TIMESTEPS, desc="ablation"):

        def visit(at: Attention, t: int = t) -> None:
            if at.q.shape[1] != tokens:
                return
            full = at.full()
            for name, variant in VARIANTS.items():
                errors[name][t] += at.error(variant(at), full).flatten().tolist()

        index = chance.sample(range(len(pipe.prompts)), samples)
        with observed(pipe.unet, (64, 64), visit):
            pipe.predict(_noised(pipe, (64, 64), index, t, generator), t, [pipe.prompts[i] for i in index])
    return errors


@dataclass
class Spikes:
    """Errors in the layers of one row of the second table.

    Attributes:
        calls: calls of self-attention.
        heads: rows and heads in them.
        fallbacks: those whose fit is not used.
        finite: whether all outputs are finite.
        corrected: errors of corrected agents, one for each row and head.
        pooled: those of pooling with the same cells.
    """

    calls: int = 0
    heads: int = 0
    fallbacks: int = 0
    finite: bool = True
    corrected: list[float] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)

    def add(self, at: Attention, cell: tuple[int, int]) -> None:
        """Count one call in, with cells of this (height, width)."""
        full, method = at.full(), Corrected(cell)
        out, (_, _, v_bar, y) = method(at), method.fit(at)
        self.calls += 1
        self.heads += full.shape[0] * full.shape[1]
        self.finite &= bool(out.isfinite().all())
        self.fallbacks += int((y == v_bar).all(dim=-1).all(dim=-1).sum())
        self.corrected += at.error(out, full).flatten().tolist()
        self.pooled += at.error(_pool(at, cell), full).flatten().tolist()


def stability(pipes: dict[str, Any], forwards: int, seed: int = 0) -> dict[tuple[str, tuple[int, int]], Spikes]:
    """Errors of every self-attention in `forwards` forwards of two rows, by dtype and number of tokens."""
    spikes: dict[tuple[str, tuple[int, int]], Spikes] = defaultdict(Spikes)
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in tqdm(range(forwards), desc="stability"):
        dtype, size = chance.choice(list(pipes)), chance.choice(SIZES)
        pipe, t = pipes[dtype], chance.randint(1, 999)
        index = [chance.randrange(len(pipe.prompts)) for _ in range(2)]

        def visit(at: Attention, dtype: str = dtype) -> None:
            config = AgentConfig(method="corrected", agent_ratio=1 - chance.choice(CELLS) ** -2)
            plan = plan_layer(config, at.height, at.width, 1)
            if plan.acts:
                spikes[dtype, next(c for c in CLASSES if c[0] <= plan.tokens <= c[1])].add(at, plan.cell)

        with observed(pipe.unet, size, visit):
            pipe.predict(_noised(pipe, size, index, t, generator), t, [pipe.prompts[i] for i in index])
    return spikes


def ablation_table(errors: dict[str, dict[int, list[float]]]) -> str:
    """Means over layers, rows and heads, and the largest error of them all."""
    lines = ["| | " + " | ".join(f"t={t}" for t in TIMESTEPS) + " | worst |", "|---|" + "---:|" * (len(TIMESTEPS) + 1)]
    for name, by_t in errors.items():
        means = [statistics.fmean(by_t[t]) for t in TIMESTEPS]
        worst = max(max(values) for values in by_t.values())
        lines.append(f"| {name} | " + " | ".join(_short(x) for x in (*means, worst)) + " |")
    return "\n".join(lines)


def stability_table(spikes: dict[tuple[str, tuple[int, int]], Spikes]) -> str:
    """Errors by dtype and number of tokens; the ratio is that of a single head of a single call."""
    lines = [
        "| dtype | tokens | calls | heads | corrected, mean | 99.9% | worst | pooled, mean | worst | worst ratio "
        "| fell back | finite |",
        "|---|---|" + "---:|" * 9 + "---|",
    ]
    for (dtype, (low, high)), s in sorted(spikes.items(), key=lambda item: (item[0][0], -item[0][1][0])):
        ratio = max(c / p for c, p in zip(s.corrected, s.pooled, strict=True) if p > 1e-3)
        quantile = sorted(s.corrected)[int(0.999 * (len(s.corrected) - 1))]
        cells = [_short(x) for x in (statistics.fmean(s.corrected), quantile, max(s.corrected))]
        cells += [_short(x) for x in (statistics.fmean(s.pooled), max(s.pooled))]
        finite = "all" if s.finite else "**not all**"
        lines.append(
            f"| {dtype} | {low}–{high} | {s.calls} | {s.heads} | {' | '.join(cells)} | {ratio:.2f} "
            f"| {s.fallbacks} | {finite} |"
        )
    return "\n".join(lines)


def _short(x: float) -> str:
    return f"{x:.3f}" if x < 1 else f"{x:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corrected", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/fidelity/corrected.md"),
        help="file for the tables (docs/fidelity/corrected.md)",
    )
    parser.add_argument("--samples", type=int, default=2, help="pictures at each timestep of the ablation (2)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in the ablation's layers: 4096 or 1024 (4096)")
    parser.add_argument("--forwards", type=int, default=300, help="forwards in the second table (300)")
    args = parser.parse_args(arguments)
    from agentsd.embedded import load

    pipes = {"float32": load(), "bfloat16": load(dtype=torch.bfloat16)}
    with torch.inference_mode():
        text = f"Error of attention's output, layers of {args.tokens} tokens, {args.samples} pictures per timestep:\n\n"
        text += ablation_table(ablation(pipes["float32"], args.samples, args.tokens))
        text += f"\n\nAll self-attention calls in {args.forwards} forwards of two rows:\n\n"
        text += stability_table(stability(pipes, args.forwards)) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
