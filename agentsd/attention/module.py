"""The paper's module, for training (Han et al., ECCV 2024, arXiv 2312.08874, section 3.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .agent import agent_attention
from .tensors import join_heads, split_heads


class AgentBias(nn.Module):
    """Agent bias (section 3.3): row, column and block components, interpolated to the grid and summed.

    Args:
        heads: number of heads H.
        agents: number of agent tokens n.
        size: (height, width) of the grid at which the row and column components are stored.
        block: side of the block component's grid, h₀ = w₀ in the paper.
    """

    def __init__(self, heads: int, agents: int, size: tuple[int, int], block: int = 7) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(heads, agents, size[0], 1))
        self.column = nn.Parameter(torch.zeros(heads, agents, 1, size[1]))
        self.block = nn.Parameter(torch.zeros(heads, agents, block, block))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Interpolate the bias to a grid of `size` = (height, width): (1, H, n, height · width)."""
        parts = (self.row, (size[0], 1)), (self.column, (1, size[1])), (self.block, size)
        row, column, rest = (F.interpolate(part, to, mode="bilinear") for part, to in parts)
        return (row + column + rest).flatten(2).unsqueeze(0)


class AgentAttention(nn.Module):
    """The paper's agent attention module (section 3.3, Figure 1b), for training.

    O = σ(Q Aᵀ + B₂) σ(A Kᵀ + B₁) V + DWC(V), with A pooled from Q and the scales of `agent_attention`.

    Args:
        dim: channels C of the tokens; divisible by `heads`.
        heads: number of heads H.
        agents: number of agent tokens n: (rows, columns) of the pooled grid, or a square number.
        k_scale2: exponent of the broadcast's scale; 1 is the paper's.
        size: (height, width) at which the agent bias is stored; other sizes are interpolated.
        qkv_bias: add a bias to the Q, K and V projections.
        dwc_kernel: side of the depthwise convolution's kernel, odd.

    Raises:
        ValueError: `dim` is not divisible by `heads`, `agents` is not a square number, or the kernel is even.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        agents: int | tuple[int, int],
        k_scale2: float = 1.0,
        *,
        size: tuple[int, int] = (16, 16),
        qkv_bias: bool = False,
        dwc_kernel: int = 3,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and heads {heads}")
        if dwc_kernel < 1 or dwc_kernel % 2 == 0:
            raise ValueError(f"dwc_kernel must be odd and positive, got {dwc_kernel}")
        self.agents = _agent_grid(agents)
        self.heads, self.k_scale2 = heads, k_scale2
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, dwc_kernel, padding=dwc_kernel // 2, groups=dim)
        self.bias1, self.bias2 = (AgentBias(heads, math.prod(self.agents), size) for _ in range(2))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend over tokens x (B, N, C) in row-major order, of a grid of `size`, (height, width); None: a square one.

        Raises:
            ValueError: `size` does not match the number of tokens.
        """
        tokens = x.shape[1]
        size = (int(tokens**0.5 + 0.5),) * 2 if size is None else size
        if size[0] * size[1] != tokens:
            raise ValueError(f"size must be (height, width) with height · width = {tokens} tokens, got {size}")
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        a = F.adaptive_avg_pool2d(_to_image(q, size), self.agents).flatten(2).transpose(1, 2)
        out = agent_attention(
            *(split_heads(t, self.heads) for t in (q, k, v, a)),
            k_scale2=self.k_scale2,
            bias1=self.bias1(size).to(q.dtype),
            bias2=self.bias2(size).transpose(-1, -2).to(q.dtype),
        )
        shortcut = self.dwc(_to_image(v, size)).flatten(2).transpose(1, 2)
        return self.to_out(join_heads(out) + shortcut)


def _agent_grid(agents: int | tuple[int, int]) -> tuple[int, int]:
    side = round(max(agents, 0) ** 0.5) if isinstance(agents, int) else 0
    grid = (side, side) if side * side == agents else agents
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"agents must be a positive square number or (rows, columns), got {agents!r}")
    return grid[0], grid[1]


def _to_image(x: Tensor, size: tuple[int, int]) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=size[0], w=size[1])
