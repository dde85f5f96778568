"""Agent attention: the paper on one page.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import FIT_STEPS


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    *,
    k_scale2: float = 1.0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """σ(Q Aᵀ · (d^-½)^k_scale2 + B₂) σ(A Kᵀ · d^-½ + B₁) V (section 3.2, equation 4), without the shortcut.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, n, d).
        k_scale2: exponent of the broadcast's scale; 1 is the paper's equation, AgentSD uses 0.3.
        bias1: agent bias of the aggregation, broadcastable to (B, H, n, M).
        bias2: agent bias of the broadcast, broadcastable to (B, H, N, n).

    Returns:
        (B, H, N, d). Memory and time are linear in N and M; no (N, n) matrix is kept by a fused kernel.
    """
    scale = q.shape[-1] ** -0.5
    v_a = F.scaled_dot_product_attention(a, k, v, attn_mask=bias1, scale=scale)
    return F.scaled_dot_product_attention(q, a, v_a, attn_mask=bias2, scale=scale**k_scale2)


# How far fitted values may exceed what they are fitted from.
FIT_GROWTH = 16.0


def corrected_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, k_bar: Tensor, v_bar: Tensor, *, steps: int = FIT_STEPS
) -> Tensor:
    """Attention to a few keys whose values are fitted, so that at the agents it is full attention.

        V_A = σ(A Kᵀ · d^-½) V                 agent aggregation
        W   = σ(A K̄ᵀ · d^-½)
        Y   ≈ argmin ‖W Y − V_A‖, from Y = V̄
        O   = σ(Q K̄ᵀ · d^-½) Y                 agent broadcast, corrected

    Without the fit (Y = V̄) this is attention to the few keys and values. With an exact one it is the Nyström
    approximation σ(Q K̄ᵀ) W⁺ σ(A Kᵀ) V (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902), whose inverse is
    what agent attention leaves out. W is close to singular: a few steps of the fit recover what carries weight and
    leave alone what would only be amplified.

    Args:
        q: queries (B, H, N, d).
        k: keys (B, H, M, d).
        v: values (B, H, M, d).
        a: agent tokens (B, H, m, d), queries too.
        k_bar: the few keys (B, H, n, d): a sample, as the patch takes it, or means.
        v_bar: their values (B, H, n, d), which the fit begins with.
        steps: steps of the fit, at least 0.

    Returns:
        (B, H, N, d). The m × n matrix W and the fit are float32 whatever the tensors are. A row of the batch and head
        whose fit is not finite, or grows out of proportion, uses V̄: attention to the few keys and values.
    """
    v_a = F.scaled_dot_product_attention(a, k, v)
    with no_autocast(q.device.type):
        y = _fitted(a.float(), k_bar.float(), v_a.float(), v_bar.float(), steps).to(v.dtype)
    return F.scaled_dot_product_attention(q, k_bar, y)


def _fitted(a: Tensor, k_bar: Tensor, v_a: Tensor, v_bar: Tensor, steps: int) -> Tensor:
    w = (a @ k_bar.mT * a.shape[-1] ** -0.5).softmax(dim=-1)
    y = fit_values(w, v_a, v_bar, steps)
    # A comparison with NaN is false. Decided on the device: nothing waits for it.
    sound = _largest(y) <= FIT_GROWTH * torch.maximum(_largest(v_a), _largest(v_bar))
    return torch.where(sound, y, v_bar)


def fit_values(w: Tensor, v_a: Tensor, y: Tensor, steps: int) -> Tensor:
    """Take `steps` conjugate directions of ‖W Y − V_A‖² from Y, for every column (channel) by itself.

    The directions are those of conjugate gradients on the least-squares problem (CGLS). Each image W p is made
    orthogonal to all earlier ones: left to the recursion, rounding errors grow a thousandfold within six steps, and
    the picture would depend on the batch. The residual never grows, whatever W is. Products only: no factorisation,
    and nothing that waits for the device.

    Args:
        w: (..., m, n).
        v_a: (..., m, d).
        y: (..., n, d), the start.
        steps: at least 0.

    Returns:
        The fitted values (..., n, d).
    """
    residual, taken = v_a - w @ y, []
    for _ in range(steps):
        p = w.mT @ residual
        image = w @ p
        before = _dot(image, image)
        for other, other_image in taken:
            overlap = _dot(image, other_image)
            p, image = p - overlap * other, image - overlap * other_image
        square = _dot(image, image)
        # a direction that is rounding errors only is none: the column is solved, or W can do no more for it
        fresh = square > 1e-8 * before
        length = torch.where(fresh, square, 1.0).rsqrt() * fresh
        p, image = p * length, image * length
        gain = _dot(image, residual)
        y, residual = torch.addcmul(y, gain, p), torch.addcmul(residual, gain, image, value=-1)
        taken.append((p, image))
    return y


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-2, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A `with` block without autocast, also on devices that have none, where torch.autocast may raise."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return nullcontext()


def add_scaled(out: Tensor, v: Tensor, weight: float) -> Tensor:
    """out + weight · v, in place where autograd does not need `out`."""
    if not weight:
        return out
    return torch.add(out, v, alpha=weight) if out.requires_grad else out.add_(v, alpha=weight)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H·d) → (B, H, N, d), as a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) → (B, N, H·d); a view where the fused kernel laid its output out by tokens."""
    return x.transpose(1, 2).flatten(2)


