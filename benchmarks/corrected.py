"""What corrected agents lose in one self-attention, on real calls of the embedded model.

Two tables. The first takes the method apart: the relative error of attention's output at level 0, over the timestep,
for every choice in it and for its rivals. The second looks for spikes: calls of all layers, at random timesteps,
prompts, sizes, cells and dtypes, against pooling with the same cells. Both use the cells that the patch would.

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
from agentsd.attention import (
    FIT_GROWTH,
    agent_attention,
    corrected_attention,
    fit_values,
    lost_by_pooling,
    pool_tokens,
    sample_tokens,
    split_heads,
)
from agentsd.config import FIT_STEPS
from agentsd.hosts import Call, find_sites

from .fidelity import TIMESTEPS, covering

SIZES = ((64, 64), (40, 56), (48, 72), (24, 104), (32, 32), (64, 96))
CELLS = (2, 4, 8)
CLASSES = ((16, 64), (65, 256), (257, 1024), (1025, 8192))


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values (B, N, C) of one self-attention whose tokens are a height × width grid."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    height: int
    width: int

    def split(self, *tensors: Tensor) -> list[Tensor]:
        return [split_heads(t.float(), self.heads) for t in tensors]

    def sampled(self, x: Tensor, s: int) -> Tensor:
        return sample_tokens(x, self.height, self.width, (s, s))

    def pooled(self, x: Tensor, s: int) -> Tensor:
        return pool_tokens(x, self.height, self.width, (s, s))

    def full(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.split(self.q, self.k, self.v))

    def error(self, out: Tensor, full: Tensor) -> Tensor:
        """‖out − full‖ / ‖full‖ of each row and head (B, H)."""
        return (out - full).flatten(2).norm(dim=-1) / full.flatten(2).norm(dim=-1)


@contextmanager
def watched(unet: torch.nn.Module, latent: tuple[int, int], visit: Callable[[Attention], None]) -> Iterator[None]:
    """A `with` block in which every self-attention is shown to `visit`; the U-Net computes what it always does."""
    seams = []

    def handler(site: Any) -> Callable[[Call], Tensor]:
        attn, size = site.block.attn1, [-(-side // site.downsample) for side in latent]

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
    """Corrected agents with one choice made differently.

    Attributes:
        s: side of a cell.
        steps: steps of the fit.
        a, k, v: how the agents, the few keys and the few values are made: "sampled" or "pooled".
        shortcut: weight of what pooling V lost.
        scale: factor on the few keys.
    """

    s: int = 4
    steps: int = FIT_STEPS
    a: str = "sampled"
    k: str = "sampled"
    v: str = "sampled"
    shortcut: float = 0.0
    scale: float = 1.0

    def __call__(self, at: Attention) -> Tensor:
        few = [
            at.sampled(x, self.s) if how == "sampled" else at.pooled(x, self.s)
            for x, how in ((at.q, self.a), (at.k, self.k), (at.v, self.v))
        ]
        few[1] = few[1] * self.scale
        out = corrected_attention(*at.split(at.q, at.k, at.v, *few), steps=self.steps)
        if self.shortcut:
            cell = (self.s, self.s)
            lost = lost_by_pooling(at.v, at.pooled(at.v, self.s), at.height, at.width, cell)
            out = out + self.shortcut * at.split(lost)[0]
        return out


def _grid(at: Attention, k_scale2: float = 0.3, k_shortcut: float = 0.075) -> Tensor:
    q, k, v, a = at.split(at.q, at.k, at.v, at.pooled(at.q, 4))
    return agent_attention(q, k, v, a, k_scale2=k_scale2) + k_shortcut * v


def _pool(at: Attention, s: int) -> Tensor:
    return F.scaled_dot_product_attention(*at.split(at.q, at.pooled(at.k, s), at.pooled(at.v, s)))


def _solved(at: Attention, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Means as in Nyströmformer, and `solve`(W, V_A) for the values."""
    q, k, v, a, k_bar = at.split(at.q, at.k, at.v, at.pooled(at.q, 4), at.pooled(at.k, 4))
    w = (a @ k_bar.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    return F.scaled_dot_product_attention(q, k_bar, solve(w, F.scaled_dot_product_attention(a, k, v)))


def _ridge(w: Tensor, v_a: Tensor, weight: float = 0.02) -> Tensor:
    return torch.linalg.solve(w + weight * torch.eye(w.shape[-1]), v_a)


def _tikhonov(w: Tensor, v_a: Tensor, mu: float = 1e-5) -> Tensor:
    return torch.linalg.solve(w.mT @ w + mu * torch.eye(w.shape[-1]), w.mT @ v_a)


VARIANTS: dict[str, Callable[[Attention], Tensor]] = {
    "grid agents 4×4, .3 / .075": _grid,
    "grid agents 4×4, 1 / 0": lambda at: _grid(at, 1.0, 0.0),
    "K/V pooled 2×2": lambda at: _pool(at, 2),
    "K/V pooled 4×4": lambda at: _pool(at, 4),
    "Nyström of means, ridge (W + .02 I)⁻¹": lambda at: _solved(at, _ridge),
    "Nyström of means, Tikhonov, μ 10⁻⁵": lambda at: _solved(at, _tikhonov),
    **{f"sampled, {n} step{'' if n == 1 else 's'}": Corrected(steps=n) for n in (0, 1, 2, 3, 4, 5, 6, 8)},
    "agents: means of the queries": Corrected(a="pooled"),
    "keys and values: means": Corrected(k="pooled", v="pooled"),
    "keys and values: means, 5 steps": Corrected(k="pooled", v="pooled", steps=5),
    "values: means": Corrected(v="pooled"),
    "keys: means": Corrected(k="pooled"),
    "+ .02 · (V − up(V̄))": Corrected(shortcut=0.02),
    "− .02 · (V − up(V̄))": Corrected(shortcut=-0.02),
    "+ .05 · (V − up(V̄))": Corrected(shortcut=0.05),
    "keys' scale × 1.1": Corrected(scale=1.1),
    "keys' scale × .9": Corrected(scale=0.9),
    "2×2 cells": Corrected(s=2),
    "8×8 cells": Corrected(s=8),
}


def _noised(pipe: Any, size: tuple[int, int], index: list[int], t: int, draw: torch.Generator) -> Tensor:
    clean = covering(pipe.latents_of(pipe.pictures[index]).float(), *size)
    alpha = pipe.scheduler.alphas_cumprod[t]
    return (alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(clean.shape, generator=draw)).to(pipe.dtype)


def ablation(pipe: Any, samples: int, tokens: int) -> dict[str, dict[int, list[float]]]:
    """Error of each variant in layers of `tokens` tokens: {variant: {timestep: one value a layer, row and head}}."""
    found: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in VARIANTS}
    draw, pick = torch.Generator().manual_seed(0), random.Random(0)
    for t in tqdm(TIMESTEPS, desc="ablation"):

        def visit(at: Attention, t: int = t) -> None:
            if at.q.shape[1] != tokens:
                return
            full = at.full()
            for name, variant in VARIANTS.items():
                found[name][t] += at.error(variant(at), full).flatten().tolist()

        index = pick.sample(range(len(pipe.prompts)), samples)
        with watched(pipe.unet, (64, 64), visit):
            pipe.predict(_noised(pipe, (64, 64), index, t, draw), t, [pipe.prompts[i] for i in index])
    return found


