"""Gradients pass through the patch."""

from __future__ import annotations

import oracle
import torch
from blocks import blocks_of
from patching import EXAMPLE, GRID, agent_kinds, by_kind, self_attention_kinds

from agentsd import get_patch, patched


class TestTraining:
    @by_kind
    def test_every_weight_gets_a_gradient(self, unet, kw):
        with patched(unet, **kw):
            unet(*EXAMPLE).square().mean().backward()
            assert not get_patch(unet).notes
        for name, p in unet.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
        assert all(block.attn1.to_q.weight.grad.abs().max() > 0 for block in blocks_of(unet))

    @agent_kinds
    def test_gradients_equal_the_oracle_s(self, flat, kw):
        def gradients():
            flat.zero_grad()
            flat(*EXAMPLE).square().mean().backward()
            return {name: p.grad.clone() for name, p in flat.named_parameters()}

        with patched(flat, use_rand=False, **kw):
            ours = gradients()
        settings = {"grid": 4 if kw is GRID else None, "ratio": kw["ratio"], "agent_ratio": kw["agent_ratio"]}
        with oracle.answering(flat, oracle.Oracle(**settings), (12, 12)):
            theirs = gradients()
        for name, grad in ours.items():
            torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5)

    @self_attention_kinds
    def test_gradient_checkpointing_changes_no_gradient(self, unet, kw):
        def gradients():
            unet.zero_grad()
            unet(*EXAMPLE).square().mean().backward()
            return {name: p.grad.clone() for name, p in unet.named_parameters()}

        with patched(unet, **kw):
            expected = gradients()
        for block in blocks_of(unet):
            block.checkpoint = True
        with patched(unet, **kw):
            for name, grad in gradients().items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)
