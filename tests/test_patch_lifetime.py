"""What keeps what alive, and whom a patch belongs to."""

import copy
import gc
import weakref

import pytest
import torch
from blocks import blocks_of, flat_unet, run, tree
from kinds import EVERYWHERE, GRID, POOL, SIMILARITY, kinds, of
from patching import EXAMPLE, answer, changed, pickled

from agentsd import AgentConfig, Rule, apply_patch, early, get_patch, patch_unet, patched, remove_patch


@of("similarity", "everywhere")
def test_a_dropped_model_is_freed_with_its_patch(kw):
    unet = flat_unet()
    patch_unet(unet, AgentConfig(**kw), kv_context=lambda attn, x, unet=unet: (x, x))
    run(unet, EXAMPLE)
    alive = [weakref.ref(unet), weakref.ref(blocks_of(unet)[0]), weakref.ref(get_patch(unet))]
    del unet
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    # nor does a removed patch keep its model
    unet = flat_unet()
    patch, alive = patch_unet(unet, AgentConfig(**kw)), weakref.ref(unet)
    run(unet, EXAMPLE)
    remove_patch(unet)
    del unet
    gc.collect()
    assert alive() is None
    patch.install()
    assert not patch.active


def test_no_tokens_are_kept_after_a_call(unet):
    refs, block = [], blocks_of(unet)[0]
    for part in (block.attn1, block.attn2, block.ff):
        part.register_forward_pre_hook(lambda m, args: refs.append(weakref.ref(args[0])))
    with patched(unet, **EVERYWHERE):
        run(unet, EXAMPLE)
        gc.collect()
        assert len(refs) == 3
        assert all(ref() is None for ref in refs)
        assert not get_patch(unet).last_call.matchings


COPIED = {"everywhere": EVERYWHERE, "rules": {**GRID, "rules": (Rule(POOL, downsample=2),), "stages": early(0.6)}}


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@kinds(COPIED)
def test_a_copy_has_a_patch_of_its_own(any_unet, kw, copied):
    unet, plain = any_unet, answer(any_unet)
    apply_patch(unet, **kw)
    out = answer(unet)
    twin = copied(unet)
    assert get_patch(twin) is not get_patch(unet)
    assert get_patch(twin).config == get_patch(unet).config
    with torch.no_grad():
        for p in unet.parameters():
            p.zero_()
    assert torch.equal(answer(twin), out)
    assert not get_patch(twin).notes
    remove_patch(unet)
    assert torch.equal(answer(twin), out)
    with patched(twin, **SIMILARITY):
        pass
    assert torch.equal(answer(twin), out)
    remove_patch(twin)
    assert get_patch(twin) is None
    assert tree(twin).keys() == tree(unet).keys()
    assert "forward" not in vars(blocks_of(twin)[0].attn1)
    assert changed(answer(twin), out)
    assert torch.equal(answer(twin), plain)
