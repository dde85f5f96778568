"""What keeps what alive, and whom a patch belongs to."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from blocks import as_model, blocks_of, flat_unet, golden_unet, run, tree
from patching import EVERYWHERE, EXAMPLE, GRID, SIMILARITY, changed, diffusers_unet, kinds, undisturbed
from torch import nn

from agentsd import AgentConfig, apply_patch, early, get_patch, patch_unet, patched, remove_patch
from agentsd.hosts import example_call, output_tensor


class TestLifetime:
    @kinds({"similarity": SIMILARITY, "everywhere": EVERYWHERE})
    def test_a_dropped_model_is_freed_with_its_patch(self, kw):
        unet = flat_unet()
        patch_unet(unet, AgentConfig(**kw), kv_context=lambda attn, x, unet=unet: (x, x))
        run(unet, EXAMPLE)
        alive = [weakref.ref(unet), weakref.ref(blocks_of(unet)[0]), weakref.ref(get_patch(unet))]
        del unet
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3

    def test_a_removed_patch_keeps_no_model_alive(self):
        unet = flat_unet()
        apply_patch(unet)
        run(unet, EXAMPLE)
        patch, alive = get_patch(unet), weakref.ref(unet)
        remove_patch(unet)
        del unet
        gc.collect()
        assert alive() is None
        patch.remove()
        patch.install()
        assert not patch.active

    def test_no_tokens_are_kept_after_a_call(self, unet):
        refs = []
        blocks_of(unet)[0].attn1.register_forward_pre_hook(lambda m, args: refs.append(weakref.ref(args[0])))
        with patched(unet, **EVERYWHERE):
            run(unet, EXAMPLE)
            gc.collect()
            assert refs
            assert all(ref() is None for ref in refs)

    def test_a_deep_copy_has_a_patch_of_its_own(self, unet):
        apply_patch(unet, **SIMILARITY)
        out = run(unet, EXAMPLE)
        twin = copy.deepcopy(unet)
        with torch.no_grad():
            for p in unet.parameters():
                p.zero_()
        assert torch.equal(run(twin, EXAMPLE), out)
        remove_patch(unet)
        assert torch.equal(run(twin, EXAMPLE), out)
        remove_patch(twin)
        assert get_patch(twin) is None
        assert tree(twin).keys() == tree(unet).keys()
        assert "forward" not in vars(blocks_of(twin)[0].attn1)
        assert changed(run(twin, EXAMPLE), out)

    @pytest.mark.parametrize("model", ["LDM", "diffusers"])
    @kinds({"grid": GRID, "everywhere": EVERYWHERE, "stages": {**GRID, "stages": early(0.6)}})
    def test_a_patched_model_can_be_pickled(self, model, kw):
        unet = golden_unet() if model == "LDM" else diffusers_unet("tiny_unet")
        example = example_call(unet, 16, 16, 0.5)

        @torch.no_grad()
        def output(unet):
            return output_tensor(unet(*example.args, **example.kwargs))

        file, plain = io.BytesIO(), output(unet)
        with patched(unet, **kw):
            out = output(unet)
            torch.save(unet, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert get_patch(twin) is not get_patch(unet)
        assert torch.equal(output(twin), out)
        assert not get_patch(twin).notes
        with patched(twin, **SIMILARITY):
            pass
        assert torch.equal(output(twin), out)
        remove_patch(twin)
        assert torch.equal(output(twin), plain)
        assert torch.equal(output(unet), plain)

    def test_the_weights_of_a_patched_model_can_be_saved(self, unet):
        file = io.BytesIO()
        with patched(unet):
            torch.save(unet.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True).keys() == unet.state_dict().keys()

    def test_two_models_have_patches_of_their_own(self, unet):
        other = golden_unet()
        apply_patch(unet, **GRID)
        apply_patch(other, **SIMILARITY)
        remove_patch(unet)
        assert get_patch(other).active
        assert changed(run(other, EXAMPLE), run(unet, EXAMPLE))


class TestModels:
    def test_apply_returns_the_model(self, unet):
        for model in (as_model(unet), as_model(unet).model, unet):
            assert apply_patch(model) is model
            assert get_patch(unet) is get_patch(model)

    def test_an_ldm_model_that_is_a_module(self, unet):
        model = nn.Module()
        model.model = nn.Module()
        model.model.diffusion_model = unet
        model.first_stage_model = nn.Conv2d(3, 3, 1)
        with undisturbed(unet):
            apply_patch(model)
            remove_patch(model)
