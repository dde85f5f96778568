"""Clusters that are used again: by other blocks of the same call, and in later calls."""

from __future__ import annotations

import pytest
import torch
from blocks import CONTEXT, golden_unet

import agentsd
from agentsd.attention import merging
from agentsd.patching import patch as patch_module

SETTINGS = {"ratio": 0.3, "agent_ratio": 0.9, "sx": 4, "sy": 4}


@pytest.fixture(scope="module")
def unet():
    return golden_unet()


@pytest.fixture
def matches(monkeypatch):
    """The shapes of all tokens that are matched."""
    seen = []

    def counted(x, *args):
        seen.append(tuple(x.shape))
        return merging.match(x, *args)

    monkeypatch.setattr(patch_module, "match", counted)
    return seen


def forward(unet, timestep, batch=2, seed=0, side=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, side, side, generator=generator)
    context = torch.randn(batch, 77, CONTEXT, generator=generator)
    with torch.no_grad():
        return unet(x, torch.full((batch,), float(timestep)), context=context)


def blocks_at_level_0(unet):
    return sum(plan.action != "untouched" for _, plan in agentsd.get_patch(unet).explain(16, 16))


def test_by_default_every_block_matches_in_every_call(unet, matches):
    with agentsd.patched(unet, **SETTINGS):
        blocks = blocks_at_level_0(unet)
        assert blocks > 1
        forward(unet, 900)
        forward(unet, 899)
    assert len(matches) == 2 * blocks


def test_shared_clusters_are_matched_once_a_call_and_size(unet, matches):
    with agentsd.patched(unet, **SETTINGS, share_match=True, max_downsample=2):
        forward(unet, 900)
        assert sorted(shape[1] for shape in matches) == [64, 256]
        forward(unet, 899)
    assert len(matches) == 4


def test_shared_clusters_are_those_of_the_first_block(unet):
    with agentsd.patched(unet, **SETTINGS):
        own = forward(unet, 500)
    with agentsd.patched(unet, **SETTINGS, share_match=True):
        shared = forward(unet, 500)
    assert torch.isfinite(shared).all()
    assert not torch.equal(own, shared)


def test_clusters_are_reused_for_a_fraction_of_the_diffusion(unet, matches):
    with agentsd.patched(unet, **SETTINGS, reuse_match=0.1):
        blocks = blocks_at_level_0(unet)
        made = []
        for timestep in (900, 850, 801, 800, 750):
            before = len(matches)
            forward(unet, timestep)
            made.append(len(matches) - before)
    assert made == [blocks, 0, 0, blocks, 0]


@pytest.mark.parametrize(("timestep", "batch", "side"), [(900, 2, 16), (950, 2, 16), (850, 1, 16), (850, 2, 32)])
def test_clusters_are_not_reused_for_another_image(unet, matches, timestep, batch, side):
    with agentsd.patched(unet, **SETTINGS, reuse_match=0.5):
        blocks = blocks_at_level_0(unet)
        forward(unet, 900)
        forward(unet, timestep, batch=batch, side=side)
    assert len(matches) == 2 * blocks


def test_an_image_does_not_depend_on_the_one_before(unet):
    def image(seed):
        return [forward(unet, t, seed=seed) for t in (950, 900, 850)]

    with agentsd.patched(unet, **SETTINGS, reuse_match=0.2, share_match=True):
        alone = image(1)
    with agentsd.patched(unet, **SETTINGS, reuse_match=0.2, share_match=True):
        image(2)
        after = image(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))


def test_a_stage_with_other_settings_matches_anew(unet, matches):
    stages = (agentsd.Stage(0.5), agentsd.Stage(1.0, {"ratio": 0.5}))
    with agentsd.patched(unet, **SETTINGS, reuse_match=1.0, stages=stages):
        made = []
        for timestep in (600, 550, 450, 400):
            before = len(matches)
            forward(unet, timestep)
            made.append(len(matches) - before)
    assert made[0] == made[2] > 0
    assert made[1] == made[3] == 0


def test_a_removed_patch_keeps_nothing(unet):
    with agentsd.patched(unet, **SETTINGS, reuse_match=0.5):
        patch = agentsd.get_patch(unet)
        forward(unet, 900)
        assert patch._kept
    assert not patch._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_average_clusters_agree(monkeypatch, dtype):
    x = torch.randn(2, 64, 24).to(dtype)
    clusters = merging.match(x, merging.partition(8, 8, 2, 2, 0), 40, 0).merged
    bags = clusters.merge(x)
    monkeypatch.setattr(merging, "_BAG_DEVICES", ())
    torch.testing.assert_close(bags, clusters.merge(x))
