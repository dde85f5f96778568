"""Corrected attention: exact for the cells that matter to a window of queries, a fitted landmark for each other cell.

With no cell opened these are corrected agents; with all of them opened it is full attention.
"""

from __future__ import annotations

import math
from functools import lru_cache
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .fit import cast_within_range, value_correction
from .grid import HALO, WINDOW, cells, landmark_places
from .tensors import compiling, no_autocast

# Weight of an agent of the ring beside one of the window, where cells are chosen.
AROUND = 1 / 3
# Weight there of a mass that a cell's landmark misses or claims wrongly, beside the mass itself.
MISSED = 1 / 2
# Numbers of keys are multiples of this, for kernels that multiply tiles.
EVEN = 32
# Bytes of a matrix at a time: what the CPU's cache holds, and what other devices spare.
_CACHED, _SPARED = 4 * 2**20, 64 * 2**20
# Bytes that each thread keeps on the CPU from call to call, at most.
_KEPT = 16 * 2**20


def corrected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: tuple[int, int],
    cell: tuple[int, int],
    opened: int = 0,
    text: tuple[Tensor, ...] | None = None,
    chosen: list[Tensor] | None = None,
) -> Tensor:
    """Attend to the keys of `opened` cells, and to one landmark of each other cell, with values fitted at the agents.

    Each cell of s tokens has a landmark: one token j, which stands for them all, c where the edge cuts the cell. Their
    queries are the agents A. Queries are taken in windows of about 16×16 tokens; what follows holds for each window.

        P   = σ(A Kᵀ · d^-½)                              once for all windows
        V_A = P V                                         full attention at the agents
        𝒪   = cells of largest mass + β |mass − s p|      mass: P over the cell, p: P at j, both summed over agents
        W   = σ(A [K_𝒪, K̄]ᵀ · d^-½ + [0, log c])          what the approximation does at the agents; K̄: j ∉ 𝒪
        Y   = V̄ + W̄ᵀ (W̄ W̄ᵀ + λ I)⁻¹ (V_A − W [V_𝒪, V̄])    W̄: W's columns of landmarks
        O   = σ(Q [K_𝒪, K̄]ᵀ · d^-½ + [0, log c]) [V_𝒪, Y]

    The agents of a window are those of its cells and of the ring of cells around it. Landmarks sit at another place in
    each cell, as in a Latin square, so that no texture hides between them.

    Without the fit this is block-sparse attention with a pooled remainder. With one window and nothing opened it is the
    Nyström approximation (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902), regularised.

    Args:
        q: queries (B, H, N, d), N = height · width, in row-major order.
        k: keys (B, H, N, d).
        v: values (B, H, N, d).
        size: (height, width) of the grid of tokens; any.
        cell: (height, width) of a cell in tokens.
        opened: number of cells that each window opens, from 0 to the number of cells.
        text: further keys and values (B, H, T, d) that every query attends to in full.
        chosen: takes the cells that windows of the first row open, (windows, heads, opened), some heads at a time.

    Returns:
        (B, H, N, d). Only P exists as a matrix, some heads at a time; the fit is float32 whatever the tensors are.
    """
    given, words = (q, k, v, *(text or ())), text[0].shape[2] if text else 0
    # tensors without values, as counters of FLOPs use them, must not be kept
    make: Any = _kept_layout if type(q) is Tensor else _make_layout
    at = make(size, cell, opened, words, q.device, q.dtype, q.shape[-1])
    scratch = _Scratch(given)
    scratch.chosen = chosen
    (B, H, N, d), (rows, heads) = q.shape, scratch.pairs(q)
    try:
        with no_autocast(q.device.type):
            if (rows, heads) == (B, H):
                return _attend(at, scratch, *given)
            out = q.new_empty(B, N, H, d).transpose(1, 2)
            for b in range(0, B, rows):
                for h in range(0, H, heads):
                    piece = slice(b, b + rows), slice(h, h + heads)
                    out[piece] = _attend(at, scratch, *(t[piece] for t in given))
                scratch.chosen = None
            return out
    finally:
        if scratch.keeps:
            scratch.release()


