"""Forge and its forks."""

from __future__ import annotations

from importlib.util import find_spec

from .a1111 import WebUI


class Forge(WebUI):
    """Forge, and Forge Neo."""

    name = "Forge"

    @classmethod
    def is_running(cls) -> bool:
        return find_spec("modules_forge") is not None and find_spec("backend") is not None


class ReForge(Forge):
    """reForge and Forge Classic: they have `ldm_patched` where Forge has `backend`."""

    name = "reForge"

    @classmethod
    def is_running(cls) -> bool:
        return find_spec("modules_forge") is not None and find_spec("backend") is None
