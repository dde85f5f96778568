"""Apply, remove, apply again: nothing of the patch is left behind."""

import pytest
import torch
from blocks import as_model, blocks_of, run, tree
from kinds import EVERYWHERE, GRID, SIMILARITY, by_kind
from patching import EXAMPLE, answer, changed, hooks_of, undisturbed

from agentsd import apply_patch, get_patch, patched, remove_patch
from agentsd.patching.call import current_call


class TestRemoval:
    @by_kind
    def test_leaves_the_module_tree_as_it_was(self, any_unet, kw):
        with undisturbed(any_unet) as plain:
            before = tree(any_unet)
            apply_patch(any_unet, **kw)
            assert tree(any_unet) != before
            assert changed(answer(any_unet), plain)
            assert not get_patch(any_unet).notes
            remove_patch(any_unet)

    def test_by_any_name_of_the_model_and_twice_is_once(self, unet):
        model = as_model(unet)
        with undisturbed(unet):
            for other in (unet, model.model, model):
                assert apply_patch(model, **EVERYWHERE) is model
                patch = get_patch(other)
                assert patch is get_patch(unet)
                assert patch.active
                for _ in range(2):  # the second has nothing to remove
                    assert remove_patch(other) is other
                    patch.remove()
                    assert get_patch(model) is None
                    assert not patch.active

    @pytest.mark.parametrize(
        ("error", "place"), [(RuntimeError, "attn1"), (KeyboardInterrupt, "attn2"), (RuntimeError, "ff")]
    )
    def test_after_an_exception_in_the_middle_of_a_forward(self, unet, error, place):
        def fail(*_):
            raise error("stopped")

        with undisturbed(unet):
            apply_patch(unet, **EVERYWHERE)
            expected = run(unet, EXAMPLE)
            for register in (
                getattr(blocks_of(unet)[-1], place).register_forward_pre_hook,
                blocks_of(unet)[1].ff.register_forward_hook,
            ):
                handle = register(fail)
                with pytest.raises(error, match="stopped"):
                    run(unet, EXAMPLE)
                handle.remove()
                assert torch.equal(run(unet, EXAMPLE), expected), "the patch is still whole"
                assert not get_patch(unet).notes
            remove_patch(unet)
            assert current_call() is None

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


def test_applying_twice_replaces(unet):
    with undisturbed(unet):
        first = get_patch(apply_patch(unet, **GRID))
        expected, once = run(unet, EXAMPLE), hooks_of(unet)
        other = get_patch(apply_patch(unet, **EVERYWHERE))
        second = get_patch(apply_patch(unet, **GRID))
        assert (first.active, other.active, second.active) == (False, False, True)
        assert hooks_of(unet) == once
        assert torch.equal(run(unet, EXAMPLE), expected)
        first.remove()  # late, and without effect on what replaced it
        assert get_patch(unet) is second
        assert torch.equal(run(unet, EXAMPLE), expected)
        other.install()
        assert not second.active
        first.install()  # again
        assert (first.active, other.active, get_patch(unet)) == (True, False, first)
        assert torch.equal(run(unet, EXAMPLE), expected)
        remove_patch(unet)
