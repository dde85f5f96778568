"""`patched` inside a patch: what was on the model before is put back as it was."""

import pytest
import torch
from blocks import blocks_of, run
from kinds import CORRECTED, EVERYWHERE, GRID, MERGING, POOL
from patching import EXAMPLE, answer, difference, hooks_of, undisturbed

from agentsd import AgentConfig, Rule, apply_patch, early, get_patch, patch_unet, patched, remove_patch

RULES = {**GRID, "rules": (Rule(POOL, downsample=2), Rule(None, blocks=("output_blocks.*", "up_blocks.*")))}
# Settings of the outer patch, and of the inner one
NESTED = {
    "grid": (GRID, EVERYWHERE),
    "stages": ({**GRID, "stages": early(0.6)}, MERGING),
    "rules": (RULES, CORRECTED),
    "equal": (EVERYWHERE, EVERYWHERE),
}


@pytest.mark.parametrize(("outer", "inner"), NESTED.values(), ids=NESTED)
def test_leaving_the_inner_one_puts_the_outer_one_back(any_unet, outer, inner):
    unet = any_unet
    with undisturbed(unet):
        with patched(unet, **inner):
            other = answer(unet)
        with patched(unet, **outer):
            patch, config, hooked, expected = get_patch(unet), get_patch(unet).config, hooks_of(unet), answer(unet)
            with patched(unet, **inner):
                assert get_patch(unet) is not patch
                assert not patch.active
                assert get_patch(unet).config == AgentConfig(**inner)
                assert torch.equal(answer(unet), other)
                with patched(unet, **POOL):
                    assert difference(answer(unet), other) > 0
                assert torch.equal(answer(unet), other)
            assert get_patch(unet) is patch
            assert patch.active
            assert patch.config is config
            assert hooks_of(unet) == hooked
            assert torch.equal(answer(unet), expected)
            assert not patch.notes
        assert torch.equal(expected, other) == (inner == outer)


def test_its_report_and_its_notes_go_on_and_a_host_s_context_of_keys_and_values_is_kept(unet):
    patch_unet(unet, AgentConfig(**GRID), kv_context=lambda attn, x: (x * 0.5, x * 2))
    patch, expected = get_patch(unet), run(unet, EXAMPLE)
    patch.note("somebody's reason")
    layers, seen = patch.report(), []
    patch.observer = seen.append
    with patched(unet, **GRID):
        assert difference(run(unet, EXAMPLE), expected) > 0
        assert not seen
    assert [layer.calls for layer in patch.report()] == [layer.calls for layer in layers]
    assert torch.equal(run(unet, EXAMPLE), expected)
    assert [layer.plan for layer in patch.report()] == [layer.plan for layer in layers]
    twice = [{action: 2 * count for action, count in layer.calls.items()} for layer in layers]
    assert [layer.calls for layer in patch.report()] == twice
    assert patch.notes == {"somebody's reason": 1}
    assert len(seen) == 3


@pytest.mark.parametrize("where", ["the block", "a forward"])
def test_after_an_exception(unet, where):
    def fail(*_):
        raise KeyboardInterrupt

    def interrupted():
        with patched(unet, 0.3, agent_ratio=0.9) as same:
            assert same is unet
            assert get_patch(unet).config.ratio == 0.3
            if where == "the block":
                fail()
            handle = unet.out.register_forward_pre_hook(fail)
            try:
                run(unet, EXAMPLE)
            finally:
                handle.remove()

    with undisturbed(unet), patched(unet, **GRID):
        patch, expected = get_patch(unet), run(unet, EXAMPLE)
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert get_patch(unet) is patch
        assert torch.equal(run(unet, EXAMPLE), expected)


@pytest.mark.parametrize("outer", [None, GRID])
@pytest.mark.parametrize("how", [apply_patch, lambda unet, **kw: patched(unet, **kw).__enter__()])
def test_an_installation_that_fails_is_taken_back(unet, how, outer):
    def fail(*args, **kwargs):
        raise RuntimeError("no hook")

    with undisturbed(unet):
        if outer:
            apply_patch(unet, **outer)
        patch, expected, hooked = get_patch(unet), run(unet, EXAMPLE), hooks_of(unet)
        last = blocks_of(unet)[-1].ff
        last.register_forward_hook = fail
        with pytest.raises(RuntimeError, match="no hook"):
            how(unet, **EVERYWHERE)
        del last.register_forward_hook
        assert get_patch(unet) is patch
        assert hooks_of(unet) == hooked
        assert torch.equal(run(unet, EXAMPLE), expected)
        remove_patch(unet)


def test_what_is_done_inside_without_a_with_block_stays(unet):
    with undisturbed(unet):
        with patched(unet, **GRID):
            outer, expected = get_patch(unet), run(unet, EXAMPLE)
            with patched(unet, **POOL):
                remove_patch(unet)
                assert get_patch(unet) is None
            assert get_patch(unet) is outer
            assert torch.equal(run(unet, EXAMPLE), expected)
            with patched(unet, **POOL):
                apply_patch(unet, **MERGING)
                theirs, expected = get_patch(unet), run(unet, EXAMPLE)
            assert get_patch(unet) is theirs
        assert get_patch(unet) is theirs
        assert torch.equal(run(unet, EXAMPLE), expected)
        remove_patch(unet)
