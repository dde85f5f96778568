"""Ours beside ComfyUI's own nodes on the same model: right, or left to them with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_host import ComfyUI, Graph
from test_comfyui import CHANGED, difference

HYPERTILE = {"tile_size": 64, "swap_size": 1, "max_depth": 0, "scale_depth": False}


def ran(comfyui: ComfyUI, *nodes: tuple[str, dict], **graph) -> tuple[np.ndarray, str]:
    """The latent of these nodes on the model, and what our report says if ours is among them."""
    g, ours = Graph(**graph), False
    for kind, inputs in nodes:
        if kind == "agents":
            g.agents(**inputs)
            ours = True
        else:
            g.on_model(kind, **inputs)
    g.sampled()
    if ours:
        g.reported()
    outputs = comfyui.run(g.nodes)
    return outputs.latent(), outputs.text() if ours else ""


OURS = ("agents", {})
SHARING = {"HyperTile": HYPERTILE, "TomePatchModel": {"ratio": 0.5}}


@pytest.mark.parametrize("first", [True, False], ids=["theirs first", "ours first"])
@pytest.mark.parametrize("kind", SHARING)
def test_what_tiles_or_merges_the_same_layers_is_left_alone(comfyui, plain, kind, first):
    theirs = (kind, SHARING[kind])
    alone, _ = ran(comfyui, theirs)
    assert difference(alone, plain()) > CHANGED
    both, said = ran(comfyui, *((theirs, OURS) if first else (OURS, theirs)))
    assert np.array_equal(both, alone)
    assert "keys of different numbers, as by token merging or HyperTile" in said


@pytest.mark.parametrize("kind", SHARING)
def test_other_layers_are_still_ours(comfyui, kind):
    theirs = (kind, SHARING[kind])
    alone, _ = ran(comfyui, theirs)
    rule = "downsample=2 min_tokens=0 max_downsample=2"
    both, said = ran(comfyui, theirs, ("agents", {"rules": rule, "cells": "2×2, closest"}))
    assert difference(both, alone) > CHANGED
    assert said.startswith("Sampling 256×256: 256 tokens → 64 agents in 5 layers, in all 2 U-Net calls.")


GUIDANCE = {
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_guidance_by_attention_keeps_its_middle_block(comfyui, kind):
    theirs = (kind, GUIDANCE[kind])
    alone, _ = ran(comfyui, theirs)
    both, said = ran(comfyui, theirs, OURS)
    assert difference(both, alone) > CHANGED
    assert "left to the host" not in said, "the middle block is not one of ours at these settings"
    every = {"rules": "max_downsample=8 min_tokens=0", "method": "pool", "cells": "2×2, closest"}
    middle, said = ran(comfyui, theirs, ("agents", every))
    assert difference(middle, alone) > CHANGED
    assert "another node answers self-attention in its place" in said


OTHERS = {
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "PatchModelAddDownscale": {
        "block_number": 3,
        "downscale_factor": 2.0,
        "start_percent": 0.0,
        "end_percent": 0.6,
        "downscale_after_skip": True,
        "downscale_method": "bicubic",
        "upscale_method": "bicubic",
    },
    "RescaleCFG": {"multiplier": 0.7},
    "EasyCache": {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.95, "verbose": False},
    "ModelSamplingDiscrete": {"sampling": "v_prediction", "zsnr": True},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_nodes_on_the_model(comfyui, kind):
    theirs = (kind, OTHERS[kind])
    alone, _ = ran(comfyui, theirs, steps=3)
    both, said = ran(comfyui, theirs, OURS, steps=3)
    turned, _ = ran(comfyui, OURS, theirs, steps=3)
    assert np.isfinite(both).all()
    assert difference(both, alone) > CHANGED
    assert difference(both, turned) == 0
    assert "1024 tokens → 64 agents in 5 layers" in said
    assert "left to the host" not in said


def test_an_override_of_attention_serves_our_small_attentions(comfyui, plain):
    """A node that chooses another kernel (Sage, say) does it so."""
    ours, _ = ran(comfyui, OURS)
    never_asked, _ = ran(comfyui, OURS, ("Louder", {"keys": 1}))
    assert np.array_equal(never_asked, ours)
    louder, said = ran(comfyui, OURS, ("Louder", {"keys": 64}))
    assert difference(louder, ours) > CHANGED, "64 agents are the keys of the broadcast"
    assert "left to the host" not in said
    # without ours there are 64 keys in layers of 8×8 tokens alone, which ours leaves to the host and its override
    theirs, _ = ran(comfyui, ("Louder", {"keys": 64}))
    assert difference(louder, theirs) > CHANGED


@pytest.mark.parametrize("first", [True, False], ids=["LoRA first", "ours first"])
def test_lora(comfyui, lora, plain, first):
    loaded, _ = ran(comfyui, lora)
    assert difference(loaded, plain()) > CHANGED
    both, said = ran(comfyui, *((lora, OURS) if first else (OURS, lora)))
    ours, _ = ran(comfyui, OURS)
    assert difference(both, ours) > CHANGED
    assert difference(both, loaded) > CHANGED
    assert "left to the host" not in said
    assert np.array_equal(ran(comfyui)[0], plain())


@pytest.mark.parametrize("first", [True, False], ids=["theirs first", "ours first"])
def test_a_node_that_calls_the_blocks_itself_is_told(comfyui, plain, first):
    theirs = ("Blocks", {})
    alone, _ = ran(comfyui, theirs)
    assert difference(alone, plain()) < 1e-5
    both, said = ran(comfyui, *((theirs, OURS) if first else (OURS, theirs)))
    assert np.array_equal(both, alone)
    assert said.startswith("Sampling: nothing happened. Left to the host: another node calls the U-Net's blocks itself")


def test_tiles(comfyui, plain):
    alone, _ = ran(comfyui, ("Tiles", {}), size=(512, 256))
    both, said = ran(comfyui, ("Tiles", {}), ("agents", {"rules": "min_tokens=0"}), size=(512, 256))
    assert difference(both, alone) > CHANGED
    assert said.startswith("Sampling 512×256, in parts of 256×128: 512 tokens → 32 agents in 5 layers, in all")


@pytest.mark.parametrize("on", ["model1", "model2"])
def test_a_merge_keeps_the_first_model_s_nodes(comfyui, on):
    graph = Graph().agents()
    other = graph.add("other", "TinyModel", layout="SD 1", weights=3)
    models = {"model1": graph.model, "model2": other} if on == "model1" else {"model1": other, "model2": graph.model}
    graph.model = graph.add("merge", "ModelMergeSimple", **models, ratio=0.5)
    said = comfyui.run(graph.sampled().reported().nodes).text()
    if on == "model1":
        assert said.startswith("Sampling 256×256: 1024 tokens → 64 agents")
    else:
        assert said.endswith("Of merged models, only the first keeps its nodes: put ours behind the merge.")
