"""The patch beside what others do to the modules: wrappers, LoRA, hypernetworks, tomesd."""

import pytest
import tomesd
import torch
from blocks import blocks_of, run, tree
from kinds import GRID, MERGING, SIMILARITY, of, self_attention_kinds
from patching import EXAMPLE, changed, patched_output, undisturbed
from torch import nn

import agentsd
from agentsd import AgentConfig, apply_patch, get_patch, patch_unet, patched, remove_patch


class TestOtherWrappers:
    @staticmethod
    def wrap(attn, seen):
        original = attn.forward

        def wrapper(x, *args, **kwargs):
            seen.append(x.shape[1])
            return original(x, *args, **kwargs)

        attn.forward = wrapper
        return wrapper

    def test_one_installed_before_ours_gets_what_is_not_ours_and_is_there_afterwards(self, unet):
        attns, seen = [block.attn1 for block in blocks_of(unet)[:2]], []
        wrappers = [self.wrap(attn, seen) for attn in attns]
        for settings, theirs in ((SIMILARITY, [36]), (MERGING, [87, 36])):  # which gives merged tokens to the host
            with undisturbed(unet), patched(unet, **settings):
                seen.clear()
                run(unet, EXAMPLE)
                assert seen == theirs
        assert [vars(attn)["forward"] for attn in attns] == wrappers
        seen.clear()
        run(unet, EXAMPLE)
        assert seen == [144, 36]

    def test_one_installed_after_ours_stays_and_no_longer_meets_us(self, unet):
        attn, seen, plain = blocks_of(unet)[0].attn1, [], run(unet, EXAMPLE)
        apply_patch(unet, **SIMILARITY)
        expected = run(unet, EXAMPLE)
        wrapper = self.wrap(attn, seen)
        assert torch.equal(run(unet, EXAMPLE), expected)
        remove_patch(unet)
        assert vars(attn)["forward"] is wrapper
        seen.clear()
        assert torch.equal(run(unet, EXAMPLE), plain)
        assert seen == [144]
        for _ in range(2):  # a new patch on top, and again
            assert torch.equal(patched_output(unet, EXAMPLE, **SIMILARITY), expected)
            assert vars(attn)["forward"] is wrapper
            assert torch.equal(run(unet, EXAMPLE), plain)

    @self_attention_kinds
    def test_a_wrapper_of_a_projection_sees_all_tokens(self, unet, kw):
        """ControlNet LLLite adds conditioning of the full length there."""
        expected = patched_output(unet, EXAMPLE, **kw)
        attn, seen = blocks_of(unet)[0].attn1, []
        for name in ("to_q", "to_k", "to_v"):
            self.wrap(getattr(attn, name), seen)
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **kw), expected, rtol=0, atol=1e-4)
        assert seen == [144] * 3

    @of("grid", "similarity", "pool")
    def test_kv_context(self, unet, kw):
        """Keys and values from a context of the host's making: the same as other projections."""
        patch_unet(unet, AgentConfig(**kw), kv_context=lambda attn, x: (x * 0.5, x * 2))
        out = run(unet, EXAMPLE)
        assert not get_patch(unet).notes
        remove_patch(unet)
        base = patched_output(unet, EXAMPLE, **kw)
        with torch.no_grad():
            for block in blocks_of(unet):
                if block.attn1.to_q.in_features == 32:  # level 0
                    block.attn1.to_k.weight.mul_(0.5)
                    block.attn1.to_v.weight.mul_(2)
        torch.testing.assert_close(out, patched_output(unet, EXAMPLE, **kw), rtol=0, atol=1e-5)
        assert changed(out, base)


TOME = {"ratio": 0.5, "use_rand": False}


class TestTomesd:
    def model(self, unet):
        """tomesd takes a module as the model."""
        model = nn.Module()
        model.model = nn.Module()
        model.model.diffusion_model = unet
        return model

    def test_ours_first_removed_last(self, unet):
        model, plain = self.model(unet), run(unet, EXAMPLE)
        tome = self.with_tome(model)
        before = tree(unet)
        agents = patched_output(unet, EXAMPLE, **GRID)
        apply_patch(model, **GRID)
        tomesd.apply_patch(model, **TOME)
        # its tokens are no grid any more: ours stands down, and says so
        assert torch.equal(run(unet, EXAMPLE), tome)
        assert len(get_patch(unet).notes) == 1
        tomesd.remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), agents)
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), plain)
        assert {name: cls for name, (cls, _) in tree(unet).items()} == {name: cls for name, (cls, _) in before.items()}

    def with_tome(self, model):
        unet = model.model.diffusion_model
        tomesd.apply_patch(model, **TOME)
        out = run(unet, EXAMPLE)
        tomesd.remove_patch(model)
        assert changed(out, run(unet, EXAMPLE))
        return out

    @pytest.mark.parametrize("order", [(tomesd, agentsd), (agentsd, tomesd)], ids=["tomesd first", "ours first"])
    def test_ours_removed_first_leaves_tomesd_s(self, unet, order):
        model = self.model(unet)
        tome = self.with_tome(model)
        for library in order:
            library.apply_patch(model, **(TOME if library is tomesd else SIMILARITY))
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), tome)
        tomesd.remove_patch(model)

    def test_tomesd_s_removed_first_leaves_ours(self, unet):
        model, plain = self.model(unet), run(unet, EXAMPLE)
        agents = patched_output(unet, EXAMPLE, **SIMILARITY)
        tomesd.apply_patch(model, **TOME)
        apply_patch(model, **SIMILARITY)
        tomesd.remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), agents)
        assert get_patch(model).active
        remove_patch(model)
        assert torch.equal(run(unet, EXAMPLE), plain)