def pool_tokens(x: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """Average tokens over cells of the grid; the ragged edge is averaged over what it has.

    Args:
        x: tokens in row-major order (B, height · width, C).
        height: rows of the grid.
        width: columns of the grid.
        cell: (height, width) of a cell in tokens.

    Returns:
        (B, ⌈height / cell height⌉ · ⌈width / cell width⌉, C), in row-major order.
    """
    # A view in the channels-last layout, which is what this kernel is fast in: several times faster than a mean over
    # two axes, and the result is laid out by tokens again.
    image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(image, cell, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)


def sample_tokens(x: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """Take one token near the middle of each cell of the grid: a regular sample; shapes as in `pool_tokens`.

    A cell cut short by the edge before its middle gives none.
    """
    sy, sx = (min(side, length) for side, length in zip(cell, (height, width), strict=True))
    grid = x.unflatten(1, (height, width))
    return grid[:, (sy - 1) // 2 :: cell[0], (sx - 1) // 2 :: cell[1]].flatten(1, 2)


def lost_by_pooling(x: Tensor, pooled: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """x − up(pooled): what averaging over cells took from each token; shapes as in `pool_tokens`."""
    sy, sx = cell
    rows, columns = -(-height // sy), -(-width // sx)
    up = pooled.unflatten(1, (rows, 1, columns, 1)).expand(-1, rows, sy, columns, sx, -1)
    up = up.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return x - up.flatten(1, 2)


class AgentBias(nn.Module):
    """Agent bias (section 3.3): column, row and block components, interpolated to the grid and summed.

    Args:
        heads: number of heads H.
        agents: number of agent tokens n.
        size: (height, width) of the grid that the column and row components are kept at.
        block: side of the block component's grid, h₀ = w₀ in the paper.
    """

    def __init__(self, heads: int, agents: int, size: tuple[int, int], block: int = 7) -> None:
        super().__init__()
        height, width = size
        self.row = nn.Parameter(torch.zeros(heads, agents, height, 1))
        self.column = nn.Parameter(torch.zeros(heads, agents, 1, width))
        self.block = nn.Parameter(torch.zeros(heads, agents, block, block))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The bias for a grid of `size` = (height, width), of shape (1, H, n, height · width)."""
        height, width = size
        total = (
            F.interpolate(self.row, (height, 1), mode="bilinear")
            + F.interpolate(self.column, (1, width), mode="bilinear")
            + F.interpolate(self.block, size, mode="bilinear")
        )
        return total.flatten(2).unsqueeze(0)


class AgentAttention(nn.Module):
    """The paper's agent attention module (section 3.3, Figure 1b), for training.

    O = σ(Q Aᵀ + B₂) σ(A Kᵀ + B₁) V + DWC(V), with A pooled from Q and the scales of `agent_attention`.

    Args:
        dim: channels C of the tokens; divisible by `heads`.
        heads: number of heads H.
        agents: number of agent tokens n: (rows, columns) of the pooled grid, or a square number.
        k_scale2: exponent of the broadcast's scale; 1 is the paper's.
        size: (height, width) that the agent bias is kept at; other sizes are interpolated.
        qkv_bias: give the Q, K and V projections a bias.
        dwc_kernel: odd side of the depthwise convolution's kernel.

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
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_out = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, dwc_kernel, padding=dwc_kernel // 2, groups=dim)
        n = self.agents[0] * self.agents[1]
        self.bias1 = AgentBias(heads, n, size)
        self.bias2 = AgentBias(heads, n, size)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens in row-major order (B, N, C).
            size: (height, width) of the grid with height · width = N; None takes a square.

        Raises:
            ValueError: `size` does not fit the number of tokens.
        """
        size = _grid_size(x.shape[1], size)
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
    side = int(max(agents, 0) ** 0.5 + 0.5) if isinstance(agents, int) else 0
    grid = (side, side) if side * side == agents else agents
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"agents must be a positive square number or (rows, columns), got {agents!r}")
    return grid[0], grid[1]


def _grid_size(tokens: int, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        side = int(tokens**0.5 + 0.5)
        size = (side, side)
    if size[0] * size[1] != tokens:
        raise ValueError(f"size must be (height, width) with height · width = {tokens} tokens, got {size}")
    return size


def _to_image(x: Tensor, size: tuple[int, int]) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=size[0], w=size[1])