@dataclass
class Spikes:
    """Errors of one class of layers."""

    calls: int = 0
    heads: int = 0
    fallbacks: int = 0
    finite: bool = True
    corrected: list[float] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)

    def add(self, at: Attention, s: int) -> None:
        """Compare one call."""
        full = at.full()
        out, pooled = Corrected(s=s)(at), _pool(at, s)
        self.calls += 1
        self.heads += full.shape[0] * full.shape[1]
        self.finite &= bool(out.isfinite().all())
        self.fallbacks += _fallbacks(at, s)
        self.corrected += at.error(out, full).flatten().tolist()
        self.pooled += at.error(pooled, full).flatten().tolist()


def _fallbacks(at: Attention, s: int) -> int:
    """Heads whose fit is not used."""
    q, k, v, a, few_k, few_v = at.split(at.q, at.k, at.v, *(at.sampled(x, s) for x in (at.q, at.k, at.v)))
    v_a = F.scaled_dot_product_attention(a, k, v)
    y = fit_values((a @ few_k.mT * q.shape[-1] ** -0.5).softmax(dim=-1), v_a, few_v, FIT_STEPS)
    largest = [x.abs().amax(dim=(-2, -1)) for x in (y, v_a, few_v)]
    return int((~(largest[0] <= FIT_GROWTH * torch.maximum(*largest[1:]))).sum())


