"""The methods of self-attention: one file each, all imported here, none of which loads torch."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    METHODS,
    UNTOUCHED,
    LayerPlan,
    Method,
    SelfAttention,
    method_named,
    register,
    selectable,
    unregister,
    untouched,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "UNTOUCHED", "LayerPlan", "Method", "SelfAttention", "method_named"]
__all__ += ["register", "selectable", "unregister", "untouched"]
