"""Ours beside ComfyUI's own nodes on the same model: right, or left to them with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_host import Graph
from test_comfyui import CHANGED, OURS, difference, ours

SHARING = [
    ("HyperTile", {"tile_size": 64, "swap_size": 1, "max_depth": 0, "scale_depth": False}),
    ("TomePatchModel", {"ratio": 0.5}),
]
both_orders = pytest.mark.parametrize("step", [1, -1], ids=["theirs first", "ours first"])
by_kind = {"ids": lambda each: each[0]}


@pytest.mark.parametrize("theirs", SHARING, **by_kind)
def test_what_tiles_or_merges_layers_is_left_alone_and_others_are_still_ours(comfyui, plain, theirs):
    alone, _ = comfyui.ran(theirs)
    assert difference(alone, plain()) > CHANGED
    for nodes in ((theirs, OURS), (OURS, theirs)):
        both, said = comfyui.ran(*nodes)
        assert np.array_equal(both, alone)
        assert "keys of different numbers, as by token merging or HyperTile" in said
    others = ours(rules="downsample=2 min_tokens=0 max_downsample=2", cells="2×2, closest")
    both, said = comfyui.ran(theirs, others)
    assert difference(both, alone) > CHANGED
    assert said.startswith("Sampling 256×256: 256 tokens → 64 agents in 5 layers, in all 2 U-Net calls.")


GUIDANCE = [
    ("PerturbedAttentionGuidance", {"scale": 3.0}),
    ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
]


@pytest.mark.parametrize("theirs", GUIDANCE, **by_kind)
def test_guidance_by_attention_keeps_its_middle_block(comfyui, theirs):
    alone, _ = comfyui.ran(theirs)
    every = ours(rules="max_downsample=8 min_tokens=0", method="pool", cells="2×2, closest")
    for nodes, middle in ((OURS, False), (every, True)):
        both, said = comfyui.ran(theirs, nodes)
        assert difference(both, alone) > CHANGED
        assert ("another node answers self-attention in its place" in said) == middle
        assert ("left to the host" in said.lower()) == middle


SHRINK = {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.6}
SHRINK |= {"downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}
OTHERS = [
    ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    ("PatchModelAddDownscale", SHRINK),
    ("RescaleCFG", {"multiplier": 0.7}),
    ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
]


@pytest.mark.parametrize("theirs", OTHERS, **by_kind)
def test_other_nodes_on_the_model(comfyui, theirs):
    alone, _ = comfyui.ran(theirs, steps=3)
    (both, said), (turned, _) = comfyui.ran(theirs, OURS, steps=3), comfyui.ran(OURS, theirs, steps=3)
    assert np.isfinite(both).all()
    assert difference(both, alone) > CHANGED
    assert difference(both, turned) == 0
    assert "1024 tokens → 64 agents in 5 layers" in said
    assert "left to the host" not in said


def test_an_override_of_attention_serves_our_small_attentions(comfyui):
    """A node that chooses another kernel (Sage, say) does it so."""
    on, _ = comfyui.ran(OURS)
    assert np.array_equal(comfyui.ran(OURS, ("Louder", {"keys": 1}))[0], on), "it was never asked"
    louder, said = comfyui.ran(OURS, ("Louder", {"keys": 64}))
    assert difference(louder, on) > CHANGED, "64 agents are the keys of the broadcast"
    assert "left to the host" not in said
    # without ours there are 64 keys in layers of 8×8 tokens alone, which ours leaves to the host and its override
    assert difference(louder, comfyui.ran(("Louder", {"keys": 64}))[0]) > CHANGED


@both_orders
def test_lora(comfyui, lora, plain, step):
    both, said = comfyui.ran(*(lora, OURS)[::step])
    for alone in (comfyui.ran(lora)[0], comfyui.ran(OURS)[0]):
        assert difference(alone, plain()) > CHANGED
        assert difference(both, alone) > CHANGED
    assert "left to the host" not in said
    assert np.array_equal(comfyui.ran()[0], plain())


DEEP = {"cache_interval": 2, "cache_depth": 3, "start_step": 0, "end_step": 1000}
TILED = {"method": "MultiDiffusion", "tile_width": 256, "tile_height": 128, "tile_overlap": 0, "tile_batch_size": 4}


def required(comfyui, node) -> None:
    """Skip the test of a node that no pack gives."""
    if node not in comfyui.call("/object_info"):
        pytest.skip(f"no pack in AGENTSD_COMFYUI_PACKS has the node {node}")


@both_orders
@pytest.mark.parametrize("theirs", [("Blocks", {}), ("DeepCache", DEEP)], **by_kind)
def test_a_node_that_calls_the_blocks_itself_is_told(comfyui, plain, theirs, step):
    required(comfyui, theirs[0])
    alone, _ = comfyui.ran(theirs)
    assert (difference(alone, plain()) < 1e-5) == (theirs[0] == "Blocks")
    both, said = comfyui.ran(*(theirs, OURS)[::step])
    assert np.array_equal(both, alone)
    assert said.startswith("Sampling: nothing happened. Left to the host: another node calls the U-Net's blocks itself")


@both_orders
@pytest.mark.parametrize("theirs", [("Tiles", {}), ("TiledDiffusion", TILED)], **by_kind)
def test_tiles(comfyui, theirs, step):
    required(comfyui, theirs[0])
    alone, _ = comfyui.ran(theirs, size=(512, 256))
    both, said = comfyui.ran(*(theirs, ours(rules="min_tokens=0"))[::step], size=(512, 256))
    assert difference(both, alone) > CHANGED
    assert said.startswith("Sampling 512×256, in parts of 256×128: 512 tokens → 32 agents in 5 layers, in all")


@pytest.mark.parametrize(
    ("on", "told"),
    [
        ("model1", "Sampling 256×256: 1024 tokens → 64 agents"),
        ("model2", "Of merged models, only the first keeps its nodes: put ours behind the merge."),
    ],
)
def test_a_merge_keeps_the_first_model_s_nodes(comfyui, on, told):
    graph = Graph().on_model("AgentAttention")
    other = graph.add("other", "TinyModel", layout="SD 1", weights=3)
    models = dict(zip(("model1", "model2"), [graph.model, other][:: 1 if on == "model1" else -1], strict=True))
    graph.model = graph.add("merge", "ModelMergeSimple", **models, ratio=0.5)
    assert told in comfyui.run(graph.sampled().reported()).text()
