"""The command line on models of every form, on random weights: nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import GRID, SMALL, pixels
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import ldm_and_diffusers, tiny_sd, tiny_sdxl

import agentsd
from agentsd.cli import main, models, pictures
from agentsd.cli.parser import parse
from agentsd.costs import layouts
from agentsd.settings import to_config

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "there is no folder or file nowhere"),
        ("/no/such/folder", "there is no folder or file /no/such/folder"),
        ("owner/name", "not in the local cache of the hub; --download fetches it"),
        ("missing.safetensors", "there is no file missing.safetensors"),
        ("broken.safetensors", "broken.safetensors is no checkpoint that can be read"),
        ("broken.ckpt", "broken.ckpt is no checkpoint that can be read"),
        ("empty", "empty is no diffusers pipeline: it has no model_index.json"),
        ("text.txt", "text.txt is neither a folder nor a .safetensors or .ckpt file"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "cat", "--model"], ["info"]], ids=["generate", "info"])
def test_models_that_are_not_there_are_told_without_the_network(
    command, model, message, capsys, no_network, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    for name in ("broken.safetensors", "broken.ckpt", "text.txt"):
        Path(name).write_bytes(b"this is no model")
    Path("empty").mkdir()
    assert main([*command, model]) == 1
    said = capsys.readouterr().err
    assert said.startswith("agentsd: error: ")
    assert message in said
    assert said.count("\n") == 1


# diffusers' names of an autoencoder's parts, and LDM's
LDM_NAMES = (
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d)\.\1samplers\.0", r"\1.\2.\1sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (r"decoder\.up\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}"),
)


def ldm_autoencoder(vae) -> dict[str, torch.Tensor]:
    """The weights of an autoencoder under LDM's names."""
    state = {}
    for name, value in vae.state_dict().items():
        for theirs, ldms in LDM_NAMES:
            name = re.sub(theirs, ldms, name)
        is_convolution = "attn_1" in name and value.ndim == 2  # LDM's projections are convolutions of 1 × 1
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_convolution else value
    return state


def single_file(path: Path):
    """Write a checkpoint as people share them; returns the pipeline that it stands for."""
    pipe, (ldm, pipe_unet) = tiny_sd(), ldm_and_diffusers()
    pipe.unet = pipe_unet
    state = {f"model.diffusion_model.{name}": value for name, value in ldm.state_dict().items()}
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({**state, **ldm_autoencoder(pipe.vae)}, path)
    return pipe


def theirs(pipe, size: int = 128) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": 2, "guidance_scale": 7.0, "height": size, "width": size}
    return pixels(pictures.enlarged(pipe("cat", generator=generator, **given).images[0], 256))


def test_a_diffusers_folder(folder, no_network, capsys):
    given = ["cat", "--model", str(folder), "--steps", "2", "--seed", "5", "--quiet"]
    assert main(["generate", *given, "--off", "--out", "plain.png"]) == 0
    assert np.array_equal(pixels(Image.open("plain.png")), theirs(tiny_sd()))
    assert main(["generate", *given, *GRID, "--out", "ours.png"]) == 0
    assert "of 14 self-attentions 6 with agents" in capsys.readouterr().out
    assert not np.array_equal(pixels(Image.open("ours.png")), theirs(tiny_sd()))


def test_an_sdxl_folder_is_patched_where_it_has_attention(no_network, capsys):
    tiny_sdxl().save_pretrained("xl")
    assert main(["generate", "cat", "--model", "xl", *SMALL[:2], "--size", "128", "--quiet", *GRID]) == 0
    assert "of 16 self-attentions 16 with agents" in capsys.readouterr().out


def test_a_single_file_needs_a_configuration(folder, no_network, capsys):
    pipe = single_file(Path("tiny.safetensors"))
    given = ["generate", "cat", "--model", "tiny.safetensors", "--steps", "2", "--seed", "5", "--off"]
    assert main([*given, "--config", str(folder), "--quiet", "--out", "plain.png"]) == 0
    assert np.array_equal(pixels(Image.open("plain.png")), theirs(pipe))
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "--config" in said
    assert "--download" in said


def test_a_hub_id_comes_from_the_cache(folder, tmp_path):
    """In a process of its own, since the cache's place is read when the hub's library is imported."""
    model = tmp_path / "cache" / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)
    root = Path(agentsd.__file__).parents[1]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "agentsd", "generate", "cat", "--model", "owner/tiny", "--steps", "2"]
    command += ["--seed", "5", "--off", "--out", "a.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    apart = np.abs(pixels(Image.open("a.png")).astype(int) - theirs(tiny_sd()))
    assert apart.max() <= 2, "but for the rounding of another number of threads"
    assert "/2 [" in done.stderr, "a progress bar of two steps; a fast machine draws only its beginning"


# info


def test_info_names_what_would_happen(folder, capsys, no_network):
    assert main(["info", str(folder), "--size", "128", "256x128", "--layers", *GRID]) == 0
    said = capsys.readouterr().out
    assert "7 transformer blocks" in said
    assert "128×128 pixels, a latent of 16×16" in said
    assert "256×128 pixels, a latent of 32×16" in said
    assert "down_blocks.0.attentions.0.transformer_blocks.0: with agents, cells of 4×4" in said
    assert re.search(r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0: untouched: .*\b2\b.*\b1\b", said)


def test_info_as_json_is_what_happens(folder, capsys):
    given = [*GRID, "--agent-ratio", "0.75", "--max-downsample", "2"]
    assert main(["info", str(folder), "--size", "128", "--json", *given]) == 0
    said = json.loads(capsys.readouterr().out)["sizes"][0]
    pipe = tiny_sd()
    patch = agentsd.patch_unet(pipe.unet, to_config(parse(["info", *given]).settings))
    theirs(pipe)
    found = {(layer.plan.action, layer.plan.tokens, layer.plan.agents) for layer in patch.report()}
    assert found == {(level["action"], level["tokens"], level["agents"]) for level in said["parts"][0]["levels"]}
    assert said["share"] < 1


def test_info_on_the_embedded_model_needs_no_weights(capsys):
    assert main(["info"]) == 0
    assert "4096" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "width", "blocks"), [("SD 1", 768, 16), ("SD 2", 1024, 16), ("SDXL", 2048, 70)])
def test_info_knows_a_single_file_by_its_shapes(name, width, blocks, monkeypatch):
    """That these are the real U-Nets' is seen in test_costs.py."""
    state = {f"{block.name}.attn2.to_k.weight": torch.empty(1, width) for block in layouts()[name].blocks}
    state = {"input_blocks.0.0.weight": torch.empty(320, 9, 3, 3), **state}
    monkeypatch.setattr(models, "shapes_of", lambda path: {f"model.diffusion_model.{k}": x for k, x in state.items()})
    unet, side, factor = models.bare_unet("inpainting.safetensors")
    assert (
        unet.config.items() >= {"in_channels": 9, "cross_attention_dim": width, **models.UNETS[width, blocks]}.items()
    )
    assert (side, factor) == (128 if name == "SDXL" else 64, 8)


def test_info_of_a_file_without_a_known_unet(capsys):
    save_file({"model.diffusion_model.a.attn2.to_k.weight": torch.zeros(1, 768)}, "lora.safetensors")
    assert main(["info", "lora.safetensors"]) == 1
    assert "lora.safetensors has no U-Net" in capsys.readouterr().err
