"""What a call of a model costs besides time: FLOPs and bytes of memory it asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Fused kernels that PyTorch's counter has no formula for.
_KERNELS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")


def _fused_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@contextmanager
def flops() -> Iterator[Callable[[], int]]:
    """Count the FLOPs of everything within; the function it gives says how many there were."""
    known = {getattr(torch.ops.aten, name): _fused_flops for name in _KERNELS if hasattr(torch.ops.aten, name)}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield counter.get_total_flops


class Allocations(TorchDispatchMode):
    """Counts the memory that operations allocate for their results; views of what is there count nothing.

    Attributes:
        total: bytes allocated in all.
        largest: bytes of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                size = t.untyped_storage().nbytes()
                self.total += size
                self.largest = max(self.largest, size)
        return result


def count(run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs, total bytes and the largest tensor's bytes of one call of `run`."""
    with flops() as counted, Allocations() as memory:
        run()
    return {"flops": counted(), "bytes": memory.total, "largest": memory.largest}
