"""Apply, remove, apply again: nothing of the patch is left behind."""

from __future__ import annotations

import pytest
import torch
from blocks import as_model, blocks_of, run, tree
from patching import (
    EVERYWHERE,
    EXAMPLE,
    GRID,
    SIMILARITY,
    by_kind,
    changed,
    hooks_of,
    kinds,
    patched_output,
    undisturbed,
)

from agentsd import AgentConfig, apply_patch, get_patch, patch_unet, patched, remove_patch


class TestRemoval:
    @by_kind
    def test_leaves_the_module_tree_as_it_was(self, unet, kw):
        before = tree(unet)
        with undisturbed(unet) as plain:
            apply_patch(unet, **kw)
            assert tree(unet) != before
            assert changed(run(unet, EXAMPLE), plain)
            remove_patch(unet)

    @by_kind
    def test_twice_is_once(self, unet, kw):
        with undisturbed(unet):
            apply_patch(unet, **kw)
            patch = get_patch(unet)
            assert patch.active
            remove_patch(unet)
            remove_patch(unet)
            patch.remove()
            assert not patch.active

    def test_of_a_model_never_patched(self, unet):
        model = as_model(unet)
        with undisturbed(unet):
            assert remove_patch(model) is model
            assert remove_patch(unet) is unet

    def test_by_any_name_of_the_model(self, unet):
        model = as_model(unet)
        for other in (unet, model.model, model):
            apply_patch(model)
            assert get_patch(other) is get_patch(model)
            assert get_patch(other) is not None
            remove_patch(other)
            assert get_patch(model) is None

    @kinds({"similarity": SIMILARITY, "everywhere": EVERYWHERE})
    @pytest.mark.parametrize(
        ("error", "place"), [(RuntimeError, "attn1"), (KeyboardInterrupt, "attn2"), (RuntimeError, "ff")]
    )
    def test_after_an_exception_in_the_middle_of_a_forward(self, unet, kw, error, place):
        def fail(*_):
            raise error("stopped")

        with undisturbed(unet):
            expected = patched_output(unet, EXAMPLE, **kw)
            apply_patch(unet, **kw)
            handle = getattr(blocks_of(unet)[-1], place).register_forward_pre_hook(fail)
            with pytest.raises(error, match="stopped"):
                run(unet, EXAMPLE)
            handle.remove()
            # the patch is still whole,
            assert torch.equal(run(unet, EXAMPLE), expected)
            handle = blocks_of(unet)[1].ff.register_forward_hook(fail)
            with pytest.raises(error, match="stopped"):
                run(unet, EXAMPLE)
            handle.remove()
            # and can be taken off
            remove_patch(unet)

    def test_by_the_context_manager_after_an_exception(self, unet):
        model = as_model(unet)

        def interrupted():
            with patched(model, 0.3, agent_ratio=0.9) as same:
                assert same is model
                assert get_patch(unet).config.ratio == 0.3
                assert changed(run(unet, EXAMPLE), plain)
                raise KeyError

        with undisturbed(unet) as plain, pytest.raises(KeyError):
            interrupted()

    def test_a_failing_installation_is_taken_back(self, unet, monkeypatch):
        last = blocks_of(unet)[-1].ff
        with undisturbed(unet):

            def fail(*args, **kwargs):
                raise RuntimeError("no hook")

            last.register_forward_hook = fail
            with pytest.raises(RuntimeError, match="no hook"):
                apply_patch(unet, merge_mlp=True)
            del last.register_forward_hook

    def test_a_patch_may_be_removed_while_its_u_net_runs(self, unet):
        with undisturbed(unet):
            apply_patch(unet, **SIMILARITY)
            handle = blocks_of(unet)[3].norm2.register_forward_hook(lambda *_: remove_patch(unet) and None)
            assert run(unet, EXAMPLE).isfinite().all()
            handle.remove()

    def test_training_mode_and_weights_are_not_touched(self, unet):
        weights = {name: p.clone() for name, p in unet.state_dict().items()}
        with patched(unet, **EVERYWHERE):
            assert unet.state_dict().keys() == weights.keys()
            run(unet, EXAMPLE)
        assert not any(module.training for module in unet.modules())
        assert all(torch.equal(p, weights[name]) for name, p in unet.state_dict().items())


class TestApplyingTwice:
    def test_replaces(self, unet):
        with undisturbed(unet):
            expected = patched_output(unet, EXAMPLE, **GRID)
            first = get_patch(apply_patch(unet, **EVERYWHERE))
            second = get_patch(apply_patch(unet, **GRID))
            assert second is not first
            assert not first.active
            assert torch.equal(run(unet, EXAMPLE), expected)
            first.remove()  # late, and without effect on what replaced it
            assert get_patch(unet) is second
            assert torch.equal(run(unet, EXAMPLE), expected)
            remove_patch(unet)

    def test_many_times_leaves_one_set_of_hooks(self, unet):
        apply_patch(unet, **EVERYWHERE)
        once = hooks_of(unet)
        for _ in range(3):
            apply_patch(unet, **EVERYWHERE)
        assert hooks_of(unet) == once

    def test_a_removed_patch_can_be_installed_again(self, unet):
        with undisturbed(unet):
            patch = patch_unet(unet, AgentConfig(**GRID))
            out = run(unet, EXAMPLE)
            patch.remove()
            other = patch_unet(unet, AgentConfig(**EVERYWHERE))
            patch.install()
            assert not other.active
            assert get_patch(unet) is patch
            assert torch.equal(run(unet, EXAMPLE), out)
            patch.remove()
