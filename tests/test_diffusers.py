"""The patch on diffusers: real U-Nets and pipelines with random weights."""

import copy

import pytest
import torch

import agentsd
from agentsd import get_patch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from kinds import GRID, POOL, by_kind
from tiny_pipelines import actions, anatomy, ldm_and_diffusers, picture, run, tiny_sd, tiny_sdxl, tiny_unet, unet_inputs


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_pipelines_take_the_patch_and_give_it_back(make):
    pipe = make()
    before, plain = anatomy(pipe.unet), picture(pipe)
    assert agentsd.apply_patch(pipe, max_downsample=2) is pipe
    patched = picture(pipe)
    assert torch.equal(patched, picture(pipe)), "the same settings give the same picture"
    assert get_patch(pipe) is get_patch(pipe.unet)
    assert agentsd.remove_patch(pipe) is pipe
    assert get_patch(pipe) is None
    assert anatomy(pipe.unet) == before
    assert not torch.equal(patched, plain)
    assert torch.equal(picture(pipe), plain)


@torch.no_grad()
def run_ldm(ldm, t: float = 500, **size):
    given = unet_inputs(tiny_unet(), **size)
    return ldm(given["sample"], torch.full((len(given["sample"]),), t), context=given["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("use_linear", "size"),
    [(False, {}), (True, {}), (False, {"height": 10, "width": 14})],
    ids=["SD1", "SD2", "odd sides at level 2"],
)
@by_kind
def test_ldm_and_its_conversion_give_the_same_patched_output(kw, use_linear, size):
    ldm, unet = ldm_and_diffusers(use_linear)
    given = unet_inputs(unet, **size)
    plain = run(unet, **given)
    torch.testing.assert_close(plain, run_ldm(ldm, **size), rtol=1e-4, atol=1e-4)
    for model in (ldm, unet):
        agentsd.apply_patch(model, **{**kw, **({"max_downsample": 2} if size else {})})
    ours, theirs = run(unet, **given), run_ldm(ldm, **size)
    assert (ours - plain).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert sorted(map(str, actions(ldm).values())) == sorted(map(str, actions(unet).values()))


def test_a_mask_is_the_hosts_business():
    unet = tiny_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,  # the mask fits level 0 only
    )
    mask = {"attention_mask": torch.arange(256).expand(2, 256) % 2}
    plain = run(unet, **mask)
    assert not torch.equal(plain, run(unet))
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet, **mask), plain)
    assert get_patch(unet).notes["self-attention was given a mask"] == 3


@pytest.mark.parametrize("settings", [GRID, POOL], ids=["grid", "pool"])
def test_half_precision(settings):
    """By methods that do not depend on which tokens are nearest, which rounding may change."""
    unet = tiny_unet()
    given, plain = unet_inputs(unet), run(agentsd.apply_patch(unet, **settings))
    for dtype in (torch.bfloat16, torch.float16):
        half = agentsd.apply_patch(copy.deepcopy(unet).to(dtype), **settings)
        inputs = {name: given[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
        out = run(half, **inputs)
        assert out.dtype == dtype
        assert get_patch(half).notes == {}
        assert (out.float() - plain).norm() / plain.norm() < 0.05
