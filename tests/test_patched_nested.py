"""`patched` inside a patch: what was on the model before is put back as it was."""

from __future__ import annotations

import pytest
import torch
from blocks import blocks_of, run, tree
from patching import CORRECTED, EVERYWHERE, EXAMPLE, GRID, MERGING, POOL, SIMILARITY, difference, hooks_of, undisturbed

from agentsd import (
    AgentConfig,
    Rule,
    SettingError,
    apply_patch,
    early,
    get_patch,
    paper_stages,
    patch_unet,
    patched,
    remove_patch,
)

OUTER = {
    "grid": GRID,
    "similarity": SIMILARITY,
    "everywhere": EVERYWHERE,
    "stages": {**GRID, "stages": early(0.6)},
    "rules": {**GRID, "rules": (Rule(POOL, downsample=2), Rule(None, blocks="output_blocks.*"))},
}
INNER = {"merging": MERGING, "everywhere": EVERYWHERE, "corrected": CORRECTED}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_leaving_the_inner_one_puts_the_outer_one_back(unet, outer, inner):
    with undisturbed(unet):
        with patched(unet, **inner):
            other = run(unet, EXAMPLE)
        with patched(unet, **outer):
            patch, config, hooked = get_patch(unet), get_patch(unet).config, hooks_of(unet)
            expected = run(unet, EXAMPLE)
            with patched(unet, **inner):
                assert get_patch(unet) is not patch
                assert not patch.active
                assert get_patch(unet).config == AgentConfig(**inner)
                assert torch.equal(run(unet, EXAMPLE), other)
            assert get_patch(unet) is patch
            assert patch.active
            assert patch.config is config
            assert hooks_of(unet) == hooked
            assert torch.equal(run(unet, EXAMPLE), expected)
            assert not patch.notes
        assert torch.equal(expected, other) == (inner == outer)


def test_its_report_and_its_notes_go_on(unet):
    patch = get_patch(apply_patch(unet, **GRID))
    run(unet, EXAMPLE)
    patch.note("somebody's reason")
    layers, seen = patch.report(), []
    patch.observer = seen.append
    with patched(unet, **EVERYWHERE):
        run(unet, EXAMPLE)
        assert not seen
    assert [layer.calls for layer in patch.report()] == [layer.calls for layer in layers]
    run(unet, EXAMPLE)
    assert [layer.plan for layer in patch.report()] == [layer.plan for layer in layers]
    assert [layer.calls for layer in patch.report()] == [
        {action: 2 * count for action, count in layer.calls.items()} for layer in layers
    ]
    assert patch.notes == {"somebody's reason": 1}
    assert len(seen) == 3


def test_the_context_of_keys_and_values_is_kept(unet):
    """A host's hypernetworks, say."""
    patch_unet(unet, AgentConfig(**GRID), kv_context=lambda attn, x: (x * 0.5, x * 2))
    expected = run(unet, EXAMPLE)
    with patched(unet, **GRID):
        assert difference(run(unet, EXAMPLE), expected) > 0
    assert torch.equal(run(unet, EXAMPLE), expected)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["the block", "a forward"])
def test_after_an_exception(unet, error, where):
    def fail(*_):
        raise error

    def interrupted():
        with patched(unet, **EVERYWHERE):
            if where == "the block":
                raise error
            handle = unet.out.register_forward_pre_hook(fail)
            try:
                run(unet, EXAMPLE)
            finally:
                handle.remove()

    with undisturbed(unet), patched(unet, **GRID):
        patch, expected = get_patch(unet), run(unet, EXAMPLE)
        with pytest.raises(error):
            interrupted()
        assert get_patch(unet) is patch
        assert torch.equal(run(unet, EXAMPLE), expected)


def test_settings_that_are_wrong_leave_the_outer_one_where_it_is(unet):
    with undisturbed(unet), patched(unet, **GRID):
        patch, before = get_patch(unet), tree(unet)
        with pytest.raises(SettingError), patched(unet, ratio=2):
            pytest.fail("must not be entered")
        assert tree(unet) == before
        assert get_patch(unet) is patch


@pytest.mark.parametrize("how", [apply_patch, lambda unet, **kw: patched(unet, **kw).__enter__()])
def test_an_installation_that_fails_leaves_the_outer_one_where_it_was(unet, how):
    def fail(*args, **kwargs):
        raise RuntimeError("no hook")

    with undisturbed(unet), patched(unet, **GRID):
        patch, expected, hooked = get_patch(unet), run(unet, EXAMPLE), hooks_of(unet)
        last = blocks_of(unet)[-1].ff
        last.register_forward_hook = fail
        with pytest.raises(RuntimeError, match="no hook"):
            how(unet, **EVERYWHERE)
        del last.register_forward_hook
        assert get_patch(unet) is patch
        assert hooks_of(unet) == hooked
        assert torch.equal(run(unet, EXAMPLE), expected)


def test_three_deep(unet):
    settings = [GRID, {**SIMILARITY, "stages": paper_stages()}, POOL]
    with undisturbed(unet):
        alone = []
        for given in settings:
            with patched(unet, **given):
                alone.append(run(unet, EXAMPLE))
        with patched(unet, **settings[0]):
            with patched(unet, **settings[1]):
                with patched(unet, **settings[2]):
                    assert torch.equal(run(unet, EXAMPLE), alone[2])
                assert torch.equal(run(unet, EXAMPLE), alone[1])
                with patched(unet, **settings[2]):
                    assert torch.equal(run(unet, EXAMPLE), alone[2])
                assert torch.equal(run(unet, EXAMPLE), alone[1])
            assert torch.equal(run(unet, EXAMPLE), alone[0])


def test_a_patch_removed_inside_changes_nothing_about_the_outer_one(unet):
    with undisturbed(unet) as plain, patched(unet, **GRID):
        patch, expected = get_patch(unet), run(unet, EXAMPLE)
        with patched(unet, **POOL):
            remove_patch(unet)
            assert get_patch(unet) is None
            assert torch.equal(run(unet, EXAMPLE), plain)
        assert get_patch(unet) is patch
        assert torch.equal(run(unet, EXAMPLE), expected)


def test_a_patch_applied_inside_stays_and_the_outer_one_does_not_come_back(unet):
    """Whoever applies a patch without a `with` block wants it to stay, as without any nesting."""
    with undisturbed(unet):
        with patched(unet, **GRID):
            with patched(unet, **POOL):
                apply_patch(unet, **MERGING)
                theirs, expected = get_patch(unet), run(unet, EXAMPLE)
            assert get_patch(unet) is theirs
        assert get_patch(unet) is theirs
        assert torch.equal(run(unet, EXAMPLE), expected)
        remove_patch(unet)


def test_on_diffusers():
    pytest.importorskip("diffusers", reason="needs diffusers")
    import tiny_pipelines as tiny

    unet = tiny.tiny_unet()
    before, plain = tiny.anatomy(unet), tiny.run(unet)
    with patched(unet, **tiny.GRID):
        patch, inside, expected = get_patch(unet), tiny.anatomy(unet), tiny.run(unet)
        with patched(unet, **tiny.EVERYWHERE):
            assert not torch.equal(tiny.run(unet), expected)
        assert get_patch(unet) is patch
        assert torch.equal(tiny.run(unet), expected)
        assert {name: entry[1:4] for name, entry in tiny.anatomy(unet).items()} == {
            name: entry[1:4] for name, entry in inside.items()
        }
        assert not patch.notes
    assert tiny.anatomy(unet) == before
    assert torch.equal(tiny.run(unet), plain)
