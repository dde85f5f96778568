"""Corrected attention: exact for the cells that matter to a window of queries, a fitted landmark for each other cell.

With no cell opened these are corrected agents; with all of them opened it is full attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
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
# Bytes of the agents' weights P at a time: what the CPU's cache holds, and what other devices spare.
_CACHED, _SPARED = 4 * 2**20, 64 * 2**20


def corrected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: tuple[int, int],
    cell: tuple[int, int],
    opened: int = 0,
    text: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend to the keys of `opened` cells, and to one landmark of each other cell, with values fitted at the agents.

    Each cell of the grid has a landmark: one token j, which stands for the c tokens of its cell. Their queries are the
    agents A. Queries are taken in windows of about 16×16 tokens; what follows holds for each window.

        P   = σ(A Kᵀ · d^-½)                              once for all windows
        V_A = P V                                         full attention at the agents
        𝒪   = cells of largest mass + |mass − c p|        mass: P over the cell, p: P at j, both summed over agents
        W   = [P_𝒪, c P_j∉𝒪] / z                          what the approximation does at the agents; z: the sum
        Y   = V̄ + W̄ᵀ (W̄ W̄ᵀ + λ I)⁻¹ (V_A − W [V_𝒪, V̄])    W̄: W's columns of landmarks
        O   = σ(Q [K_𝒪, K̄]ᵀ · d^-½ + [0, log c]) [V_𝒪, Y]

    The agents of a window are those of its cells and of the ring of cells around it. Landmarks sit at another place in
    each cell, as in a Latin square, so that no texture hides between them. log c is a channel of the keys: fused
    kernels need no mask.

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

    Returns:
        (B, H, N, d). Only P exists as a matrix, some heads at a time; the fit is float32 whatever the tensors are.
    """
    at, given = _layout(q, size, cell), (q, k, v, *(text or ()))
    rows, heads = _at_once(q, at)
    with no_autocast(q.device.type):
        room = _Room(given)
        out = [
            _joined([_attend(at, opened, room, *piece) for piece in _pieces(row, heads, 1)], 2)
            for row in _pieces(given, rows, 0)
        ]
    return _joined(out, 0).transpose(1, 2)


