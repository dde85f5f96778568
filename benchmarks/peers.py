"""Methods of self-attention that others published and that need no training, written from their equations; an oracle.

Each takes an attention and returns its answer (1, H, N, d), or None where it leaves a layer of this size alone. Those
that are quick only in kernels of their own return (answer, ideal price) instead: the share of SDPA's products that they
need, without routing, reordering and copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from agentsd.attention.tensors import join_heads, pool_tokens, split_heads

from .attentions import Attention

Attend = Callable[[Attention], Tensor | tuple[Tensor, float] | None]
# Keys of each query that the oracle keeps: as many as there are landmarks of 4×4 cells among 4096 tokens.
KEPT = 256
# Queries that it answers.
ASKED = 1024
# Score above which PnP-Nystra's exponential goes on as a straight line.
SATURATION = 5.0
# Tokens of a block of the block-sparse methods, and the side of a tile of as many.
BLOCK, TILE = 64, 8


def heads_of(at: Attention, *tokens: Tensor) -> list[Tensor]:
    return [split_heads(t, at.heads) for t in tokens or at.tokens]


def full(at: Attention) -> Tensor:
    return F.scaled_dot_product_attention(*heads_of(at))


def tomesd(ratio: float) -> Attend:
    """Token merging by the tomesd library (Bolya & Hoffman, arXiv 2303.17604), matched by keys: there are no tokens."""

    def attend(at: Attention) -> Tensor:
        from tomesd.merge import bipartite_soft_matching_random2d

        (height, width), draw = at.size, torch.Generator().manual_seed(0)
        r = int(ratio * height * width)
        merge, unmerge = bipartite_soft_matching_random2d(at.tokens[1], width, height, 2, 2, r, generator=draw)
        merged = heads_of(at, *merge(at.x).chunk(3, dim=-1))
        return split_heads(unmerge(join_heads(F.scaled_dot_product_attention(*merged))), at.heads)

    return attend


def downsampled(s: int) -> Attend:
    """ToDo (Smith et al., arXiv 2402.13573) as published: the first key and value of each cell."""

    def attend(at: Attention) -> Tensor:
        q, k, v = at.tokens
        few = (t.unflatten(1, at.size)[:, ::s, ::s].flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(*heads_of(at, q, *few))

    return attend


def tiles(most: int) -> Attend:
    """Full attention within tiles of at most `most` tokens a side, two at least along each axis (HyperTile)."""

    def attend(at: Attention) -> Tensor:
        rows, columns = (torch.arange(side).chunk(max(2, -(-side // most))) for side in at.size)
        q, k, v = (t.unflatten(1, at.size) for t in at.tokens)
        out = torch.empty_like(v)
        for y in rows:
            for x in columns:
                tile = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
                inside = heads_of(at, *(t[:, tile[0], tile[1]].flatten(1, 2) for t in (q, k, v)))
                done = join_heads(F.scaled_dot_product_attention(*inside))
                out[:, tile[0], tile[1]] = done.unflatten(1, (len(y), len(x)))
        return split_heads(out.flatten(1, 2), at.heads)

    return attend


def nystrom(cell: int, *, iterations: int = 6, exact: bool = False) -> Attend:
    """PnP-Nystra (Kidambi, Palaniappan & Nair, arXiv 2506.08520): means as landmarks, normalised after the product.

        κ(Q K̄ᵀ) κ(Q̄ K̄ᵀ)⁺ κ(Q̄ Kᵀ) [V, 1],  κ(s) = exp(min(s, 5)) + max(s − 5, 0)

    Landmarks are cells of `cell` tokens a side; `exact` is its ideal, with κ = exp and the pseudoinverse by singular
    values in place of `iterations` of an iteration.
    """

    def attend(at: Attention) -> Tensor:
        q, k, v = heads_of(at)
        q_bar, k_bar = heads_of(at, *(pool_tokens(t, *at.size, (cell, cell)) for t in at.tokens[:2]))
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
    z = a.mT / (a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def block_sparse(
    *, tau: float | None = None, kept: float = 0.0, rest: str = "pooled", salient: int = 0, tiled: bool = True
) -> Attend:
    """Blocks of 64 queries that attend to some blocks of 64 keys exactly, and to the rest as a whole or not at all.

    With q̄, k̄ the means of blocks, keys centred on the mean of k̄, a block of queries opens

    - Sol-Attn (arXiv 2607.24027), `tau`: where q̄ᵀk̄ > τ σ, σ² = Σ_c q̄_c² Var(k̄_c), and the blocks beside its own;
    - PISA (arXiv 2602.01077), `rest` = "first order": the share `kept` of largest q̄ᵀk̄ d^-½ + log ‖H‖,
      H = Σ (k − k̄) vᵀ of the block's keys;
    - keep-or-drop, `rest` = "": the share `kept` of largest q̄ᵀk̄.

    The rest is a key k̄ of the block's size: for Sol-Attn scored by q̄ for all queries of the block, for PISA by each
    query, with the mean of all H as a first-order term. With `salient` keys, Sol-Attn has the best of the rest by q̄
    exact as well, and scores the others one by one by q̄. Blocks are tiles of 8×8 tokens, or 64 tokens in raster order.
    """

    def attend(at: Attention) -> tuple[Tensor, float]:
        (height, width), N, d = at.size, math.prod(at.size), at.q.shape[-1]
        block = torch.arange(N) // BLOCK
        if tiled:
            across = -(-width // TILE)
            block = ((torch.arange(height) // TILE * across)[:, None] + torch.arange(width) // TILE).flatten()
        member = F.one_hot(block).mT.float()  # (n, N)
        length = member.sum(-1, keepdim=True)
        q_bar, k_bar, v_bar = (member @ t / length for t in (at.q, at.k, at.v))
        centre = k_bar.mean(-2, keepdim=True)
        k, k_bar, q = at.k - centre, k_bar - centre, at.q * d**-0.5
        score = q_bar @ k_bar.mT * d**-0.5  # (1, H, n, n)
        n, number = len(length), torch.arange(len(length))
        if tau is not None:
            sigma = (q_bar.square() @ k_bar.square().mean(-2, keepdim=True).mT / d + 1e-6).sqrt()
            opened = (score > tau * sigma) | ((number[:, None] - number).abs() <= 1)
        else:
            ranked, H = score, 0.0
            if rest == "first order":
                of_block = [(k[:, :, block == j] - k_bar[:, :, [j]]).mT @ at.v[:, :, block == j] for j in range(n)]
                ranked = score + (torch.stack([h.norm(dim=(-2, -1)) for h in of_block], -1) + 1e-5).log()[:, :, None]
                H = sum(of_block) / N
            best = ranked.topk(max(1, int(kept * n)), dim=-1).indices
            opened = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        out, seen = torch.empty_like(at.v), torch.zeros(())
        for b in range(n):
            rows, mine = block == b, opened[:, :, b]
            shut = ~mine[:, :, None, block]  # (1, H, 1, N)
            logits, values = torch.empty(*q.shape[:2], 1, 0), v_bar[:, :, :0]
            if salient:
                by_mean = (q_bar[:, :, [b]] @ k.mT * d**-0.5).masked_fill(~shut, -torch.inf)
                few = by_mean.topk(min(salient, N), dim=-1).indices
                shut = shut.scatter(-1, few, False)
                by_mean = by_mean.scatter(-1, few, -torch.inf)
                logits = by_mean.logsumexp(-1, keepdim=True)
                values = by_mean.softmax(-1).nan_to_num() @ at.v
            elif rest:
                each = score[:, :, [b]] if tau is not None else q[:, :, rows] @ k_bar.mT
                logits, values = (each + length.log().mT).masked_fill(mine[:, :, None], -torch.inf), v_bar
            exact = (q[:, :, rows] @ k.mT).masked_fill(shut, -torch.inf)
            p = torch.cat([exact, logits.expand(*exact.shape[:-1], -1)], dim=-1).softmax(-1)
            out[:, :, rows] = p @ torch.cat([at.v, values], dim=-2)
            if rest == "first order":
                out[:, :, rows] += p[..., N:].sum(-1, keepdim=True) * (q[:, :, rows] @ H)
            left = shut.sum() / rows.sum() if salient else (~mine).sum() if rest else 0
            seen += ((~shut).sum() + left) * rows.sum()
        return out, float(seen / at.heads / N**2)

    return attend


def monarch(steps: int) -> Attend:
    """MonarchAttention (Yaras et al., arXiv 2505.18698), blocks of one row of the image, as published for images.

    The weights from query j of row l to key i of row k are L[j, l, k] R[k, j, i], found by alternating `steps` times

        R[k, j, ·] = softmax(K_k a / c),  a = Σ_l L[j, l, k] q[l, j],  c = Σ_l L[j, l, k]  (L = I at first)
        L[j, l, ·] = softmax(q[l, j]ᵀ b − e),  b = Σ_i R[k, j, i] k[k, i],  e = Σ_i R log R
    """

    def attend(at: Attention) -> tuple[Tensor, float]:
        q, k, v = (t.unflatten(2, at.size) for t in (at.q * at.q.shape[-1] ** -0.5, at.k, at.v))
        a, c = q, q.new_ones(q.shape[:-1])
        for _ in range(steps):
            R = ((a @ k.mT) / c[..., None]).softmax(-1)  # (1, H, rows k, j, i)
            b, e = R @ k, torch.special.xlogy(R, R).sum(-1)
            L = (torch.einsum("bhljd,bhkjd->bhjlk", q, b) - e.permute(0, 1, 3, 2)[..., None, :]).softmax(-1)
            a, c = torch.einsum("bhjlk,bhljd->bhkjd", L, q), L.sum(-2).mT.clamp(min=1e-12)
        out = torch.einsum("bhjlk,bhkjd->bhljd", L, R @ v)
        (height, width), N = at.size, math.prod(at.size)
        return out.flatten(2, 3), (2 * steps * (height + width) + width) / (2 * N)

    return attend


def asked(tokens: int) -> Tensor:
    """The queries that the oracle answers: all, or as many evenly spaced ones as it has time for."""
    return torch.linspace(0, tokens - 1, min(tokens, ASKED)).round().long()


def top_keys(at: Attention) -> Tensor:
    """The keys that each query attends to most, and no others: what no sparse method that picks keys can beat.

    Returns (1, H, M, d), the answers to the queries that are `asked`.
    """
    parts = []
    for q in at.q[:, :, asked(at.q.shape[2])].split(512, dim=2):
        scores = q @ at.k.mT * q.shape[-1] ** -0.5
        least = scores.topk(min(KEPT, scores.shape[-1]), dim=-1).values[..., -1:]
        parts.append(scores.masked_fill_(scores < least, -torch.inf).softmax(dim=-1) @ at.v)
    return torch.cat(parts, dim=2)
