"""The costs of a model's call besides time: FLOPs, and bytes of memory that it allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Fused kernels that PyTorch's counter lacks a formula for.
_KERNELS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")


def _fused_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@contextmanager
def flops() -> Iterator[Callable[[], int]]:
    """Count FLOPs in a `with` block; the function that it yields returns their number."""
    formulas = {getattr(torch.ops.aten, name): _fused_flops for name in _KERNELS if hasattr(torch.ops.aten, name)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        yield counter.get_total_flops


class Allocations(TorchDispatchMode):
    """Counts the memory that operations allocate for their results; views allocate nothing.

    Attributes:
        total: bytes allocated altogether.
        largest: bytes of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in operands:
                size = t.untyped_storage().nbytes()
                self.total += size
                self.largest = max(self.largest, size)
        return result


class Launches(TorchDispatchMode):
    """Counts the operators that compute something: those other than views, and those that only make room.

    Attributes:
        total: their number, which is that of kernels launched on a card, unless a library splits one.
    """

    _ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not (func.is_view or func.overloadpacket.__name__ in self._ROOM)
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs, total bytes and the largest tensor's bytes of one call of `run`."""
    with flops() as total, Allocations() as memory:
        run()
    return {"flops": total(), "bytes": memory.total, "largest": memory.largest}
