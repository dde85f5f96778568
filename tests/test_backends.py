"""The host may choose how it computes attention after patching as well as before; processors of others stay."""

import logging

import pytest
import torch
from blocks import actions
from kinds import GRID
from patching import answer, diffusers_unet
from torch import nn

from agentsd import apply_patch, get_patch, patched, remove_patch


@pytest.fixture
def unet():
    return diffusers_unet("tiny_unet")


def processor(name: str, base: str = "AttnProcessor2_0"):
    """Choose one of diffusers' processors, under a name that it may have elsewhere."""

    def choose(unet):
        from diffusers.models import attention_processor

        unet.set_attn_processor(type(name, (getattr(attention_processor, base),), {})())

    return choose


CHOICES = {
    "slicing": lambda unet: unet.set_attention_slice("max"),
    "another processor": processor("AttnProcessor", "AttnProcessor"),
    "the default": lambda unet: unet.set_default_attn_processor(),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "xformers": processor("XFormersAttnProcessor"),
    "InvokeAI's": processor("CustomAttnProcessor2_0"),
}


def processors(unet):
    return {name: type(processor).__name__ for name, processor in unet.attn_processors.items()}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_chosen_after_patching_is_as_chosen_before(unet, choose):
    before = diffusers_unet("tiny_unet")
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


class Custom(nn.Module):
    """Somebody's attention processor, with weights and with a parameter of its own."""

    def __init__(self, previous):
        super().__init__()
        self.weight, self.previous = nn.Parameter(torch.tensor(2.0)), previous

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, strength=1.0):
        return self.weight * strength * self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@torch.no_grad()
def test_one_that_is_not_known_is_asked_and_not_replaced_and_a_warning_says_so_once(unet, caplog):
    def stronger():
        given = torch.ones(1, 4, 16, 16), 500, torch.ones(1, 7, unet.config.cross_attention_dim)
        return unet(*given, cross_attention_kwargs={"strength": 2.0}).sample

    def custom():
        unet.set_attn_processor({**unet.attn_processors, **{name: Custom(plain[name]) for name in ours}})

    plain, ours = unet.attn_processors, [name for name in unet.attn_processors if "attn1" in name]
    with patched(unet, **GRID), caplog.at_level(logging.WARNING, logger="agentsd"):
        changed, kept = answer(unet), unet.attn_processors
        custom()
        theirs, names = stronger(), list(unet.state_dict())
        answer(unet)
        assert list(get_patch(unet).notes) == ["its attention processor is Custom"]
        assert [record.name for record in caplog.records].count("agentsd") == 1
        unet.set_attn_processor(kept)  # ours among them
        assert torch.equal(answer(unet), changed)
    custom()
    assert torch.equal(stronger(), theirs)
    assert list(unet.state_dict()) == names
    unet.set_attn_processor(plain)
    assert not torch.equal(answer(unet), changed)


def test_one_put_back_after_removal_is_the_hosts(unet):
    """As unfuse_qkv_projections does: what was there is remembered, and set again later."""
    plain, theirs = answer(unet), processors(unet)
    apply_patch(unet, **GRID)
    ours, remembered = answer(unet), unet.attn_processors
    CHOICES["another processor"](unet)
    remove_patch(unet)
    unet.set_attn_processor(remembered)
    assert torch.equal(answer(unet), plain)
    apply_patch(unet, **GRID)
    assert torch.equal(answer(unet), ours)
    remove_patch(unet)
    assert processors(unet) == theirs
