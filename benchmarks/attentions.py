"""Self-attentions of many kinds: the embedded model's, and such as let a method fail that relies on the wrong thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from agentsd.attention.tensors import join_heads


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values (1, H, N, d) of one self-attention over a grid of `size` = (height, width) tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    size: tuple[int, int]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (1, N, H · d), as projections lay them out."""
        return tuple(join_heads(x).contiguous() for x in (self.q, self.k, self.v))

    @cached_property
    def x(self) -> Tensor:
        """What they are projections of: here, the three side by side (1, N, 3 · H · d)."""
        return torch.cat(self.tokens, dim=-1)

    def concentration(self, queries: int = 128) -> tuple[float, float]:
        """(exp of the mean entropy, mean share of attention at most 4 rows and 4 columns away), of some queries."""
        N, width = math.prod(self.size), self.size[1]
        index = torch.linspace(0, N - 1, min(queries, N)).long()
        p = (self.q[:, :, index] @ self.k.mT * self.q.shape[-1] ** -0.5).softmax(-1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean()
        token = torch.arange(N)
        rows, columns = (index // width)[:, None] - token // width, (index % width)[:, None] - token % width
        near = (rows.abs() <= 4) & (columns.abs() <= 4)
        return float(entropy.exp()), float((p * near).sum(-1).mean())


Kind = Callable[[int, int, tuple[int, int], Generator], Attention]


def positions(size: tuple[int, int]) -> Tensor:
    """(row, column) of each token, from the middle of the grid (N, 2)."""
    axes = [torch.arange(length) - (length - 1) / 2 for length in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def fields(heads: int, channels: int, size: tuple[int, int], draw: Generator, rough: float = 0.3) -> Tensor:
    """Random features (1, H, N, channels) of unit variance: octaves of smooth noise, and a share `rough` of white."""
    total = rough * torch.randn(heads, channels, *size, generator=draw)
    for side in (3, 6, 12, 24, 48):
        noise = torch.randn(heads, channels, side, side, generator=draw)
        total += F.interpolate(noise, size, mode="bicubic") / (side / 3) ** 0.5
    return (total / total.std()).flatten(2).transpose(1, 2)[None].contiguous()


def plain(heads: int, d: int, size: tuple[int, int], draw: Generator, sharpness: float) -> Attention:
    """Scores of content alone, which spread by `sharpness`; queries and keys are alike, as in real models."""
    base = fields(heads, d, size, draw)
    q, k = (base + 0.5 * fields(heads, d, size, draw) for _ in range(2))
    spread = (q[:, :, ::7] @ k[:, :, ::7].mT * d**-0.5).std()
    return Attention(q * sharpness / spread, k, fields(heads, d, size, draw), size)


def added(at: Attention, wanted: Tensor, offered: Tensor) -> Attention:
    """Put positions into the last channels of queries and keys, so that wanted · offered is added to the scores."""
    (*rows, d), p = at.q.shape, wanted.shape[-1]
    q = torch.cat([at.q[..., :-p], (wanted * d**0.5).expand(*rows, p)], dim=-1)
    return replace(at, q=q, k=torch.cat([at.k[..., :-p], offered.expand(*rows, p)], dim=-1))


def noised_latents(pipe: Any, index: Sequence[int], size: tuple[int, int], t: int, draw: Generator) -> Tensor:
    """Training pictures of the embedded model by their numbers, enlarged to `size` and noised to a timestep."""
    clean = F.interpolate(pipe.latents_of(pipe.pictures[index]).float(), size, mode="bilinear", antialias=True)
    alpha, noise = pipe.scheduler.alphas_cumprod[t], torch.randn(clean.shape, generator=draw).to(clean)
    return (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(pipe.dtype)


@cache
def _of_the_model(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Level 0 of the embedded model at three timesteps, three layers each: nine heads of 32."""
    from agentsd.embedded import load
    from agentsd.hosts import find_sites

    pipe, found, draw = load(), [], Generator().manual_seed(0)
    layers = [site.block.attn1 for site in find_sites(pipe.unet) if site.downsample == 1]

    def watch(attn, args):
        found.append([to(args[0]) for to in (attn.to_q, attn.to_k, attn.to_v)])

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    for number, t in enumerate((900, 500, 100)):
        pipe.predict(noised_latents(pipe, [number], size, t, draw), t, [pipe.prompts[number]])
    for hook in hooks:
        hook.remove()
    return tuple(torch.stack(parts, dim=1) for parts in zip(*found, strict=True))


def model(heads: int, d: int, size: tuple[int, int], draw: Generator, sharpness: float) -> Attention:
    """The embedded model's own attention, at most nine heads of its own width, with its queries multiplied."""
    q, k, v = _of_the_model(size)
    return Attention(sharpness * q[:, :heads], k[:, :heads], v[:, :heads], size)


def gaussian(
    heads: int, d: int, size: tuple[int, int], draw: Generator, sigmas: tuple[float, ...], base: Kind | None = None
) -> Attention:
    """Scores of `base`, or else of content, and −r² / 2σ², with another σ in each head."""
    at, under = positions(size), (base or partial(plain, sharpness=1.5))(heads, d, size, draw)
    sigma = torch.tensor([sigmas[h % len(sigmas)] for h in range(under.heads)])[None, :, None, None]
    wanted = torch.cat([at, torch.ones(len(at), 1)], dim=-1) / sigma**2
    offered = torch.cat([at, -at.square().sum(-1, keepdim=True) / 2], dim=-1)
    return added(under, wanted, offered)


def inverse_square(heads: int, d: int, size: tuple[int, int], draw: Generator, rho: float = 2.0) -> Attention:
    """Attention that falls off as 1 / (1 + r² / ρ²), by the largest terms of the Fourier series of its logarithm."""
    torus = [2 * length for length in size]
    distance = [torch.minimum(torch.arange(n), n - torch.arange(n)).float() for n in torus]
    score = -torch.log1p((distance[0][:, None] ** 2 + distance[1] ** 2) / rho**2)
    terms = torch.fft.fft2(score).real / math.prod(torus)
    terms[:, size[1] + 1 :] = 0  # those of −k and k are the same
    terms[:, 1 : size[1]] *= 2
    terms[0, 0] = 0
    most = terms.abs().flatten().topk((d - 8) // 2).indices
    weight = terms.flatten()[most]
    frequency = torch.stack([most // torus[1] / torus[0], most % torus[1] / torus[1]], dim=-1)
    phase = 2 * math.pi * positions(size) @ frequency.T
    waves = torch.cat([phase.cos(), phase.sin()], dim=-1)
    return added(plain(heads, d, size, draw, 1.0), waves * torch.cat([weight, weight]), waves)


def segments(heads: int, d: int, size: tuple[int, int], draw: Generator) -> Attention:
    """Regions of any shape whose tokens attend to their own region, with values that differ between regions."""
    seeds = torch.rand(12, 2, generator=draw) - 0.5
    label = torch.cdist(positions(size) / max(size), seeds).argmin(dim=-1)
    at = plain(heads, d, size, draw, 0.5)
    code = torch.randn(heads, 12, d, generator=draw)[None, :, label]
    values = torch.randn(heads, 12, d, generator=draw)[None, :, label]
    return Attention(at.q + 2 * code, at.k + 2 * code, at.v + 2 * values, size)


def sinks(heads: int, d: int, size: tuple[int, int], draw: Generator, where: str) -> Attention:
    """A few keys of high norm that most queries attend to, whose values stand out."""
    (height, width), at = size, plain(heads, d, size, draw, 1.0)
    corners = torch.tensor([0, width - 1, (height - 1) * width, height * width - 1])
    axis = F.normalize(torch.randn(heads, 1, d, generator=draw), dim=-1)[None]
    for head in range(heads):
        moving = torch.randint(height * width, (4,), generator=draw)
        few = corners if where == "corners" else moving
        # a query gives them about half of its attention
        at.k[0, head, few] += axis[0, head] * (math.log(height * width / 4) + 0.5) * d**0.5 / 2.0
        at.v[0, head, few] *= 3
    return replace(at, q=at.q + 2.0 * axis)


def texture(heads: int, d: int, size: tuple[int, int], draw: Generator) -> Attention:
    """Keys and values that repeat every four tokens: the tokens at the same place of each cell are alike."""
    at = plain(heads, d, size, draw, 1.0)
    phase = (torch.arange(size[0])[:, None] % 4 * 4 + torch.arange(size[1]) % 4).flatten()
    code, values = torch.randn(2, heads, 16, d, generator=draw)[:, None, :, phase]
    return Attention(at.q + code, at.k + code, at.v + values, size)


def strong_keys(heads: int, d: int, size: tuple[int, int], draw: Generator) -> Attention:
    """One token in a hundred, anywhere, has a key of four times the norm and a value of twice."""
    at = plain(heads, d, size, draw, 1.0)
    strong = torch.rand(1, heads, math.prod(size), 1, generator=draw) < 0.01
    return replace(at, k=torch.where(strong, 4 * at.k, at.k), v=torch.where(strong, 2 * at.v, at.v))


def mixed(heads: int, d: int, size: tuple[int, int], draw: Generator, kinds: Sequence[Kind]) -> Attention:
    """Heads of different kinds side by side, as layers of real models have them."""
    parts = [kinds[head % len(kinds)](1, d, size, draw) for head in range(heads)]
    return Attention(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in "qkv"), size)


_MIXED = (
    *(partial(plain, sharpness=0.5), partial(gaussian, sigmas=(3.0,)), segments, partial(plain, sharpness=2.5)),
    *(partial(gaussian, sigmas=(8.0,)), inverse_square, strong_keys, partial(plain, sharpness=1.5)),
)
KINDS: dict[str, Kind] = {
    **{f"model, queries × {s}": partial(model, sharpness=s) for s in (1, 4, 8, 16)},
    "model, queries × 4, Gaussian σ 2–8": partial(gaussian, sigmas=(2.0, 4.0, 8.0), base=partial(model, sharpness=4)),
    "Gaussian, σ 2–4": partial(gaussian, sigmas=(2.0, 3.0, 4.0)),
    "Gaussian, σ 4–16": partial(gaussian, sigmas=(4.0, 8.0, 16.0)),
    "inverse square": inverse_square,
    "mixed heads": partial(mixed, kinds=_MIXED),
    "segments": segments,
    "sinks, moving": partial(sinks, where="moving"),
    "sinks, corners": partial(sinks, where="corners"),
    "high-norm keys": strong_keys,
    "texture": texture,
}