def _landmarks_alone(at: _Layout, room: _Room, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, H, d): the equations with no cell opened, where P counts at the landmarks alone, and z cancels.

    V_A is one fused call, in the tensors' own dtype.
    """
    few = [t.index_select(2, at.tokens) for t in (q, k, v)]
    v_a = sdpa(few[0], k, v)
    tiles = _by_windows(q, at, room) if at.ragged else _tiles(q, at)
    count = at.windows * at.n * (at.agents.shape[1] + 4 * q.shape[-1])
    pairs = max(1, (_CACHED if room.kept is not None else _SPARED) // (4 * count))
    given = (*(t.flatten(0, 1) for t in (*few, v_a)), tiles)
    out = [_of_landmarks(at, *piece) for piece in _pieces(given, pairs, 0)]
    return _by_tokens(_joined(out, 0).unflatten(0, q.shape[:2]), at)


def _of_landmarks(at: _Layout, a: Tensor, k_bar: Tensor, v_bar: Tensor, v_a: Tensor, tiles: Tensor) -> Tensor:
    """(G, windows, tokens, d), for some pairs."""
    (G, _, d), agents = a.shape, at.agents
    scale, values = d**-0.5, v_bar.float()
    scores = torch.baddbmm(at.sizes.log(), a.float(), k_bar.float().mT, alpha=scale)
    w = torch.softmax(scores, -1)
    r = v_a.float() - w @ values
    w, r = (t.index_select(1, agents.flatten()).view(G, *agents.shape, -1) for t in (w, r))
    m = torch.linalg.vector_norm(w, dim=(-2, -1)).square() / agents.shape[1]
    y = cast_within_range(v_bar.dtype, values[:, None] + value_correction(w, r, m))
    if at.ragged:  # where all cells are alike, log c changes nothing
        k_bar = torch.cat([k_bar, at.log_c.to(k_bar.dtype).expand(G, -1, -1)], dim=-1)
        y = pad(y, (0, k_bar.shape[-1] - d))
    keys = k_bar[:, None].expand(-1, len(agents), -1, -1)
    return sdpa(tiles, keys, y, scale=scale)[..., :d]


def _tiles(q: Tensor, at: _Layout) -> Tensor:
    """Queries by windows (G, windows, tokens, d)."""
    (Y, X), (my, mx) = at.tiling, at.tile
    tiles = _cut(_padded(q, at.size, (Y * my, X * mx)), (Y, X))
    return tiles.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _attend(at: _Layout, opened: int, room: _Room, q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> Tensor:
    """(B, N, H, d) for heads that are laid out together: G = B · H pairs, of which some are computed at a time."""
    if not opened and not text:
        return _landmarks_alone(at, room, q, k, v)
    kv, tiles = _by_cells(k, v, at, room, *text), _by_windows(q, at, room)
    a = q.index_select(2, at.tokens).flatten(0, 1).float()
    most = room.cached if room.kept is not None else _SPARED
    pairs = max(1, most // (4 * at.n * kv.shape[1] * at.s))
    out = [_of_pairs(at, opened, room, *piece, bool(text)) for piece in _pieces((a, kv, tiles), pairs, 0)]
    return _by_tokens(_joined(out, 0).unflatten(0, q.shape[:2]), at)


def _of_pairs(at: _Layout, opened: int, room: _Room, a: Tensor, kv: Tensor, tiles: Tensor, text: bool) -> Tensor:
    """(G, windows, tokens, d): the equations. t: cells that text fills; D = d + channels of log c."""
    (G, n, d), (total, s, D) = a.shape, (*kv.shape[1:3], kv.shape[-1] // 2)
    keys, v_bar = kv.flatten(1, 2), kv[:, :n, 0, D:]
    p = _weights(a, keys, at, text, room)  # (G, n, (n + t) s)
    v_a = p @ keys[..., D : D + d]
    mass, p_j = (at.sums @ p.view(-1, s).mT).view(2, G, n, total)[..., :n]
    p_j = p_j * at.sizes
    chosen = None
    if opened:
        score = at.near @ mass
        score = score + (score - at.near @ p_j).abs()
        chosen = score.topk(opened, dim=-1, sorted=False).indices
    near = (opened + total - n) * s
    count = max(1, _SPARED // (8 * G * (near + n) * 2 * D))
    out = []
    for first in range(0, at.windows, count):
        some = slice(first, first + count)
        agents, open_cells = at.agents[some], None if chosen is None else chosen[:, some]
        w = p_j.index_select(1, agents.flatten()).view(G, *agents.shape, n)
        bias = at.log_c.expand(G, len(agents), -1, -1)
        if open_cells is not None:
            is_open = torch.zeros_like(w[:, :, 0], dtype=torch.bool).scatter(-1, open_cells, True)
            w, bias = w.masked_fill(is_open[:, :, None], 0), bias.masked_fill(is_open[..., None], -math.inf)
        at_keys, at_weights = _index(open_cells, agents, total, G, at)
        seen = room.taken(keys.flatten(0, 1), at_keys).view(G, len(agents), near + n, 2 * D)
        did = (w.flatten(1, 2) @ v_bar).view(*w.shape[:3], -1)
        if near:
            w_near = p.view(-1, s).index_select(0, at_weights).view(*w.shape[:3], near)
            did = did + w_near @ seen[..., :near, D:]
        z = did[..., d : d + 1].clamp(min=1e-30)
        w = w / z
        m = torch.linalg.vector_norm(w, dim=(-2, -1)).square()
        if near:
            rows = torch.linalg.vector_norm(w_near, dim=-1, keepdim=True)
            m = m + torch.linalg.vector_norm(rows / z, dim=(-2, -1)).square()
        r = v_a.index_select(1, agents.flatten()).view(*w.shape[:3], d) - did[..., :d] / z
        # rows that sum to 1 have at least this; those of the sharpest attention may have vanished
        m = (m / agents.shape[1]).clamp(min=1 / (near + n))
        y = v_bar[:, None, :, :d] + value_correction(w, r, m)
        if room.graded:  # the product of above needs it as it was
            seen = seen.clone()
        seen[..., near:, d:D] = bias
        seen[..., near:, D : D + d] = cast_within_range(tiles.dtype, y)
        seen = seen.to(tiles.dtype)
        out.append(sdpa(tiles[:, some], seen[..., :D], seen[..., D:], scale=d**-0.5)[..., :d])
    return _joined(out, 1)


def _weights(a: Tensor, keys: Tensor, at: _Layout, masked: bool, room: _Room) -> Tensor:
    """P = σ(A Kᵀ · d^-½) (G, n, keys)."""
    d = a.shape[-1]
    scale, out = d**-0.5, room.memory("p", (len(a), at.n, keys.shape[1]))
    bias = scale * keys[:, None, :, d] if masked or at.ragged else a.new_zeros(())
    scores = torch.baddbmm(bias, a, keys[..., :d].mT, beta=float(bias.dim() > 0), alpha=scale, out=out)
    if out is None and (room.graded or 4 * scores.numel() <= _SPARED):
        return torch.softmax(scores, -1)
    return torch.softmax(scores, -1, out=scores)


def _index(chosen: Tensor | None, agents: Tensor, total: int, G: int, at: _Layout) -> tuple[Tensor, Tensor]:
    """Which keys windows see, those of open cells, of text and landmarks, and which weights of theirs the agents have.

    Args:
        chosen: the cells that each window opens (G, windows, opened); None if there are none.
        agents: their agents (windows, a).
        total: n + t.
        G: number of pairs.
        at: the layout.
    """
    pair = torch.arange(G, device=agents.device)[:, None, None]
    landmarks = (at.s * total * pair + at.landmarks).expand(-1, len(agents), -1)
    always = torch.arange(at.n, total, device=agents.device).expand(G, len(agents), -1)
    if chosen is None and not always.shape[-1]:
        return landmarks.flatten(), landmarks
    chosen = always if chosen is None else torch.cat([chosen, always], dim=-1) if always.shape[-1] else chosen
    inside = (at.s * (chosen + total * pair))[..., None] + torch.arange(at.s, device=agents.device)
    of_agents = (total * (agents + at.n * pair))[..., None] + chosen[:, :, None]
    return torch.cat([inside.flatten(2), landmarks], dim=-1).flatten(), of_agents.flatten()


def _by_cells(k: Tensor, v: Tensor, at: _Layout, room: _Room, *text: Tensor) -> Tensor:
    """Keys, log c, values and ones (G, n + t, s, 2 D), float32, c = 1; −∞ where a cell lacks a token."""
    (R, C), (sy, sx), d, e, lead = at.grid, at.cell, k.shape[-1], at.log_c.shape[-1], k.shape[:2]
    words = cells(text[0].shape[2], at.s) if text else 0
    kv, fresh = room.filled("kv", (*lead, at.n + words, at.s, 2, d + e))
    image = kv[:, :, : at.n].unflatten(3, (sy, sx)).unflatten(2, (R, C))
    if fresh:
        kv[..., 1, d:] = 1
        kv[..., 0, d:] = 0
        if at.ragged:
            image[..., 0, d:] = at.held
    for i, t in enumerate((k, v)):
        image[..., i, :d] = _cut(_padded(t, at.size, (R * sy, C * sx)), (R, C))
    if text:
        more = kv[:, :, at.n :].flatten(2, 3)
        more[..., : text[0].shape[2], :, :d] = torch.stack(text, dim=-2)
        if fresh:
            more[..., text[0].shape[2] :, :, :] = 0
            more[..., text[0].shape[2] :, 0, d:] = -math.inf
    kv = kv.flatten(0, 1).flatten(3)
    rows = kv.flatten(1, 2)
    landmarks = rows.index_select(1, at.places)
    rows.index_copy_(1, at.places, kv[:, : at.n, 0].clone())
    kv[:, : at.n, 0] = landmarks
    return kv


def _by_windows(q: Tensor, at: _Layout, room: _Room) -> Tensor:
    """Queries by windows, and ones (G, windows, tokens, D)."""
    (Y, X), (my, mx), d = at.tiling, at.tile, q.shape[-1]
    tiles, fresh = room.filled("q", (*q.shape[:2], Y, X, my, mx, d + at.log_c.shape[-1]), q.dtype)
    if fresh:
        tiles[..., d:] = 1
    tiles[..., :d] = _cut(_padded(q, at.size, (Y * my, X * mx)), (Y, X))
    return tiles.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _by_tokens(x: Tensor, at: _Layout) -> Tensor:
    """(B, H, windows, tokens, d) → (B, N, H, d)."""
    (Y, X), (my, mx), (height, width) = at.tiling, at.tile, at.size
    image = x.unflatten(3, (my, mx)).unflatten(2, (Y, X)).permute(0, 2, 4, 3, 5, 1, 6)
    image = image.flatten(3, 4).flatten(1, 2)
    return image[:, :height, :width].flatten(1, 2)


def _padded(x: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(…, N, d) → (…, height, width, d), with zeros to the size `to`."""
    image = x.unflatten(2, size)
    return image if to == size else pad(image, (0, 0, 0, to[1] - size[1], 0, to[0] - size[0]))


