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


def wrap(attn, seen):
    original = attn.forward

    def wrapper(x, *args, **kwargs):
        seen.append(x.shape[1])
        return original(x, *args, **kwargs)

    attn.forward = wrapper
    return wrapper


def test_one_installed_before_ours_gets_what_is_not_ours_and_is_there_afterwards(unet):
    attns, seen = [block.attn1 for block in blocks_of(unet)[:2]], []
    wrappers = [wrap(attn, seen) for attn in attns]
    for settings, theirs in ((SIMILARITY, [36]), (MERGING, [87, 36])):  # which gives merged tokens to the host
        with undisturbed(unet), patched(unet, **settings):
            seen.clear()
            run(unet, EXAMPLE)
            assert seen == theirs
    assert [vars(attn)["forward"] for attn in attns] == wrappers
    seen.clear()
    run(unet, EXAMPLE)
    assert seen == [144, 36]


def test_one_installed_after_ours_stays_and_no_longer_meets_us(unet):
    attn, seen, plain = blocks_of(unet)[0].attn1, [], run(unet, EXAMPLE)
    apply_patch(unet, **SIMILARITY)
    expected = run(unet, EXAMPLE)
    wrapper = wrap(attn, seen)
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
def test_a_wrapper_of_a_projection_sees_all_tokens(unet, kw):
    """ControlNet LLLite adds conditioning of the full length there."""
    expected = patched_output(unet, EXAMPLE, **kw)
    attn, seen = blocks_of(unet)[0].attn1, []
    for name in ("to_q", "to_k", "to_v"):
        wrap(getattr(attn, name), seen)
    torch.testing.assert_close(patched_output(unet, EXAMPLE, **kw), expected, rtol=0, atol=1e-4)
    assert seen == [144] * 3


@of("grid", "similarity", "pool")
def test_kv_context(unet, kw):
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


TOMESD, OURS = (tomesd, {"ratio": 0.5, "use_rand": False}), (agentsd, GRID)


@pytest.mark.parametrize("order", [(TOMESD, OURS), (OURS, TOMESD)], ids=["tomesd first", "ours first"])
@pytest.mark.parametrize(("gone", "kept"), [(TOMESD, OURS), (OURS, TOMESD)], ids=["tomesd gone", "ours gone"])
def test_beside_tomesd_either_may_be_removed_first(unet, order, gone, kept):
    model, plain, before, alone = nn.Module(), run(unet, EXAMPLE), tree(unet), {}
    model.model = nn.Module()  # tomesd takes a module as the model
    model.model.diffusion_model = unet
    for library, settings in order:
        library.apply_patch(model, **settings)
        alone[library] = run(unet, EXAMPLE)
        library.remove_patch(model)
        assert changed(alone[library], plain)
    for library, settings in order:
        library.apply_patch(model, **settings)
    # tomesd's tokens are no grid: ours stands down, and says so
    assert torch.equal(run(unet, EXAMPLE), alone[tomesd])
    assert len(get_patch(unet).notes) == 1
    gone[0].remove_patch(model)
    assert torch.equal(run(unet, EXAMPLE), alone[kept[0]])
    kept[0].remove_patch(model)
    assert torch.equal(run(unet, EXAMPLE), plain)
    assert {name: cls for name, (cls, _) in tree(unet).items()} == {name: cls for name, (cls, _) in before.items()}
