"""Differences between WebUIs. The only folder that imports one, apart from the script itself.

A feature that a WebUI lacks counts as off, so that Forge and its forks need no file of their own.
"""

from __future__ import annotations

from modules.ui_components import InputAccordion

from .a1111 import SHARED_PACKAGE, WebUI
from .sdnext import SDNext

__all__ = ["HOST", "SHARED_PACKAGE", "InputAccordion", "WebUI"]

# The first that recognises itself; AUTOMATIC1111 last, which takes whatever nobody else does
_FAMILIES: tuple[type[WebUI], ...] = (SDNext, WebUI)

HOST: WebUI = next(family for family in _FAMILIES if family.is_running())()
