"""Ways to compute self-attention that the zoo compares: (Attention) → (1, H, N, d)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agentsd.config import AgentConfig
from agentsd.merging import match, partition
from agentsd.methods.agents import agent_attention
from agentsd.methods.corrected import corrected_attention
from agentsd.methods.fit import MU, fit_tikhonov
from agentsd.methods.local import local_attention
from agentsd.plan import plan_layer
from agentsd.tensors import join_heads, pool_tokens, sample_tokens, split_heads

from .attentions import Attention

CELL = (4, 4)
# Keys of each query that the oracle keeps: as many as there are landmarks of 4×4 cells among 4096 tokens.
KEPT = 256


@dataclass(frozen=True)
class Rival:
    """One way.

    Attributes:
        label: what table and plot call it.
        attend: the way.
        timed: whether its seconds mean anything.
        most: more tokens than this take too long.
    """

    label: str
    attend: Callable[[Attention], Tensor]
    timed: bool = True
    most: int = 2**20


def full(at: Attention) -> Tensor:
    return scaled_dot_product_attention(at.q, at.k, at.v)


def _by_tokens(at: Attention, step: Callable[..., Tensor], x: Tensor, *args: object) -> Tensor:
    """A step on tokens (1, N, H · d), taken for all heads."""
    return split_heads(step(join_heads(x), *args), x.shape[1])


def _pooled(at: Attention, x: Tensor, s: int) -> Tensor:
    return _by_tokens(at, pool_tokens, x, *at.size, (s, s))


def _sampled(at: Attention) -> list[Tensor]:
    return [_by_tokens(at, sample_tokens, x, *at.size, CELL) for x in (at.q, at.k, at.v)]


def grid_agents(at: Attention) -> Tensor:
    out = agent_attention(at.q, at.k, at.v, _pooled(at, at.q, 4), k_scale2=0.3)
    return out + 0.075 * at.v


def pooled_keys(s: int) -> Callable[[Attention], Tensor]:
    """ToDo (Smith et al., arXiv 2402.13573), by means; the paper takes each cell's first token."""
    return lambda at: scaled_dot_product_attention(at.q, _pooled(at, at.k, s), _pooled(at, at.v, s))


def corrected(at: Attention) -> Tensor:
    return corrected_attention(at.q, at.k, at.v, *_sampled(at))


def corrected_tikhonov(mu: float) -> Callable[[Attention], Tensor]:
    """Corrected agents with the fit of `agentsd.methods.fit`: no method of the product yet."""

    def attend(at: Attention) -> Tensor:
        a, k_bar, v_bar = _sampled(at)
        w = (a @ k_bar.mT * a.shape[-1] ** -0.5).softmax(dim=-1)
        y = fit_tikhonov(w, scaled_dot_product_attention(a, at.k, at.v), v_bar, mu)
        return scaled_dot_product_attention(at.q, k_bar, y)

    return attend


def local(at: Attention) -> Tensor:
    """With the product's cells, also where the product leaves so small a layer alone."""
    cell = plan_layer(AgentConfig(method="local", agent_ratio=0.9375), *at.size, 1).cell
    return local_attention(at.q, at.k, at.v, size=at.size, cell=cell or CELL)


def merging(ratio: float) -> Callable[[Attention], Tensor]:
    """Token merging (Bolya & Hoffman, arXiv 2303.17604), matched by keys: there are no tokens here to match."""

    def attend(at: Attention) -> Tensor:
        q, k, v = (join_heads(x) for x in (at.q, at.k, at.v))
        part = partition(*at.size, 2, 2, seed=0)
        clusters = match(k, part, min(int(ratio * k.shape[1]), part.src.numel()), 0).merged
        merged = [split_heads(clusters.merge(x), at.q.shape[1]) for x in (q, k, v)]
        return split_heads(clusters.unmerge(join_heads(scaled_dot_product_attention(*merged))), at.q.shape[1])

    return attend


