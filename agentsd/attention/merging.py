"""Token merging (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604): match, merge, unmerge.

A matching holds indices only: the cluster of every token, so that merging is one indexed sum and unmerging one row
look-up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities are computed in slabs of at most this many entries per row of the batch, so that the N_src × N_dst matrix
# is never materialised.
_SLAB = 2**20
# Devices with a PyTorch kernel for means over bags of rows. It accumulates in float32, always in the same order.
_BAG_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Partition:
    """Destination and source tokens of a grid, shared by all rows of a batch."""

    dst: Tensor  # indices of the destination tokens (N_dst,), one per whole cell
    src: Tensor  # indices of all other tokens (N − N_dst,)
    place: Tensor  # place of each token in the list of `dst` and `src` (N,)

    def to(self, device: torch.device) -> Partition:
        return Partition(self.dst.to(device), self.src.to(device), self.place.to(device))


@dataclass(frozen=True)
class Clusters:
    """Assignment of tokens to clusters."""

    shape: tuple[int, int]  # (B, N), batch size and number of tokens
    count: int  # number of clusters per row of the batch
    index: Tensor  # cluster of each token of the flattened batch (B · N,); row b has clusters [b·count, (b+1)·count)
    order: Tensor  # the tokens of the flattened batch sorted by cluster (B · N,)
    starts: Tensor  # offset of each cluster's first token in `order` (B · count,)

    def merge(self, x: Tensor) -> Tensor:
        """Average the tokens of each cluster: (B, N, C) → (B, count, C)."""
        B, N, C = x.shape
        if x.device.type in _BAG_DEVICES:
            # an order of magnitude faster than an indexed sum
            return F.embedding_bag(self.order, x.reshape(B * N, C), self.starts, mode="mean").view(B, self.count, C)
        # sum in float32: in half precision a cluster of hundreds of tokens would lose its last members
        total = x.new_zeros(B * self.count, C, dtype=torch.float32)
        total.index_add_(0, self.index, x.reshape(B * N, C).float())
        ends = F.pad(self.starts[1:], (0, 1), value=B * N)
        return (total * (ends - self.starts).float().reciprocal()[:, None]).to(x.dtype).view(B, self.count, C)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy each cluster's value to its tokens: (B, count, C) → (B, N, C)."""
        B, N = self.shape
        return y.reshape(B * self.count, -1).index_select(0, self.index).view(B, N, -1)


@dataclass(frozen=True)
class Matching:
    """The clusters of one block."""

    shape: tuple[int, int]  # (B, N), batch size and number of tokens
    merged: Clusters | None = None  # of merged tokens; None if none are merged
    agents: Clusters | None = None  # those that agents are averaged over; None if there are none
    dst: Tensor | None = None  # the destination tokens (N_dst,); in each row dst[i] belongs to cluster i


def partition_seed(seed: int, timestep: float | None, height: int, width: int, sx: int, sy: int) -> int:
    """Derive a seed from the arguments alone: not from the batch, the device or earlier calls."""
    key = repr((seed, timestep, height, width, sx, sy)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def partition(height: int, width: int, sx: int, sy: int, seed: int | None = None) -> Partition:
    """Choose one destination token in each whole sy × sx cell of a height × width grid, on the CPU.

    At random by `seed`, or the first if it is None. No global generator is touched.
    """
    token = torch.arange(height * width).view(height, width)
    dst = token[: height // sy * sy : sy, : width // sx * sx : sx]  # the first of each cell
    if seed is not None:
        # a shape of rows and columns: the generator's numbers depend on nothing else
        pick = torch.randint(sy * sx, dst.shape, generator=torch.Generator().manual_seed(seed))
        dst = dst + pick // sx * width + pick % sx
    dst = dst.flatten()
    is_dst = torch.zeros(height * width, dtype=torch.uint8)
    is_dst[dst] = 1
    src = is_dst.argsort(stable=True)[: height * width - len(dst)]
    return Partition(dst, src, torch.cat([dst, src]).argsort())


@torch.no_grad()
def match(x: Tensor, part: Partition, r: int, agent_r: int) -> Matching:
    """Match source tokens to their most similar destination tokens, and cluster the r and agent_r most similar.

    x: tokens (B, N, C), of which no reference is kept; r and agent_r, of tokens and of agents: 0 … N − N_dst.
    """
    B, N, _ = x.shape
    similarity, nearest = _nearest(x, part)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    steps = torch.arange(B * N, device=x.device)
    rank = torch.empty_like(order).scatter_(1, order, steps[: order.shape[1]].expand_as(order))
    merged, agents = (_cluster(part, rank, nearest, number, steps) if number else None for number in (r, agent_r))
    return Matching((B, N), merged, agents, part.dst)


def _nearest(x: Tensor, part: Partition) -> tuple[Tensor, Tensor]:
    """Find the most similar destination of each source token: its cosine similarity and index, both (B, N_src)."""
    # in x's own dtype, like the reference: a float32 copy would take a fifth of the time
    unit = F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
    dst = unit.index_select(1, part.dst).transpose(1, 2)
    step = max(1, _SLAB // max(1, part.dst.numel()))
    best = [(unit.index_select(1, src) @ dst).max(dim=-1) for src in part.src.split(step)]
    values, indices = (torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*best, strict=True))
    return values, indices


def _cluster(part: Partition, rank: Tensor, nearest: Tensor, r: int, steps: Tensor) -> Clusters:
    """Let the r most similar source tokens join their destination's cluster; every other one is its own cluster.

    `steps` are the numbers from 0 to B · N − 1, made once for whatever needs some of them.
    """
    B, n_src = rank.shape
    n_dst = part.dst.numel()
    N, count = n_src + n_dst, n_src + n_dst - r
    slot = torch.where(rank < r, nearest, rank + (n_dst - r))
    slot = torch.cat([steps[:n_dst].expand(B, -1), slot], dim=1).index_select(1, part.place)
    index = slot.add_(steps[:B, None], alpha=count).flatten()
    ordered, order = index.sort(stable=True)
    # no count of members, for which a device would have to be waited for
    return Clusters((B, N), count, index, order, torch.searchsorted(ordered, steps[: B * count]))
