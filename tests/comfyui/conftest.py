"""A real ComfyUI, started once for all tests. AGENTSD_COMFYUI names its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfyui_host import PACK, ComfyUI
from servers import REPOSITORY


@pytest.fixture(scope="session")
def root() -> Path:
    folder = os.environ.get("AGENTSD_COMFYUI")
    if not folder:
        pytest.skip("AGENTSD_COMFYUI does not name a ComfyUI folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def comfyui(root, tmp_path_factory) -> Iterator[ComfyUI]:
    """ComfyUI with our nodes, and with the packs that AGENTSD_COMFYUI_PACKS names."""
    packs = [Path(folder) for folder in os.environ.get("AGENTSD_COMFYUI_PACKS", "").split(os.pathsep) if folder]
    with ComfyUI(root, tmp_path_factory.mktemp("comfyui"), (REPOSITORY, PACK, *packs)).running() as host:
        yield host


@pytest.fixture(scope="session")
def plain(comfyui) -> Callable[..., np.ndarray]:
    """The latent of a graph without our nodes; made once for equal arguments."""
    made: dict[str, np.ndarray] = {}

    def latent(**given) -> np.ndarray:
        if (key := repr(given)) not in made:
            made[key], _ = comfyui.ran(**given)
        return made[key]

    return latent


@pytest.fixture(scope="session")
def never_installed(root, tmp_path_factory) -> dict[str, np.ndarray]:
    """Latents of both layouts, by a ComfyUI that has never seen our nodes."""
    with ComfyUI(root, tmp_path_factory.mktemp("bare"), (PACK,)).running() as host:
        sizes = {"SD 1": (256, 256), "SDXL": (512, 512)}
        return {layout: host.ran(layout=layout, size=size)[0] for layout, size in sizes.items()}


@pytest.fixture(scope="session")
def lora(comfyui) -> tuple[str, dict[str, object]]:
    """A node that loads a LoRA of the small model's self-attention, and its inputs."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_"
    shapes = {"up": (64, 4), "down": (4, 64)}
    keys = {f"{name}{p}.lora_{way}.weight": shape for p in "qkv" for way, shape in shapes.items()}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in keys.items()}
    save_file(tensors, comfyui.base / "models/loras/tiny.safetensors")
    return "LoraLoaderModelOnly", {"lora_name": "tiny.safetensors", "strength_model": 1.0}
