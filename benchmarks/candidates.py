"""Methods of self-attention that the zoo compares: ours, published ones that need no training, and an oracle.

Those that the product offers run through its planner and its own code, on queries, keys and values as its projections
would lay them out. The others are written from their papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agentsd.attention.merging import Matching, match, partition
from agentsd.attention.tensors import join_heads, pool_tokens, split_heads
from agentsd.config import AgentConfig
from agentsd.methods import LayerPlan, SelfAttention
from agentsd.plan import plan_layer

from .attentions import Attention

# Keys of each query that the oracle keeps: as many as there are landmarks of 4×4 cells among 4096 tokens.
KEPT = 256
# Queries that it answers.
ASKED = 1024
# Score above which PnP-Nystra's exponential goes on as a straight line.
SATURATION = 5.0


@dataclass(frozen=True)
class Candidate:
    """One method with its settings.

    Attributes:
        label: its name in tables and plots.
        family: methods that differ in price only; the plot joins them.
        attend: queries, keys and values → (1, H, N, d); None where it leaves a layer of this size alone. The oracle
            answers some queries only, those that are `asked`.
        ours: whether it is this product's own contribution.
        timed: whether its seconds mean anything.
    """

    label: str
    family: str
    attend: Callable[[Attention], Tensor | None]
    ours: bool = False
    timed: bool = True


def full(at: Attention) -> Tensor:
    return scaled_dot_product_attention(*(split_heads(t, at.heads) for t in at.tokens))


def product(**settings: object) -> Callable[[Attention], Tensor | None]:
    """A method of the product, as the patch would run it in one layer of this size."""
    config = AgentConfig(**{"ratio": 0.0, **settings})

    def attend(at: Attention) -> Tensor | None:
        plan = plan_layer(config, *at.size, 1)
        return _answer(at, config, plan) if plan.acts else None

    return attend


def _answer(at: Attention, config: AgentConfig, plan: LayerPlan) -> Tensor:
    def project(x: Tensor) -> tuple[Tensor, ...]:
        return at.tokens if x is at.x else x.chunk(3, dim=-1)

    def proceed(x: Tensor) -> Tensor:
        return join_heads(scaled_dot_product_attention(*(split_heads(t, at.heads) for t in project(x))))

    call = SelfAttention(
        x=at.x,
        plan=plan,
        settings=config,
        size=at.size,
        heads=at.heads,
        matching=_matching(at, config, plan),
        wrapped=lambda: False,
        project=project,
        project_q=lambda x: x.chunk(3, dim=-1)[0],
        project_out=lambda x: x,
        proceed=proceed,
    )
    return split_heads(plan.method.attend(call), at.heads)


def _matching(at: Attention, config: AgentConfig, plan: LayerPlan) -> Matching | None:
    """Clusters matched by keys: there are no tokens here to match, and side by side with queries they cost thrice."""
    if not (plan.r or plan.agent_r):
        return None
    return match(at.tokens[1], partition(*at.size, config.sx, config.sy, seed=0), plan.r, plan.agent_r)


def tomesd(ratio: float) -> Callable[[Attention], Tensor]:
    """Token merging by the tomesd library (Bolya & Hoffman, arXiv 2303.17604), matched by keys as above."""

    def attend(at: Attention) -> Tensor:
        from tomesd.merge import bipartite_soft_matching_random2d

        height, width = at.size
        draw = torch.Generator().manual_seed(0)
        r = int(ratio * height * width)
        merge, unmerge = bipartite_soft_matching_random2d(at.tokens[1], width, height, 2, 2, r, generator=draw)
        merged = (split_heads(t, at.heads) for t in merge(at.x).chunk(3, dim=-1))
        return split_heads(unmerge(join_heads(scaled_dot_product_attention(*merged))), at.heads)

    return attend


def downsampled(s: int) -> Callable[[Attention], Tensor]:
    """ToDo (Smith et al., arXiv 2402.13573) as published: the first key and value of each cell."""

    def attend(at: Attention) -> Tensor:
        q, k, v = at.tokens
        few = (t.unflatten(1, at.size)[:, ::s, ::s].flatten(1, 2) for t in (k, v))
        return scaled_dot_product_attention(*(split_heads(t, at.heads) for t in (q, *few)))

    return attend


def tiles(most: int) -> Callable[[Attention], Tensor]:
    """Full attention within tiles of at most `most` tokens a side, two at least along each axis (HyperTile)."""

    def attend(at: Attention) -> Tensor:
        height, width = at.size
        rows, columns = (max(2, -(-length // most)) for length in at.size)
        q, k, v = (t.unflatten(1, at.size) for t in at.tokens)
        out = torch.empty_like(v)
        for y in torch.arange(height).chunk(rows):
            for x in torch.arange(width).chunk(columns):
                tile = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
                inside = (split_heads(t[:, tile[0], tile[1]].flatten(1, 2), at.heads) for t in (q, k, v))
                done = join_heads(scaled_dot_product_attention(*inside))
                out[:, tile[0], tile[1]] = done.unflatten(1, (len(y), len(x)))
        return split_heads(out.flatten(1, 2), at.heads)

    return attend


def nystrom(cell: int, *, iterations: int = 6, exact: bool = False) -> Callable[[Attention], Tensor]:
    """PnP-Nystra (Kidambi, Palaniappan & Nair, arXiv 2506.08520): means as landmarks, normalised after the product.

        κ(Q K̄ᵀ) κ(Q̄ K̄ᵀ)⁺ κ(Q̄ Kᵀ) [V, 1],  κ(s) = exp(min(s, 5)) + max(s − 5, 0)

    Args:
        cell: side of a landmark's cell in tokens.
        iterations: of the pseudoinverse's iteration.
        exact: κ = exp and the pseudoinverse by singular values in place of what the paper computes: its ideal.
    """

    def attend(at: Attention) -> Tensor:
        q, k, v = (split_heads(t, at.heads) for t in at.tokens)
        few = (pool_tokens(t, *at.size, (cell, cell)) for t in at.tokens[:2])
        q_bar, k_bar = (split_heads(t, at.heads) for t in few)
        scores = [q.shape[-1] ** -0.5 * x @ y.mT for x, y in ((q, k_bar), (q_bar, k_bar), (q_bar, k))]
        if exact:
            # one factor for all of a head's scores drops out of the quotient
            top = torch.stack([s.amax((-2, -1), keepdim=True) for s in scores]).amax(0)
            left, middle, right = (s.sub_(top).exp_() for s in scores)
        else:
            left, middle, right = (s.clamp(max=SATURATION).exp_() + (s - SATURATION).relu_() for s in scores)
        inverse = torch.linalg.pinv(middle) if exact else iterated_inverse(middle, iterations)
        total = left @ (inverse @ (right @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)))
        return total[..., :-1] / total[..., -1:]

    return attend


def iterated_inverse(a: Tensor, iterations: int) -> Tensor:
    """Z ← Z (13 I − A Z (15 I − A Z (7 I − A Z))) / 4 (Xiong et al., arXiv 2102.03902, equation 11)."""
    eye = torch.eye(a.shape[-1])
    norms = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.mT / norms[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def asked(tokens: int) -> Tensor:
    """The queries that the oracle answers: all, or as many evenly spaced ones as it has time for."""
    return torch.linspace(0, tokens - 1, min(tokens, ASKED)).round().long()


def top_keys(at: Attention) -> Tensor:
    """The keys that each query attends to most, and no others: what no sparse method that picks keys can beat.

    Returns:
        (1, H, M, d), the answers to the queries that are `asked`.
    """
    parts = []
    for q in at.q[:, :, asked(at.q.shape[2])].split(512, dim=2):
        scores = q @ at.k.mT * q.shape[-1] ** -0.5
        least = scores.topk(min(KEPT, scores.shape[-1]), dim=-1).values[..., -1:]
        parts.append(scores.masked_fill_(scores < least, -torch.inf).softmax(dim=-1) @ at.v)
    return torch.cat(parts, dim=2)


def _share(side: int) -> float:
    """The agent ratio of square cells."""
    return 1 - side**-2


FULL = "full"
CANDIDATES: dict[str, Candidate] = {
    FULL: Candidate("SDPA", "full attention", full),
    **{
        f"corrected{s}-{exact:g}": Candidate(
            f"corrected {s}×{s}, {exact:.0%} exact",
            f"corrected {s}×{s}",
            product(method="corrected", agent_ratio=_share(s), exact_ratio=exact),
            ours=True,
        )
        for s in (8, 4)
        for exact in (0.0, 0.04, 0.08, 0.14, 0.25, 0.4)
    },
    "agents": Candidate("grid agents 4×4", "agents", product(agent_source="grid", agent_ratio=_share(4))),
    "agentsd": Candidate("AgentSD 0.4/0.95", "agents", product(ratio=0.4, agent_ratio=0.95)),
    **{f"tomesd{ratio:.2g}": Candidate(f"tomesd {ratio:.2g}", "tomesd", tomesd(ratio)) for ratio in (0.25, 0.5, 0.75)},
    **{
        f"pool{s}": Candidate(f"K/V pooled {s}×{s}", "K/V pooled", product(method="pool", sx=s, sy=s, k_shortcut=0.0))
        for s in (2, 4)
    },
    "todo2": Candidate("ToDo 2×2", "ToDo", downsampled(2)),
    **{f"tiles{most}": Candidate(f"tiles of {most}", "tiles", tiles(most)) for most in (32, 16)},
    **{f"nystra{s}": Candidate(f"PnP-Nystra {s}×{s}", "PnP-Nystra", nystrom(s)) for s in (8, 4)},
    "nystrom": Candidate("Nyström 4×4, exact inverse", "PnP-Nystra, its ideal", nystrom(4, exact=True)),
    "top": Candidate(f"oracle: top {KEPT} keys", "oracle", top_keys, timed=False),
}
