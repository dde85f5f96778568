"""Running the tests on another device: `AGENTSD_DEVICE=cuda pytest tests/test_patch_layers.py`."""

from __future__ import annotations

from typing import Any

from torch.utils._device import DeviceContext


class OnDevice(DeviceContext):
    """Makes tensors on a device unless they are asked for elsewhere.

    What a CPU generator draws is drawn there and moved, so that all devices see the same numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and kwargs.get("device") is None:
            made = func(*args, **{**kwargs, "device": "cpu"}) if "out" not in kwargs else func(*args, **kwargs)
            return made.to(self.device)
        return super().__torch_function__(func, types, args, kwargs)