def tiles(at: Attention) -> Tensor:
    """Full attention within tiles (HyperTile): two to four along each axis, of at most 32 tokens."""
    (height, width), heads = at.size, at.q.shape[1]
    rows, columns = (max(2, -(-length // 32)) for length in at.size)
    q, k, v = (x.unflatten(2, at.size) for x in (at.q, at.k, at.v))
    out = torch.empty_like(at.v).unflatten(2, at.size)
    for y in torch.arange(height).chunk(rows):
        for x in torch.arange(width).chunk(columns):
            tile = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
            tokens = [t[:, :, tile[0], tile[1]].flatten(2, 3) for t in (q, k, v)]
            out[:, :, tile[0], tile[1]] = scaled_dot_product_attention(*tokens).view(1, heads, len(y), len(x), -1)
    return out.flatten(2, 3)


def nystrom(iterations: int | None) -> Callable[[Attention], Tensor]:
    """PnP-Nystra (Kidambi & Nair, arXiv 2506.08520): means as landmarks, exp(Q K̄ᵀ) A⁺ exp(Q̄ Kᵀ) [V, 1], normalised.

    Args:
        iterations: of the pseudoinverse's iteration (Nyströmformer's); None for an exact one.
    """

    def attend(at: Attention) -> Tensor:
        scale = at.q.shape[-1] ** -0.5
        q_bar, k_bar = _pooled(at, at.q, 4), _pooled(at, at.k, 4)
        left, middle, right = (scale * x @ y.mT for x, y in ((at.q, k_bar), (q_bar, k_bar), (q_bar, at.k)))
        # one factor for all of a head's scores drops out of the quotient
        top = torch.stack([s.amax((-2, -1), keepdim=True) for s in (left, middle, right)]).amax(0)
        left, middle, right = ((s - top).exp() for s in (left, middle, right))
        inverse = torch.linalg.pinv(middle) if iterations is None else _iterated_inverse(middle, iterations)
        total = left @ (inverse @ (right @ torch.cat([at.v, torch.ones_like(at.v[..., :1])], dim=-1)))
        return total[..., :-1] / total[..., -1:]

    return attend


def _iterated_inverse(a: Tensor, iterations: int) -> Tensor:
    """Z ← Z (13 I − A Z (15 I − A Z (7 I − A Z))) / 4 (Xiong et al., arXiv 2102.03902, equation 11)."""
    eye = torch.eye(a.shape[-1])
    norms = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.mT / norms[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def top_keys(at: Attention) -> Tensor:
    """The keys that each query attends to most, and no others: what no sparse method that picks keys can beat."""
    parts = []
    for q in at.q.split(512, dim=2):
        scores = q @ at.k.mT * q.shape[-1] ** -0.5
        least = scores.topk(min(KEPT, scores.shape[-1]), dim=-1).values[..., -1:]
        parts.append(scores.masked_fill_(scores < least, -torch.inf).softmax(dim=-1) @ at.v)
    return torch.cat(parts, dim=2)


RIVALS: dict[str, Rival] = {
    "full": Rival("SDPA", full),
    "agent": Rival("grid agents 4×4", grid_agents),
    "pool2": Rival("K/V pooled 2×2", pooled_keys(2)),
    "pool4": Rival("K/V pooled 4×4", pooled_keys(4)),
    "corrected": Rival("corrected 4×4", corrected),
    "tikhonov": Rival(f"corrected 4×4, Tikhonov μ {MU}", corrected_tikhonov(MU)),
    "tikhonov.1": Rival("corrected 4×4, Tikhonov μ 0.1", corrected_tikhonov(0.1)),
    "local": Rival("local", local),
    "merge": Rival("merging 0.5", merging(0.5)),
    "tiles": Rival("tiles", tiles),
    "nystra": Rival("PnP-Nystra, 6 iterations", nystrom(6)),
    "nystra.exact": Rival("PnP-Nystra, exact inverse", nystrom(None), most=5000),
    "top": Rival(f"oracle: top {KEPT} keys", top_keys, timed=False, most=5000),
}
