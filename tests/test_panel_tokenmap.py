"""The token map: what is recorded is what the blocks did, and what is drawn is what was recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from blocks import attention_calls, blocks_of, flat_unet, golden_unet, inputs, one_block_unet, run, tree
from PIL import Image

from agentsd import AgentConfig, LayerPlan, patch_unet
from agentsd.app import token_map as tokenmap
from agentsd.app.token_map import Layer, Recording, draw, view
from agentsd.attention import corrected
from agentsd.attention.grid import landmark_places
from agentsd.methods import method_named

SIMILARITY = {"agent_source": "similarity", "agent_ratio": 0.9, "ratio": 0.0}
PAPER = {**SIMILARITY, "agent_ratio": 0.95, "ratio": 0.4}
MERGING = {"ratio": 0.5, "agent_ratio": 0.0, "sx": 2, "sy": 2}
GRID = {"agent_source": "grid", "agent_ratio": 0.95, "ratio": 0.0}
OPENED = {"method": "corrected", "agent_ratio": 0.95, "exact_ratio": 0.14}
GREY = (100, 100, 100)


def recorded(unet, height=16, width=16, t=(500,), latent=None, batch=2, **settings) -> Recording:
    """The record of a pass of one call for each timestep."""
    recording = Recording()
    patch = patch_unet(unet, AgentConfig(**settings))
    patch.observer = recording.observer(False, latent or (height, width))
    try:
        for timestep in t:
            run(unet, inputs(batch, height, width, t=[timestep] * batch))
    finally:
        patch.remove()
    recording.image = Image.new("RGB", (8 * width, 8 * height), GREY)
    return recording


@pytest.mark.parametrize("settings", [MERGING, PAPER, {**GRID, "ratio": 0.3}], ids=["merging", "paper", "grid"])
@pytest.mark.parametrize("size", [(16, 16), (10, 18), (7, 13)])
def test_tokens_of_one_cluster_left_self_attention_with_one_value(settings, size):
    unet = flat_unet()
    with attention_calls(blocks_of(unet)[0].attn1) as seen:
        layer = recorded(unet, *size, **settings).calls[0].layers[0]
    values = seen[0][1][0]
    together = torch.tensor(layer.merged[:, None] == layer.merged[None, :])
    equal = (values[:, None] == values[None, :]).all(-1)
    assert torch.equal(equal, together)
    assert len(np.unique(layer.merged)) == layer.plan.queries < layer.plan.tokens


@pytest.mark.parametrize("size", [(16, 16), (10, 18), (7, 13)])
def test_similarity_agents_sit_on_a_token_of_their_own_cluster(size):
    layer = recorded(flat_unet(), *size, **SIMILARITY).calls[0].layers[0]
    where = layer.agent_tokens()
    assert len(set(where)) == layer.plan.agents == len(np.unique(layer.agents))
    assert list(layer.agents[where]) == list(range(layer.plan.agents))
    assert layer.merged is None
    # a destination in each whole 4 × 4 cell
    cells = {(i // size[1] // 4, i % size[1] // 4) for i in layer.dst}
    assert cells == {(y, x) for y in range(size[0] // 4) for x in range(size[1] // 4)}


def test_the_agents_are_the_means_of_what_the_map_colours():
    """Pooling by the recorded index gives the agents that attention was given."""
    unet, given = flat_unet(), []
    attn = blocks_of(unet)[0].attn1
    handle = attn.to_q.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    with attention_calls(attn) as seen:
        layer = recorded(unet, **PAPER).calls[0].layers[0]
    handle.remove()
    x = seen[0][0][0]
    means = torch.stack([x[torch.tensor(layer.agents == i)].mean(0) for i in range(layer.plan.agents)])
    agents = next(one[0] for one in given if one.shape[1] == layer.plan.agents)
    torch.testing.assert_close(agents, means)


def test_observing_changes_nothing_and_leaves_nothing():
    unet = golden_unet()
    for settings in (PAPER, OPENED):
        before, recording = tree(unet), Recording()
        patch = patch_unet(unet, AgentConfig(**settings))
        plain = run(unet, inputs())
        patch.observer = recording.observer(False, None)
        assert torch.equal(run(unet, inputs()), plain)
        patch.observer = lambda answer: 1 / 0
        assert torch.equal(run(unet, inputs()), plain), "an observer that fails costs no answer"
        assert "ZeroDivisionError" in str(patch.notes)
        patch.remove()
        assert tree(unet) == before
        kept = [value for layer in recording.calls[0].layers for value in vars(layer).values()]
        assert not any(isinstance(value, torch.Tensor) for value in kept)


def test_pooling_and_what_is_untouched():
    recording = recorded(golden_unet(), method="pool", sx=2, sy=2, merge_mlp=True, ratio=0.5)
    layers = recording.calls[0].layers
    assert {layer.plan.action for layer in layers} == {"pool"}
    assert all(layer.merged is None for layer in layers), "self-attention merged nothing"
    assert all(layer.size == (16, 16) for layer in layers), "the layers below are untouched"
    assert not recorded(flat_unet(), min_tokens=9999).calls


def test_a_call_for_each_part_of_the_diffusion_and_no_more():
    times = range(990, 0, -10)
    calls = recorded(flat_unet(), 8, 8, t=times, batch=1, **GRID).calls
    assert [int(tokenmap.MOMENTS * call.progress) for call in calls] == list(range(tokenmap.MOMENTS))
    # cond and uncond in calls of their own
    assert len(recorded(flat_unet(), 8, 8, t=[500, 500], batch=1, **GRID).calls) == 1
    assert len({len(call.layers) for call in calls}) == 1


# Drawing


def hand_made(index, size, **plan) -> Layer:
    given = {"method": method_named("merge"), "tokens": size[0] * size[1], "queries": len(set(index)), **plan}
    return Layer("block", size, LayerPlan(**given), merged=np.array(index, dtype=np.uint16))


def at(image: Image.Image, layer: Layer, y: int, x: int) -> tuple[int, ...]:
    """The colour in the middle of a token."""
    height, width = layer.size
    return image.getpixel((int((x + 0.5) * image.width / width), int((y + 0.5) * image.height / height)))


def test_merged_tokens_share_a_colour_and_the_others_stay_grey():
    layer = hand_made([0, 0, 1, 2, 1, 3], (2, 3))
    drawn = draw(Image.new("RGB", (24, 16), GREY), layer, (2, 3))
    colours = [at(drawn, layer, i // 3, i % 3) for i in range(6)]
    assert colours[0] == colours[1] != colours[2] == colours[4]
    assert GREY not in (colours[0], colours[2])
    assert colours[3] == colours[5] == GREY


def test_a_ragged_layer_and_a_cropped_image_are_placed_as_the_host_does():
    # a latent of 3 × 5 has 2 × 3 tokens at level 1, whose last row and column lie half outside
    drawn = draw(Image.new("RGB", (800, 480), GREY), hand_made([0, 0, 0, 1, 1, 1], (2, 3)), (3, 5))
    border = [y for y in range(1, 480) if drawn.getpixel((200, y)) != drawn.getpixel((200, y - 1))]
    assert border[-1] == 320, "two thirds of the way down, not a half"
    # the first pass of a hires image is its middle: the host fills the hires size and cuts off what stands out
    layer = hand_made([i // 4 for i in range(16)], (4, 4))
    drawn, whole = (draw(Image.new("RGB", (800, height), GREY), layer, (4, 4)) for height in (400, 800))
    rows = [drawn.getpixel((100, y)) for y in (20, 180, 220, 380)]
    assert rows == [whole.getpixel((100, y)) for y in (220, 380, 420, 580)]
    assert rows[0] == rows[1] != rows[2] == rows[3]


WHITE = (255, 255, 255)


@pytest.mark.parametrize("size", [(16, 16), (6, 9)])
def test_grid_agents_are_dots_in_the_middle_of_their_cells(size):
    layer = recorded(flat_unet(), *size, **GRID).calls[0].layers[0]
    drawn = draw(Image.new("RGB", (8 * size[1], 8 * size[0]), GREY), layer, size)
    scale, side = drawn.width / size[1], layer.plan.cell[0]
    y, x = ([(min(at + side, n) + at) / 2 * scale for at in range(0, n, side)] for n in size)
    assert len(y) * len(x) == layer.plan.agents
    assert {drawn.getpixel((round(column), round(row))) for row in y for column in x} == {WHITE}
    dots = (np.asarray(drawn) == 255).all(-1).sum()
    assert dots / layer.plan.agents < np.pi * (0.35 * scale) ** 2, "nothing else is white"


@pytest.mark.parametrize("size", [(16, 16), (10, 13)])
def test_corrected_agents_are_dots_on_the_landmarks(size):
    layer = recorded(flat_unet(), *size, method="corrected", agent_ratio=0.95).calls[0].layers[0]
    drawn = draw(Image.new("RGB", (8 * size[1], 8 * size[0]), GREY), layer, size)
    scale, taken = drawn.width / size[1], landmark_places(size, layer.plan.cell)
    assert len(taken) == layer.plan.agents
    for y, x in np.ndindex(size):
        assert (drawn.getpixel((round((x + 0.5) * scale), round((y + 0.5) * scale))) == WHITE) == ((y, x) in taken)


@pytest.mark.parametrize("size", [(32, 32), (30, 37)])
def test_a_click_shows_the_cells_that_its_window_opens(size):
    unet = one_block_unet()
    recording = recorded(unet, *size, **OPENED)
    layer, heads = recording.calls[0].layers[0], blocks_of(unet)[0].attn1.heads
    np.testing.assert_allclose(layer.opened.sum(1), layer.plan.opened, err_msg="each head opens as many")
    assert set((heads * layer.opened).round(6).ravel()) <= set(range(heads + 1))
    assert "Click on a window" in view(recording, 1, 1, "").text
    plain, clicked = (view(recording, 1, 1, "", False, place) for place in (None, (5.0, 5.0)))
    assert "Tinted: those of the outlined window." in clicked.text
    changed = (np.asarray(plain.image) != np.asarray(clicked.image)).any(-1)
    scale = clicked.image.width / size[1]
    for cell, share in enumerate(layer.opened[0]):
        y, x = (round((4 * at + 0.1) * scale) for at in divmod(cell, -(-size[1] // 4)))
        assert changed[y, x] == (share > 0)
    assert view(recording, 1, 1, "", False, (1e6, 1e6)).image != clicked.image, "a place outside is the last window"


@pytest.mark.parametrize("at_a_time", [(2, 4), (1, 2)])
def test_what_is_told_to_be_opened_is_what_matters_in_the_first_row(at_a_time, monkeypatch):
    """All queries look at the keys of one cell, in each row at another one's."""
    monkeypatch.setattr(corrected._Scratch, "pairs", lambda self, q: at_a_time)
    q, v, chosen = torch.ones(2, 4, 1024, 8), torch.randn(2, 4, 1024, 8), []
    k = 0.1 * torch.randn(2, 4, 32, 32, 8)
    k[0, :, 4:8, 8:12], k[1, :, 20:24, 0:4] = 5.0, 5.0  # cells 10 and 40
    corrected.corrected_attention(q, k.flatten(2, 3), v, size=(32, 32), cell=(4, 4), opened=1, chosen=chosen)
    cells = torch.cat(chosen, dim=1)
    assert torch.equal(cells, torch.full((4, 4, 1), 10)), "windows, heads, cells"


