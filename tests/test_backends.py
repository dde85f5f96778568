"""The host may choose how it computes attention after patching as well as before."""

import logging

import pytest
import torch
from blocks import actions
from kinds import GRID
from patching import answer, diffusers_unet

from agentsd import get_patch, patched


def xformers(unet):
    """What `enable_xformers_memory_efficient_attention` sets, without the library."""

    class XFormersAttnProcessor(type(unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor)):
        pass

    unet.set_attn_processor(XFormersAttnProcessor())


def classic(unet):
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


CHOICES = {
    "slicing": lambda unet: unet.set_attention_slice("max"),
    "another processor": classic,
    "the default": lambda unet: unet.set_default_attn_processor(),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "xformers": xformers,
}


def processors(unet):
    return {name: type(processor).__name__ for name, processor in unet.attn_processors.items()}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_chosen_after_patching_is_as_chosen_before(choose):
    before, unet = diffusers_unet("tiny_unet"), diffusers_unet("tiny_unet")
    plain = answer(before)
    with patched(before, **GRID):
        expected, acting = answer(before), actions(get_patch(before))
    assert (expected - plain).abs().max() > 1e-3
    choose(before)
    theirs = processors(before)
    with patched(before, **GRID):
        torch.testing.assert_close(answer(before), expected, rtol=0, atol=1e-5)
    with patched(unet, **GRID):
        answer(unet)
        choose(unet)
        torch.testing.assert_close(answer(unet), expected, rtol=0, atol=1e-5)
        assert actions(get_patch(unet)) == acting
        assert not get_patch(unet).notes
    for model in (before, unet):
        assert processors(model) == theirs
        torch.testing.assert_close(answer(model), plain, rtol=0, atol=1e-5)


def test_where_that_cannot_be_a_warning_says_so_once(caplog):
    class Unknown(type(diffusers_unet("tiny_unet").mid_block.attentions[0].transformer_blocks[0].attn1.processor)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 2 * super().__call__(attn, hidden_states, *args, **kwargs)

    unet = diffusers_unet("tiny_unet")
    with patched(unet, **GRID), caplog.at_level(logging.WARNING, logger="agentsd"):
        changed = answer(unet)
        kept = unet.attn_processors
        unet.set_attn_processor(Unknown())
        theirs = answer(unet)
        answer(unet)
        assert list(get_patch(unet).notes) == ["its attention processor is Unknown"]
        assert len(caplog.records) == 1
        unet.set_attn_processor(kept)  # ours among them
        assert torch.equal(answer(unet), changed)
    unet.set_attn_processor(Unknown())
    assert torch.equal(answer(unet), theirs)