def _attend(at: _Layout, scratch: _Scratch, q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> Tensor:
    """(B, H, N, d): the equations, for some rows and heads."""
    (B, H, _, d), parts = q.shape, []
    out = scratch.empty("out", B, at.windows, len(at.queries) // at.windows, H, d, dtype=q.dtype)
    tiles = scratch.tokens("q", q, at.queries).unflatten(1, (at.windows, -1))
    a = q[:, :, at.tokens]
    if at.opened:
        k, v = scratch.heads("k", k, at.by_cells, *text[:1]), scratch.heads("v", v, at.by_cells, *text[1:])
        a = a.float()
        v_a, order = _agents_attention(at, scratch, a, k, v)
        if scratch.chosen is not None:
            scratch.chosen.append(order[0, ..., : at.opened])
    else:
        more_k, more_v = ([t] for t in text) if text else ([], [])
        keys, values = _joined([k, *more_k], 2), _joined([v, *more_v], 2)
        v_a = sdpa(a, keys, values).float()
        a, order = a.float(), None
        k, v = _joined([*more_k, k[:, :, at.tokens]], 2), _joined([*more_v, v[:, :, at.tokens]], 2)
        w = _softmax(a.flatten(0, 1), k.flatten(0, 1).float(), at.bias)
        r = torch.baddbmm(v_a.flatten(0, 1), w, v.flatten(0, 1).float(), alpha=-1)
        w, r = w.unflatten(0, (B, H)), r.unflatten(0, (B, H))
    head = torch.arange(H, device=q.device)[:, None]
    for some in scratch.windows(at, B * H, d):
        agents, bias = at.agents[some, None], at.bias  # (windows, 1, a)
        if order is None:
            seen_k, seen_v = (t[:, None].expand(-1, len(agents), -1, -1, -1) for t in (k, v))
            some_w, some_r = (t[:, head, agents].flatten(0, 2) for t in (w, r))
        else:
            rows, bias = _seen(at, order[:, some], k.shape[2])
            seen_k, seen_v = scratch.taken("seen k", k, rows), scratch.taken("seen v", v, rows)
            some_a, some_r = (t[:, head, agents].flatten(0, 2) for t in (a, v_a))
            room = scratch.empty("w", *some_a.shape[:2], seen_k.shape[3], dtype=a.dtype)
            some_w = _softmax(some_a, scratch.single("some k", seen_k.flatten(0, 2)), bias, room)
            some_r = torch.baddbmm(some_r, some_w, scratch.single("some v", seen_v.flatten(0, 2)), alpha=-1)
        squares = torch.linalg.vector_norm(some_w, dim=(-2, -1)).square()
        delta = value_correction(some_w[..., -at.far :], some_r, squares).view(*seen_v.shape[:3], at.far, d)
        y = cast_within_range(v.dtype, delta.add_(seen_v[..., -at.far :, :]))
        if seen_v.shape[3] == at.far:
            seen_v = y
        elif scratch.graded or order is None:
            seen_v = torch.cat([seen_v[..., : -at.far, :], y], dim=3)
        else:
            seen_v[..., -at.far :, :] = y
        attended = _fused(
            tiles[:, some].transpose(2, 3).flatten(0, 1), seen_k.flatten(0, 1), seen_v.flatten(0, 1), bias
        )
        attended = attended.transpose(1, 2).unflatten(0, (B, -1))
        if out is None:
            parts.append(attended)
        else:
            out[:, some] = attended
    return (_joined(parts, 1) if out is None else out).flatten(1, 2).index_select(1, at.back).transpose(1, 2)


def _agents_attention(at: _Layout, scratch: _Scratch, a: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """V_A (B, H, n, d), and the cells as each window orders them, those it opens first (B, windows, H, n)."""
    count = scratch.count(4 * at.n * k.shape[2])
    pieces = zip(*(t.flatten(0, 1).split(count) for t in (a, k, v)), strict=True)
    v_a, scores = zip(*(_choose(at, scratch, *piece) for piece in pieces), strict=True)
    order = _joined(scores, 0).argsort(-1, descending=True)
    return _joined(v_a, 0).unflatten(0, a.shape[:2]), order.unflatten(0, a.shape[:2]).transpose(1, 2)


def _choose(at: _Layout, scratch: _Scratch, a: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """V_A (G, n, d), and by how much each window would open each cell (G, windows, n)."""
    k, v = scratch.single("some k", k), scratch.single("some v", v)
    p = _softmax(a, k, at.held, scratch.empty("p", len(a), at.n, k.shape[1], dtype=a.dtype))
    sums = at.sums @ p[..., : at.n * at.s].reshape(-1, at.s).mT
    near = at.near @ sums.unflatten(1, (-1, at.n, at.n))
    return p @ v, torch.maximum(near[0], near[1])


def _softmax(a: Tensor, k: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """σ(A Kᵀ · d^-½ + bias)."""
    added = a[:1, :1, :1] if bias is None else bias.reshape(-1, 1, bias.shape[-1])
    scores = torch.baddbmm(added, a, k.mT, beta=float(bias is not None), alpha=a.shape[-1] ** -0.5, out=out)
    return torch.softmax(scores, -1, out=scores if not scores.requires_grad else None)


def _seen(at: _Layout, order: Tensor, total: int) -> tuple[Tensor, Tensor | None]:
    """Rows that windows see among those of all pairs, `total` each, (B, windows, H, keys), and their bias."""
    B, windows, H, _ = order.shape
    base = torch.arange(0, B * H * total, total, device=order.device).view(B, 1, H, 1)
    first = torch.add(base, order, alpha=at.s)  # the landmark is the first token of its cell
    near = (first[..., : at.opened, None] + at.rows[: at.s]).flatten(3)
    text = [(base + at.rows[at.n * at.s :]).expand(-1, windows, -1, -1)] if at.words else []
    rows = torch.cat([near, *text, first[..., -at.far :]], dim=-1)
    if not at.ragged:
        return rows, at.bias
    far = at.log_c[order[..., -at.far :]]
    far[..., : at.far - at.n + at.opened] = -math.inf
    inside = at.inside[order[..., : at.opened]].flatten(3)
    return rows, _joined([inside, *(at.held[at.n * at.s :].expand(t.shape) for t in text), far], -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """σ(Q Kᵀ · d^-½ + bias) V (G, H, tokens, d)."""
    if bias is not None and bias.dim() > 1:
        bias = bias.flatten(0, 1)
    if bias is None or q.device.type == "cpu":
        return sdpa(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)[..., None, :])
    # fast kernels take no mask: it is a channel of the keys, and eight channels more keep memory aligned
    d = q.shape[-1]
    extra = 8 - d % 8
    channel = pad((bias * d**0.5).to(k.dtype)[..., None], (0, extra - 1)).expand(*k.shape[:-1], -1)
    q, k, v = pad(q, (0, extra), value=1.0), torch.cat([k, channel], dim=-1), pad(v, (0, extra))
    return sdpa(q, k, v, scale=d**-0.5)[..., :d]


class _Scratch:
    """How much is taken at a time. On the CPU, where mapping new pages takes long, the same memory for all of it."""

    kept = local()
    chosen: list[Tensor] | None = None

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        self.graded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        self.on_cpu = given[0].device.type == "cpu" and not compiling()
        self.keeps = self.on_cpu and not self.graded and type(given[0]) is Tensor

    def count(self, size: int) -> int:
        """Pieces of `size` bytes that are taken at a time."""
        return max(1, (_CACHED if self.on_cpu else _SPARED) // size)

    def pairs(self, q: Tensor) -> tuple[int, int]:
        """(rows, heads) whose tokens are laid out at a time."""
        B, H, N, d = q.shape
        pairs = max(1, (8 * _CACHED if self.on_cpu else _SPARED) // (16 * N * d))
        return (min(B, pairs // H), H) if pairs >= H else (1, cells(H, cells(H, pairs)))

    def windows(self, at: _Layout, G: int, d: int) -> list[slice]:
        """The windows that are taken at a time."""
        keys = at.opened * at.s + at.words + at.far
        count = self.count(4 * G * keys * 2 * d)
        return [slice(first, first + count) for first in range(0, at.windows, count)]

    def empty(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor | None:
        if not self.keeps:
            return None
        kept, size = self.kept.__dict__, math.prod(shape)
        if name not in kept or kept[name].dtype != dtype or len(kept[name]) < size:
            with torch.inference_mode(False):
                kept[name] = torch.empty(size, dtype=dtype)
        return kept[name][:size].view(shape)

    def release(self) -> None:
        """Keep the smallest pieces, as many as there is room for."""
        kept, held = self.kept.__dict__, 0
        for name in sorted(kept, key=lambda name: kept[name].nbytes):
            held += kept[name].nbytes
            if held > _KEPT:
                del kept[name]

    def single(self, name: str, t: Tensor) -> Tensor:
        """Convert to float32."""
        out = None if t.dtype == torch.float32 else self.empty(name, *t.shape, dtype=torch.float32)
        return t.float() if out is None else out.copy_(t)

    def tokens(self, name: str, t: Tensor, index: Tensor) -> Tensor:
        """(B, H, N, d) → (B, M, H, d)."""
        B, H, _, d = t.shape
        return torch.index_select(t.transpose(1, 2), 1, index, out=self.empty(name, B, len(index), H, d, dtype=t.dtype))

    def heads(self, name: str, t: Tensor, index: Tensor, *more: Tensor) -> Tensor:
        """(B, H, N, d) → (B, H, M, d), and more behind them."""
        (B, H, _, d), M = t.shape, len(index)
        out = self.empty(name, B, H, M + sum(m.shape[2] for m in more), d, dtype=t.dtype)
        if out is None:
            return _joined([t[:, :, index], *more], 2)
        out[:, :, :M] = self.tokens("tokens", t, index).transpose(1, 2)
        for m in more:
            out[:, :, M:] = m
        return out

    def taken(self, name: str, t: Tensor, rows: Tensor) -> Tensor:
        """Rows of t (B, H, M, d) → (B, windows, H, keys, d)."""
        out = self.empty(name, rows.numel(), t.shape[-1], dtype=t.dtype)
        return torch.index_select(t.flatten(0, 2), 0, rows.flatten(), out=out).view(*rows.shape, -1)


def _joined(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Axis:
    """One axis of a grid: `length` tokens in cells of `cell`."""

    def __init__(self, length: int, cell: int) -> None:
        self.cell, self.cells = cell, cells(length, cell)
        self.windows = cells(self.cells, max(1, WINDOW // cell))
        # cells and tokens of a window; all windows are alike, and the last one may reach beyond the edge
        self.side = cells(self.cells, self.windows)
        self.tile = self.side * cell
        # the cells of each window's agents (windows, cells); at the edges the ring reaches further inwards
        count = min(self.cells, self.side + 2 * HALO)
        first = (self.side * torch.arange(self.windows) - HALO).clamp(0, self.cells - count)
        self.agents = first[:, None] + torch.arange(count)


class _Layout(NamedTuple):
    """What is where."""

    opened: int  # number of cells that a window opens
    words: int  # number of keys of text, T
    # number of landmarks that a window sees; some of them open cells', masked, for a number of keys that fits
    far: int
    s: int  # tokens of a cell
    ragged: bool  # whether the edge cuts cells
    queries: Tensor  # the tokens of the windows, one after the other (windows · tokens,); beyond the edge, the edge's
    back: Tensor  # where a token is among them (N,)
    tokens: Tensor  # the landmarks (n,)
    by_cells: Tensor  # the tokens of the cells, the landmark first (n · s,); where a cell lacks one, the landmark again
    inside: Tensor  # 0 for the tokens of a cell, −∞ where it lacks one (n, s)
    held: Tensor | None  # that and zeros for text (n · s + T,); None where no cell lacks any
    sums: Tensor  # (1 ± β) mass ∓ β s p of a cell, of which the larger is mass + β |mass − s p| (2, s)
    rows: Tensor  # 0, 1, … (n · s + T,)
    log_c: Tensor  # log c (n,)
    bias: Tensor | None  # of the keys that a window sees (keys,), where it is the same for all windows and not even
    agents: Tensor  # the cells of each window's agents (windows, a)
    near: Tensor  # their weight in the choice of cells (windows, n)

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def windows(self) -> int:
        return len(self.agents)


def _make_layout(
    size: tuple[int, int], cell: tuple[int, int], opened: int, words: int, device: Any, dtype: Any, d: int
) -> _Layout:
    with torch.inference_mode(False), torch.no_grad():
        y, x = Axis(size[0], cell[0]), Axis(size[1], cell[1])
        (height, width), (sy, sx), (R, C), s = size, cell, (y.cells, x.cells), cell[0] * cell[1]
        n, ragged = R * C, (R * sy, C * sx) != tuple(size)
        spare = min(-(opened * (s - 1) + words + n) % EVEN, opened)
        far = n - opened + spare or min(EVEN, opened)
        ty, tx, token = torch.arange(height)[:, None], torch.arange(width), torch.arange(height * width)
        window = (ty // y.tile * x.windows + tx // x.tile).flatten()
        place = (ty % y.tile * x.tile + tx % x.tile).flatten()
        queries = torch.zeros(y.windows * x.windows, y.tile * x.tile, dtype=torch.long)
        queries[window, place] = token
        tokens = torch.tensor(landmark_places(size, cell)) @ torch.tensor([width, 1])
        whole = pad(token.view(height, width), (0, C * sx - width, 0, R * sy - height), value=len(token))
        found = whole.view(R, sy, C, sx).transpose(1, 2).reshape(n, s)
        found = found.masked_fill(found == tokens[:, None], -1).sort(-1).values
        lacks = found == len(token)
        by_cells = found.where((found >= 0) & ~lacks, tokens[:, None]).flatten()
        sizes = (~lacks).sum(-1).float()
        unit = 1.0 if device.type == "cpu" else d**0.5
        log_c = (sizes.log() * unit).to(dtype).float() / unit
        rounded = log_c[0] - sizes[0].log()
        inside = rounded.expand(n, s).masked_fill(lacks, -math.inf)
        keys = opened * s + words
        bias = torch.cat([rounded.expand(keys), torch.full((far - n + opened,), -math.inf), log_c[opened:]])
        others = 1 - s * torch.eye(s)[0]
        agents = (y.agents[:, None, :, None] * C + x.agents[None, :, None, :]).flatten(2).flatten(0, 1)
        row, column = torch.arange(R)[:, None], torch.arange(C)
        near = torch.zeros(y.windows * x.windows, n).scatter(1, agents, AROUND)
        near = near.scatter(0, (row // y.side * x.windows + column // x.side).flatten()[None], 1.0)
        held = torch.cat([inside.flatten(), rounded.expand(words)]) if ragged else None
        sums = torch.stack([1 + MISSED * others, 1 - MISSED * others])
        made = queries.flatten(), window * y.tile * x.tile + place, tokens, by_cells, inside, held, sums
        more = torch.arange(n * s + words), log_c, bias if opened or words or ragged else None, agents, near
        return _Layout(opened, words, far, s, ragged, *(t if t is None else t.to(device) for t in (*made, *more)))


_kept_layout = lru_cache(maxsize=64)(_make_layout)
