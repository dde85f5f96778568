"""Which few keys methods attend to: means over cells that follow the content, or heavy hitters too. No method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .grid import cells, sampled

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE, SUPERPIXEL, HEAVY = "sample", "superpixel", "heavy"
# Cells along each side of a block that gives one heavy hitter: docs/zoo.md has the figures of others.
_BLOCK = 2
# Channels of ones beside keys and values: one would do to count tokens, eight keep rows aligned.
_ONES = 8
# Channels of keys that no key comes near.
_FAR = 1e9
# Bytes of the copy of keys and values, beyond which rows of the batch are taken one at a time.
_MOST = 128 * 2**20


def superpixels(k: Tensor, v: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Average keys and values over superpixels of the keys.

    Each token joins the nearest, by its key, of the 3×3 sampled keys around it (SLIC's idea, Achanta et al., PAMI
    2012), once; those that are equally near share it. All by batched products in the layout of the cells: no sort, no
    search, nothing that waits for the device.

    Args:
        k: keys (B, H, N, d), N = height · width, in row-major order.
        v: values (B, H, N, d).
        size: (height, width) of the grid of tokens; any.
        cell: (height, width) of a cell in tokens, as in `agentsd.attention.tensors.sample_tokens`.

    Returns:
        Means of keys and of values (2, B, H, n, d), in the dtype of `k`.
    """
    import torch
    from torch.nn.functional import pad

    B, H, N, d = k.shape
    if B > 1 and 2 * B * H * N * (d + _ONES) * k.element_size() > _MOST:
        return torch.cat([superpixels(*row, size, cell) for row in zip(k.split(1), v.split(1), strict=True)], dim=1)
    (sy, sx), (rows, columns) = cell, (sampled(*axis) for axis in zip(size, cell, strict=True))
    r, c, R, C = len(rows), len(columns), cells(size[0], sy), cells(size[1], sx)
    tokens = _by_cell(k, v, size, cell)  # (B·H, R, C, sy·sx, 2 (d + 8))
    seeds = k.unflatten(2, size)[:, :, rows.start :: sy, columns.start :: sx].flatten(0, 1).float()
    # a frame of landmarks that are further away than any key, so that every cell has nine
    framed = pad(seeds, (0, 0, 1, 1 + C - c, 1, 1 + R - r), value=_FAR)
    nine, squares = _nine(framed), _nine(framed.square().sum(-1)[..., None])
    # −‖k − k̄‖² / 2, but for what is the same for all nine
    keys = tokens[..., :d].float().flatten(0, 2)
    closeness = torch.baddbmm(squares.flatten(0, 2), keys, nine.flatten(0, 2), beta=-0.5)
    joins = (closeness == closeness.amax(-1, keepdim=True)).to(k.dtype)
    sums = torch.bmm(joins.mT, tokens.flatten(0, 2)).unflatten(0, (B * H, R, C))
    # landmark (y, x) collects from the cells around it: from the one above what was given to its landmark below, …
    sums = pad(sums, (0, 0, 0, 0, 1, 1, 1, 1))
    whole, line, row, each, one = sums.stride()
    collected = sums.as_strided(
        (B * H, r, c, 3, 3, sums.shape[-1]),
        (whole, line, row, line - 3 * each, row - each, one),
        sums.storage_offset() + 8 * each,
    )
    totals = collected.sum((3, 4), dtype=torch.float32).flatten(1, 2).unflatten(-1, (2, d + _ONES))
    means = totals[..., :d] / totals[..., d:][..., :1].clamp(min=1)  # rounding might leave one empty
    return means.to(k.dtype).unflatten(0, (B, H)).movedim(-2, 0)


def count_heavy(landmarks: str, size: tuple[int, int], cell: tuple[int, int]) -> int:
    """Count the heavy hitters of a grid: 0 for other `landmarks`."""
    if landmarks != HEAVY:
        return 0
    return math.prod(cells(length, _BLOCK * side) for length, side in zip(size, cell, strict=True))


def heavy_weight(cell: tuple[int, int]) -> float:
    """log of the weight of a heavy hitter's key beside that of a sampled one, which stands for its whole cell."""
    return -math.log(math.prod(cell))


def heavy_hitters(k: Tensor, a: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Find the keys that a sample would miss: of each 2×2 cells, the one that the mean agent attends to most.

    A key that many queries attend to (a sink, a token of very high norm) mostly lies between the sampled ones. Heavy
    hitters are what caches of language models keep for the same reason (Zhang et al., "H2O", NeurIPS 2023, arXiv
    2306.14048); here each block of the grid gives one, so there is no sort, no search, and nothing that waits for the
    device.

    Args:
        k: keys (B, H, N, d), N = height · width, in row-major order.
        a: agents, which are queries (B, H, n, d).
        size: (height, width) of the grid of tokens; any.
        cell: (height, width) of a cell in tokens, as in `agentsd.attention.tensors.sample_tokens`.

    Returns:
        Indices of tokens (B, H, m), int64; m = ⌈height / 2 sy⌉ · ⌈width / 2 sx⌉.
    """
    from torch.nn.functional import max_pool2d

    scores = (k @ a.mean(2)[..., None]).unflatten(2, size)[..., 0]
    block = tuple(min(_BLOCK * side, length) for side, length in zip(cell, size, strict=True))
    return max_pool2d(scores, block, ceil_mode=True, return_indices=True)[1].flatten(2)


def taken_at(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens: x (B, H, N, d) at (B, H, m) → (B, H, m, d)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _by_cell(k: Tensor, v: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Keys, values and ones behind both (B·H, R, C, sy·sx, 2 (d + 8)); what a cell lacks at the edge is 0."""
    import torch
    from torch.nn.functional import pad

    (height, width), (sy, sx) = size, cell
    R, C = cells(height, sy), cells(width, sx)
    ones = k.new_ones(()).expand(*k.shape[:-1], _ONES)

    def laid_out(x: Tensor) -> Tensor:
        return x.unflatten(3, (C, sx)).unflatten(2, (R, sy)).transpose(3, 4)

    parts = [t.unflatten(2, size) for t in (k, ones, v, ones)]
    if (height, width) == (R * sy, C * sx):
        tokens = torch.cat([laid_out(t) for t in parts], dim=-1)
    else:
        tokens = laid_out(pad(torch.cat(parts, dim=-1), (0, 0, 0, C * sx - width, 0, R * sy - height)))
    return tokens.flatten(4, 5).flatten(0, 1)


def _nine(x: Tensor) -> Tensor:
    """(b, R + 2, C + 2, d) → (b, R, C, d, 9): each with its neighbours."""
    return x.unfold(1, 3, 1).unfold(2, 3, 1).flatten(4)