def test_the_map_is_large_enough_and_no_larger():
    for given, longer in (((128, 64), 768), ((640, 640), 1280), ((1536, 512), 1536), ((4096, 2048), 1536)):
        assert max(draw(Image.new("RGB", given), hand_made([0, 0], (1, 2)), (1, 2)).size) == longer


# What the panel is told


def test_layers_are_named_as_people_think_and_by_their_block_and_choices_are_taken_into_their_range():
    recording = recorded(golden_unet(), t=[900, 500, 100], max_downsample=2, **GRID)
    seen, call = view(recording, 99, -3, ""), recording.calls[0]
    assert (seen.call, seen.calls, seen.layer) == (3, 3, 1)
    assert seen.layers == len(call.layers) > 1
    assert f"0.9 of the diffusion done. Layer 1 of {seen.layers}: down 1" in seen.text
    assert seen.block.startswith("input_blocks.")
    names = [
        "down_blocks.0.at.0",
        "mid_block.attentions.0",
        "somebody.elses",
        "down_blocks.0.at.1",
        *["up_blocks.3"] * 11,
    ]
    call = tokenmap.Call(False, (1, 2), None, [replace(hand_made([0, 0], (1, 2)), name=name) for name in names])
    words = ["down 1, first of two", "middle", "somebody.elses", "down 1, second of two"]
    words += [f"up 1, number {i} of 11" for i in range(1, 12)]
    assert [tokenmap.place_of(call, number) for number in range(1, len(names) + 1)] == words


WORDS = [
    (MERGING, ["256 tokens were merged into 128", "grey"]),
    (PAPER, ["256 tokens were merged into 154", "Dots: 16 agents"]),
    (SIMILARITY, ["Dots: 26 agents", "averaged into one agent", "No token was merged"]),
    (GRID, ["Dots: 16 agents, each the mean of its cell", "No token was merged"]),
    ({"method": "pool", "sx": 2, "sy": 2}, ["Dots: 64 pooled keys"]),
    ({"method": "corrected", "agent_ratio": 0.95}, ["Dots: 64 agents, one token of each cell"]),
]


def test_the_caption_says_what_the_colours_and_dots_are():
    for settings, words in WORDS:
        seen = view(recorded(flat_unet(), **settings), 1, 1, "")
        assert seen.image is not None
        assert all(part in seen.text for part in words), (settings, seen.text)


def test_where_there_is_nothing_to_show_it_says_why():
    assert tokenmap.RECORD in view(None, 1, 1, "").text
    empty = Recording()
    assert "without an image" in view(empty, 1, 1, "").text
    empty.image = Image.new("RGB", (8, 8))
    assert view(empty, 1, 1, "Last run: HyperTile is on.").text.endswith("Last run: HyperTile is on.")
