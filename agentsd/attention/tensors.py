"""Token operations shared by the methods: attention itself, heads, and the cells of a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eager import compiling
from .grid import Grid

# Computes attention of q, k, v (B, H, N, d) without a mask at the scale d^-½, as (B, H, N, d)
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

_KERNEL: ContextVar[Kernel | None] = ContextVar("agentsd_kernel", default=None)


@contextmanager
def attention_by(kernel: Kernel) -> Iterator[None]:
    """Compute attention by a host's own kernel in a `with` block, so that what the user chose there serves us too."""
    token = _KERNEL.set(kernel)
    try:
        yield
    finally:
        _KERNEL.reset(token)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute attention of q, k, v (B, H, N, d) by PyTorch's kernel, or by the one of `attention_by`.

    Calls with a mask are PyTorch's always: fast kernels refuse masks, or disregard them.
    """
    # the compiler follows no context variable; no graph contains answers for a host that has a kernel of its own
    kernel = None if compiling() else _KERNEL.get()
    if kernel is None or attn_mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    return kernel(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast in a `with` block, also on devices without it, where torch.autocast may raise."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return nullcontext()


def add_scaled(out: Tensor, v: Tensor, weight: float) -> Tensor:
    """Compute out + weight · v, in place where autograd does not need `out`."""
    add = torch.add if out.requires_grad else Tensor.add_
    return add(out, v, alpha=weight) if weight else out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split heads, as a view: (B, N, H·d) → (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Join heads: (B, H, N, d) → (B, N, H·d); a view where the fused kernel laid out its output by tokens."""
    return x.transpose(1, 2).flatten(2)


def pool_tokens(x: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """Average tokens x (B, height · width, C), in row-major order, over cells of (height, width) tokens: (B, cells, C).

    Cells cut short by the edge average the tokens they have.
    """
    # a channels-last view: several times faster than a mean over two axes, and the result is laid out by tokens again
    image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(image, cell, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)


def lost_by_pooling(x: Tensor, pooled: Tensor, height: int, width: int, cell: tuple[int, int]) -> Tensor:
    """Compute x − up(pooled), the detail lost by averaging over cells; shapes as in `pool_tokens`."""
    (sy, sx), (rows, columns) = cell, Grid(height, width).cells(cell)
    up = pooled.unflatten(1, (rows, 1, columns, 1))
    if (rows * sy, columns * sx) == (height, width):
        return (x.unflatten(1, (rows, sy, columns, sx)) - up).flatten(1, 4)
    up = up.expand(-1, rows, sy, columns, sx, -1).flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return (x.unflatten(1, (height, width)) - up).flatten(1, 2)