def _cut(image: Tensor, tiling: tuple[int, int]) -> Tensor:
    """(…, rows · sy, columns · sx, d) → (…, rows, columns, sy, sx, d)."""
    return image.unflatten(3, (tiling[1], -1)).unflatten(2, (tiling[0], -1)).transpose(3, 4)


class _Room:
    """Memory for pieces: on the CPU, which would map new pages for each, the same for all of them."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        q = given[0]
        self.device, self.graded = q.device, torch.is_grad_enabled() and any(t.requires_grad for t in given)
        self.cached, self.kept = _CACHED, None
        if q.device.type == "cpu" and not compiling() and not self.graded:
            self.kept = {}

    def filled(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
        """Memory of this name and shape, and whether it is new."""
        if self.kept is None:
            return torch.empty(shape, dtype=dtype, device=self.device), True
        key = name, shape
        fresh = key not in self.kept
        if fresh:
            self.kept[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.kept[key], fresh

    def memory(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None if self.kept is None else self.filled(name, shape)[0]

    def taken(self, rows: Tensor, index: Tensor) -> Tensor:
        """rows (M, c) at an index of any shape (…) → (…, c)."""
        out = self.memory("taken", (index.numel(), rows.shape[-1]))
        return torch.index_select(rows, 0, index.flatten(), out=out).view(*index.shape, -1)


def _pieces(tensors: tuple[Tensor, ...], length: int, dim: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(length, dim) for t in tensors), strict=True)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _at_once(q: Tensor, at: _Layout) -> tuple[int, int]:
    """(rows, heads) that are taken at a time."""
    B, H, N, _ = q.shape
    most = _CACHED if q.device.type == "cpu" and not compiling() else _SPARED
    pairs = max(1, most // (4 * N * at.n))
    return (min(B, pairs // H), H) if pairs >= H else (1, pairs)


class _Axis(NamedTuple):
    """One axis of a grid: `length` tokens in cells of `cell`."""

    length: int
    cell: int

    @property
    def cells(self) -> int:
        return cells(self.length, self.cell)

    @property
    def windows(self) -> int:
        return cells(self.cells, max(1, WINDOW // self.cell))

    @property
    def side(self) -> int:
        """Cells of a window; all windows are alike, and the last one may reach beyond the edge."""
        return cells(self.cells, self.windows)

    @property
    def agents(self) -> Tensor:
        """The cells of each window's agents (windows, cells); at the edges the ring reaches further inwards."""
        count = min(self.cells, self.side + 2 * HALO)
        first = (self.side * torch.arange(self.windows) - HALO).clamp(0, self.cells - count)
        return first[:, None] + torch.arange(count)