def stability(pipes: dict[str, Any], forwards: int, seed: int = 0) -> dict[tuple[str, tuple[int, int]], Spikes]:
    """Look at every self-attention of `forwards` forwards of two rows; {(dtype, class of tokens): what was found}."""
    found: dict[tuple[str, tuple[int, int]], Spikes] = defaultdict(Spikes)
    draw, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in tqdm(range(forwards), desc="stability"):
        dtype, size = pick.choice(list(pipes)), pick.choice(SIZES)
        pipe, t = pipes[dtype], pick.randint(1, 999)
        index = [pick.randrange(len(pipe.prompts)) for _ in range(2)]

        def visit(at: Attention, dtype: str = dtype) -> None:
            asked = AgentConfig(method="corrected", agent_ratio=1 - pick.choice(CELLS) ** -2)
            plan = plan_layer(asked, at.height, at.width, 1)
            if plan.action == "corrected":
                found[dtype, next(c for c in CLASSES if c[0] <= plan.tokens <= c[1])].add(at, plan.cell[0])

        with watched(pipe.unet, size, visit):
            pipe.predict(_noised(pipe, size, index, t, draw), t, [pipe.prompts[i] for i in index])
    return found


def ablation_table(found: dict[str, dict[int, list[float]]]) -> str:
    """Means over layers, rows and heads, and the worst of them all."""
    lines = ["| | " + " | ".join(f"t={t}" for t in TIMESTEPS) + " | worst |", "|---|" + "---:|" * (len(TIMESTEPS) + 1)]
    for name, by_t in found.items():
        means = [statistics.fmean(by_t[t]) for t in TIMESTEPS]
        worst = max(max(values) for values in by_t.values())
        lines.append(f"| {name} | " + " | ".join(_short(x) for x in (*means, worst)) + " |")
    return "\n".join(lines)


def stability_table(found: dict[tuple[str, tuple[int, int]], Spikes]) -> str:
    """Errors by dtype and size of the layer; the ratio is that of one head of one call."""
    lines = [
        "| dtype | tokens | calls | heads | corrected, mean | 99.9 % | worst | pooled, mean | worst | worst ratio "
        "| fell back | finite |",
        "|---|---|" + "---:|" * 9 + "---|",
    ]
    for (dtype, (low, high)), s in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1][0])):
        ratio = max(c / p for c, p in zip(s.corrected, s.pooled, strict=True) if p > 1e-3)
        most = sorted(s.corrected)[int(0.999 * (len(s.corrected) - 1))]
        cells = [_short(x) for x in (statistics.fmean(s.corrected), most, max(s.corrected))]
        cells += [_short(x) for x in (statistics.fmean(s.pooled), max(s.pooled))]
        all_finite = "all" if s.finite else "**not all**"
        lines.append(
            f"| {dtype} | {low}–{high} | {s.calls} | {s.heads} | {' | '.join(cells)} | {ratio:.2f} "
            f"| {s.fallbacks} | {all_finite} |"
        )
    return "\n".join(lines)


def _short(x: float) -> str:
    return f"{x:.3f}".lstrip("0") if x < 1 else f"{x:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/fidelity/corrected.md"), help="file for the tables")
    parser.add_argument("--samples", type=int, default=2, help="pictures at each timestep of the ablation (2)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the ablation's layers: 4096 or 1024 (4096)")
    parser.add_argument("--forwards", type=int, default=300, help="forwards of the second table (300)")
    args = parser.parse_args(arguments)
    from agentsd.embedded import load

    pipes = {"float32": load(), "bfloat16": load(dtype=torch.bfloat16)}
    with torch.inference_mode():
        text = f"Error of attention's output, layers of {args.tokens} tokens, {args.samples} pictures a timestep:\n\n"
        text += ablation_table(ablation(pipes["float32"], args.samples, args.tokens))
        text += f"\n\nSelf-attention calls of {args.forwards} forwards of two rows:\n\n"
        text += stability_table(stability(pipes, args.forwards)) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
