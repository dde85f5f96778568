"""AgentSD's algorithm once more, with loops and whole matrices and nothing of agentsd in it, to compare with.

Every step is a matrix that can be looked at: which tokens are averaged into which (P), who gets whose value back (U),
and both attention maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Oracle:
    """The settings of one run; `destinations(height, width)` may replace the first tokens of the cells."""

    ratio: float = 0.4
    max_downsample: int = 1
    sx: int = 4
    sy: int = 4
    agent_ratio: float = 0.95
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    grid: int | None = None
    destinations: Any = None

    def block(self, block: nn.Module, x: Tensor, context: Tensor | None, size: tuple[int, int], d: int) -> Tensor:
        """One BasicTransformerBlock: x (B, N, C) of a grid of `size`, d times smaller than the latent."""
        eye = torch.eye(x.shape[1]).expand(x.shape[0], -1, -1)
        merged, agents = (eye, eye), None
        if d <= self.max_downsample:
            merged, agents = self._clusters(x, *size)
        keep = (eye, eye)
        P, U = merged if self.merge_attn else keep
        x = U @ self._self_attention(block.attn1, block.norm1(x), P, agents if self.merge_attn else None) + x
        P, U = merged if self.merge_crossattn else keep
        x = U @ attention(block.attn2, P @ block.norm2(x), context) + x
        P, U = merged if self.merge_mlp else keep
        return U @ block.ff(P @ block.norm3(x)) + x

    def _self_attention(self, attn: nn.Module, x: Tensor, P: Tensor, agents: Tensor | None) -> Tensor:
        tokens = P @ x
        if agents is None or not 2 * agents.shape[1] < tokens.shape[1]:
            return attention(attn, tokens, tokens)
        projected = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.to_q(agents @ x)
        q, k, v, a = (heads(t, attn.heads) for t in projected)
        return attn.to_out(tokens_of(by_matrices(q, k, v, a, self.k_scale2) + self.k_shortcut * v))

    def _clusters(self, x: Tensor, height: int, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((P, U) of merging, P of the agents): each (B, fewer, N), U the other way."""
        dst, N = self._destinations(height, width), x.shape[1]
        links = [_links(row, dst) for row in x]

        def members(ratio: float) -> Tensor:
            return torch.stack([_membership(N, dst, link[: int(N * ratio)]) for link in links])

        merged, agents = members(self.ratio), members(self.agent_ratio)
        if self.grid is not None:
            agents = cells(height, width, self.grid).expand(x.shape[0], -1, -1)
        return (_mean(merged), merged.mT), _mean(agents)

    def _destinations(self, height: int, width: int) -> list[int]:
        if self.destinations is not None:
            return self.destinations(height, width)
        return [y * self.sy * width + x * self.sx for y in range(height // self.sy) for x in range(width // self.sx)]


def _links(tokens: Tensor, dst: Sequence[int]) -> list[tuple[int, int]]:
    """(source, its most similar destination), the most similar pair first."""
    if not dst:
        return []
    unit = (tokens / tokens.norm(dim=-1, keepdim=True)).detach()
    links = []
    for src in sorted(set(range(len(tokens))) - set(dst)):
        similarity = unit[dst] @ unit[src]
        best = int(similarity.argmax())
        links.append((float(similarity[best]), src, dst[best]))
    links.sort(reverse=True)
    return [(src, to) for _, src, to in links]


def _membership(N: int, dst: Sequence[int], links: Sequence[tuple[int, int]]) -> Tensor:
    """(clusters, N), 1 where a token is in a cluster."""
    leader = list(range(N))
    for src, to in links:
        leader[src] = to
    names = sorted(set(leader))
    return torch.tensor([[float(leader[i] == name) for i in range(N)] for name in names])


def _mean(members: Tensor) -> Tensor:
    return members / members.sum(-1, keepdim=True)


def cells(height: int, width: int, s: int) -> Tensor:
    """(agents, N), 1 where a token is in an s × s cell."""
    of = torch.tensor([(y // s) * -(-width // s) + x // s for y in range(height) for x in range(width)])
    return torch.nn.functional.one_hot(of).T.float()


def softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def heads(x: Tensor, number: int) -> Tensor:
    B, N, C = x.shape
    return x.reshape(B, N, number, C // number).permute(0, 2, 1, 3)


def tokens_of(x: Tensor) -> Tensor:
    B, H, N, d = x.shape
    return x.permute(0, 2, 1, 3).reshape(B, N, H * d)


def attention(attn: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Plain attention."""
    context = x if context is None else context
    q, k, v = (heads(t, attn.heads) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
    return attn.to_out(tokens_of(softmax(scores) @ v))


def by_matrices(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, k_scale2: float = 1.0, bias1: Any = 0.0, bias2: Any = 0.0
) -> Tensor:
    """Agent attention as the paper's equation 4 is written."""
    scale = q.shape[-1] ** -0.5
    aggregation = softmax(torch.einsum("bhnd,bhmd->bhnm", a, k) * scale + bias1)
    broadcast = softmax(torch.einsum("bhnd,bhmd->bhnm", q, a) * scale**k_scale2 + bias2)
    return broadcast @ (aggregation @ v)


@contextmanager
def answering(unet: nn.Module, oracle: Oracle, latent: tuple[int, int]) -> Iterator[None]:
    """A `with` block in which the oracle computes the U-Net's transformer blocks."""
    found = [(t, block) for t in unet.modules() if hasattr(t, "transformer_blocks") for block in t.transformer_blocks]

    def forward(block: nn.Module, parent: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = sizes[parent]
        return oracle.block(block, x, context, (height, width), round(latent[0] / height))

    sizes: dict[nn.Module, tuple[int, int]] = {}
    handles = []
    for parent, block in found:
        handles.append(parent.register_forward_pre_hook(lambda m, args: sizes.update({m: tuple(args[0].shape[2:])})))
        block._forward = partial(forward, block, parent)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, block in found:
            del block._forward
