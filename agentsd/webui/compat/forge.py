"""Forge and its forks, which keep the U-Net on the CPU until sampling."""

from __future__ import annotations

from importlib.util import find_spec

from modules import shared

from .a1111 import WebUI


class Forge(WebUI):
    """Forge, and Forge Neo."""

    name = "Forge"

    @classmethod
    def is_running(cls) -> bool:
        return find_spec("modules_forge") is not None and find_spec("backend") is not None

    def bring_to_device(self) -> None:
        from backend import memory_management

        memory_management.load_model_gpu(shared.sd_model.forge_objects.unet)


class ReForge(Forge):
    """reForge and Forge Classic: they have `ldm_patched` where Forge has `backend`."""

    name = "reForge"

    @classmethod
    def is_running(cls) -> bool:
        return find_spec("modules_forge") is not None and find_spec("backend") is None

    def bring_to_device(self) -> None:
        from ldm_patched.modules import model_management

        model_management.load_model_gpu(shared.sd_model.forge_objects.unet)
