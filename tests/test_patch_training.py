"""Gradients pass through the patch."""

import oracle
import torch
from blocks import blocks_of
from kinds import GRID, by_kind, of
from patching import EXAMPLE, example_call

from agentsd import get_patch, patched
from agentsd.hosts import output_tensor


def gradients(unet, *args, **kwargs):
    unet.zero_grad()
    output_tensor(unet(*args, **kwargs)).square().mean().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@by_kind
def test_every_weight_gets_a_gradient(unet, kw):
    with patched(unet, **kw):
        found = gradients(unet, *EXAMPLE)
        assert not get_patch(unet).notes
    assert found.keys() == {name for name, _ in unet.named_parameters()}
    assert all(grad.isfinite().all() for grad in found.values())
    assert all(block.attn1.to_q.weight.grad.abs().max() > 0 for block in blocks_of(unet))


@of("grid", "similarity")
def test_gradients_equal_the_oracle_s(flat, kw):
    with patched(flat, use_rand=False, **kw):
        ours = gradients(flat, *EXAMPLE)
    settings = {"grid": 4 if kw is GRID else None, "ratio": kw["ratio"], "agent_ratio": kw["agent_ratio"]}
    with oracle.answering(flat, oracle.Oracle(**settings), (12, 12)):
        theirs = gradients(flat, *EXAMPLE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@of("similarity", "everywhere", "corrected")
def test_gradient_checkpointing_changes_no_gradient(any_unet, kw):
    args, given = example_call(any_unet, 16, 16, 0.5)
    with patched(any_unet, **kw):
        expected = gradients(any_unet, *args, **given)
    if hasattr(any_unet, "enable_gradient_checkpointing"):
        any_unet.train()
        any_unet.enable_gradient_checkpointing()
    for block in blocks_of(any_unet):
        block.checkpoint = True
    with patched(any_unet, **kw):
        found = gradients(any_unet, *args, **given)
        assert not get_patch(any_unet).notes
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
