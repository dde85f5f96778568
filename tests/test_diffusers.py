"""The patch on diffusers: real U-Nets and pipelines with random weights."""

import pytest
import torch

import agentsd
from agentsd import get_patch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from kinds import GRID, by_kind
from tiny_pipelines import ldm_and_diffusers, run, tiny_unet, unet_inputs


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
    done, done_too = (sorted(str(layer.calls) for layer in get_patch(m).report()) for m in (ldm, unet))
    assert done == done_too


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