class _Layout(NamedTuple):
    """What is where.

    Attributes:
        size: (height, width) in tokens.
        cell: that of a cell.
        grid: (rows, columns) of cells.
        tiling: (rows, columns) of windows.
        tile: (height, width) of a window in tokens.
        ragged: whether the edge cuts cells.
        tokens: the landmarks (n,) among the tokens.
        places: the landmarks (n,) among the tokens laid out by cells.
        landmarks: where they are after they changed places with the first token of their cell (n,).
        sums: what sums over a cell, and what takes its landmark (2, s), float32.
        sizes: c (n,), float32.
        held: log 1 = 0 for each token of a cell, −∞ where it lacks one (rows, columns, sy, sx, 1).
        log_c: log c in units of the scale, in channels of which the second holds what the first rounds off (n, D − d).
        agents: the cells of each window's agents (windows, a).
        near: their weight in the choice of cells (windows, n).
    """

    size: tuple[int, int]
    cell: tuple[int, int]
    grid: tuple[int, int]
    tiling: tuple[int, int]
    tile: tuple[int, int]
    ragged: bool
    tokens: Tensor
    places: Tensor
    landmarks: Tensor
    sums: Tensor
    sizes: Tensor
    held: Tensor
    log_c: Tensor
    agents: Tensor
    near: Tensor

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def s(self) -> int:
        return self.cell[0] * self.cell[1]

    @property
    def windows(self) -> int:
        return self.tiling[0] * self.tiling[1]


