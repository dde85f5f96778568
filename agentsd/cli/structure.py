"""U-Nets without weights, for commands that need only their structure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CommandError
from .models import EMBEDDED, NOT_CACHED, SINGLE_FILES, folder_or_hub_id, shapes_of

_PREFIX = "model.diffusion_model."


def bare_unet(name: str, download: bool = False) -> tuple[nn.Module, int, int]:
    """Build a model's U-Net on the meta device; return it, its default latent size, and the pixels per latent position.

    Args:
        name: "embedded", a diffusers folder, a single-file checkpoint, or a hub id.
        download: download a configuration that is not in the local cache.

    Raises:
        CommandError: the model does not exist, or it has no U-Net that diffusers knows.
    """
    from diffusers import UNet2DConditionModel

    if name == EMBEDDED:
        from ..embedded.model import SIZE, read_json

        config, size, factor = read_json("config.json")["unet"], SIZE, 1
    else:
        single = Path(name).suffix in SINGLE_FILES
        config = config_of_checkpoint(shapes_of(Path(name))) if single else _read_config(name, download)
        if config is None:
            raise CommandError(f"{name} has no U-Net of Stable Diffusion's layout")
        size, factor = config.get("sample_size") or 64, 8
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config)), size, factor
    except Exception as error:  # an invalid configuration can raise all kinds of errors
        raise CommandError(f"the U-Net of {name} cannot be built: {error}") from error


def _read_config(name: str, download: bool) -> dict[str, Any]:
    folder = Path(folder_or_hub_id(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=not download, allow_patterns=["unet/config.json"]))
        except (OSError, ValueError) as error:
            raise CommandError(NOT_CACHED.format(name)) from error
    file = folder / "unet" / "config.json"
    if not file.is_file():
        raise CommandError(f"{name} has no U-Net: there is no unet/config.json")
    return json.loads(file.read_text(encoding="utf-8"))


def config_of_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Derive the diffusers configuration of an LDM or sgm checkpoint's U-Net from its tensors' names and shapes.

    The number of heads cannot be derived: it is taken to be that of Stable Diffusion 1 (8 heads), or of 2 and XL (heads
    of 64 channels) if the projections are linear. Return None if there is no such U-Net.
    """
    unet = {name.removeprefix(_PREFIX): x.shape for name, x in state.items() if name.startswith(_PREFIX)}
    context = next((s[1] for name, s in unet.items() if name.endswith("attn2.to_k.weight")), None)
    if "input_blocks.0.0.weight" not in unet or context is None:
        return None
    levels = _levels(unet)
    linear = any(name.endswith("proj_in.weight") and len(s) == 2 for name, s in unet.items())
    channels, depths = ([level[key] for level in levels] for key in ("channels", "depth"))
    config = {
        "in_channels": unet["input_blocks.0.0.weight"][1],
        "out_channels": unet["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": levels[0]["resnets"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "transformer_layers_per_block": [max(1, d) for d in depths],
        "cross_attention_dim": context,
        "attention_head_dim": [max(1, c // 64) for c in channels] if linear else 8,
        "use_linear_projection": linear,
        "sample_size": 64,
    }
    if "label_emb.0.0.weight" in unet:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "sample_size": 128}
        config |= {**added, "projection_class_embeddings_input_dim": unet["label_emb.0.0.weight"][1]}
    return config


def _levels(unet: Mapping[str, torch.Size]) -> list[dict[str, int]]:
    """Count the channels, residual blocks and transformer depth of each level of the encoder."""
    levels = [{"channels": 0, "resnets": 0, "depth": 0}]
    count = 1 + max(int(m[1]) for name in unet if (m := re.match(r"input_blocks\.(\d+)\.", name)))
    for i in range(1, count):
        stage = f"input_blocks.{i}."
        if f"{stage}0.op.weight" in unet:
            levels.append({"channels": 0, "resnets": 0, "depth": 0})
            continue
        blocks = {m[1] for name in unet if (m := re.match(rf"{re.escape(stage)}1\.transformer_blocks\.(\d+)\.", name))}
        channels = unet[f"{stage}0.in_layers.2.weight"][0]
        levels[-1] = {"channels": channels, "resnets": levels[-1]["resnets"] + 1, "depth": len(blocks)}
    return levels