def _layout(q: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> _Layout:
    # tensors without values, as counters of FLOPs use them, must not be kept
    make = _kept_layout if type(q) is Tensor else _make_layout
    return make(tuple(size), tuple(cell), q.shape[-1], q.device, q.dtype)


def _make_layout(size: tuple[int, int], cell: tuple[int, int], d: int, device: Any, dtype: Any) -> _Layout:
    y, x = (_Axis(*axis) for axis in zip(size, cell, strict=True))
    (R, C), (sy, sx) = (y.cells, x.cells), cell
    channels = 8 - d % 8 if device.type != "cpu" else 1 if dtype == torch.float32 else 2
    with torch.inference_mode(False), torch.no_grad():
        row, column = torch.arange(R)[:, None], torch.arange(C)
        rows, columns = (size[0] - sy * row).clamp(max=sy), (size[1] - sx * column).clamp(max=sx)
        at_y, at_x = torch.tensor(landmark_places(size, cell)).mT.unflatten(1, (R, C))
        sizes = (rows * columns).flatten().float()
        log_c = sizes[:, None].log() * d**0.5
        coarse = log_c.to(dtype).float()
        log_c = pad(torch.cat([coarse, log_c - coarse], dim=-1), (0, max(0, channels - 2)))[:, :channels]
        inside = (torch.arange(sy)[:, None] < rows[..., None, None]) & (torch.arange(sx) < columns[..., None, None])
        held = torch.zeros(R, C, sy, sx).masked_fill(~inside, -math.inf)[..., None]
        agents = (y.agents[:, None, :, None] * C + x.agents[None, :, None, :]).flatten(2).flatten(0, 1)
        window = (row // y.side * x.windows + column // x.side).flatten()
        near = torch.zeros(y.windows * x.windows, R * C).scatter(1, agents, AROUND)
        near = near.scatter(0, window[None], 1.0)
        return _Layout(
            size,
            cell,
            (R, C),
            (y.windows, x.windows),
            (y.side * sy, x.side * sx),
            (R * sy, C * sx) != size,
            (at_y * size[1] + at_x).flatten().to(device),
            ((row * C + column) * sy * sx + at_y % sy * sx + at_x % sx).flatten().to(device),
            (torch.arange(R * C) * sy * sx).to(device),
            torch.stack([torch.ones(sy * sx), torch.eye(sy * sx)[0]]).to(device),
            sizes.to(device),
            held.to(device),
            log_c.to(device),
            agents.to(device),
            near.to(device),
        )


_kept_layout = lru_cache(maxsize=32)(_make_layout)
