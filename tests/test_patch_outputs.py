"""What the patch computes: at any size and setting, and the same every time."""

import random

import numpy as np
import pytest
import torch
from blocks import inputs, run, tree
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kinds import DRAWN, EVERYWHERE, by_kind
from patching import EXAMPLE, FLAT, at, changed, patched_output

from agentsd import Rule, early, get_patch, paper_stages, patched

RULES = [
    (Rule(None, blocks="middle_block.*"), Rule({"merge_mlp": True, "sx": 2, "sy": 2}, blocks="input_blocks.*")),
    (Rule({"method": "pool"}, downsample=(1, 2), until=0.6), Rule({"sx": 2}, since=0.5)),
]


class TestAnySize:
    @settings(max_examples=40)
    @given(
        B=st.integers(1, 3),
        h=st.integers(1, 20),
        w=st.integers(1, 20),
        kw=st.fixed_dictionaries(
            {
                **DRAWN,
                "sx": st.integers(1, 16),
                "sy": st.integers(1, 16),
                "attn_precision": st.sampled_from([None, "fp32"]),
                "use_rand": st.booleans(),
                "agent_source": st.sampled_from(["similarity", "grid"]),
                "method": st.sampled_from(["agent", "agent", "pool", "corrected", "merge"]),
                "min_tokens": st.sampled_from([0, 0, 100]),
                "max_agents": st.none() | st.integers(1, 100),
                "seed": st.integers(0, 2**63 - 1),
                "stages": st.sampled_from([(), (), paper_stages(), early(0.3)]),
                "rules": st.sampled_from([(), (), *RULES]),
            }
        ),
    )
    def test_the_output_is_finite_and_removal_exact(self, B, h, w, kw):
        assume(h * w > 1)  # GroupNorm of the unpatched U-Net needs two values
        unet, example = FLAT, inputs(B, h, w)
        before, plain = tree(unet), run(unet, example)
        with patched(unet, **kw):
            out = run(unet, example)
            patch = get_patch(unet)
            assert not patch.notes
            assert patch.explain(h, w, progress=0.5) == [(layer.name, layer.plan) for layer in patch.report()]
            plans = [plan for _, plan in patch.explain(h, w, progress=0.5) if plan is not None]
            nothing = all(plan.action == "untouched" and not plan.r for plan in plans)
            assert torch.equal(out, run(unet, example))
        assert out.shape == plain.shape
        assert out.isfinite().all()
        assert not nothing or torch.equal(out, plain)
        assert tree(unet) == before
        assert torch.equal(run(unet, example), plain)


class TestReproducibility:
    @by_kind
    def test_two_runs_are_equal_to_the_bit_whatever_ran_before(self, unet, kw):
        out = patched_output(unet, EXAMPLE, **kw)
        torch.manual_seed(99)
        patched_output(unet, inputs(1, 12, 20, t=[3]), **EVERYWHERE)
        torch.rand(7)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            two = [patched_output(unet, EXAMPLE, **kw) for _ in range(2)]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(two[0], two[1])
        assert torch.equal(patched_output(unet, EXAMPLE, **kw), out)

    @by_kind
    def test_a_row_of_a_batch_is_the_image_made_alone(self, unet, kw):
        x, t, context = inputs(3, 12, 12, seed=5)
        together = patched_output(unet, (x, t, context), **kw)
        for k in range(3):
            row = slice(k, k + 1)
            alone = patched_output(unet, (x[row], t[row], context[row]), **kw)
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
        assert changed(together, run(unet, (x, t, context)))

    def test_the_global_generators_are_not_touched(self, unet):
        def states():
            return torch.get_rng_state(), random.getstate(), np.random.get_state()

        before = states()
        patched_output(unet, EXAMPLE, **EVERYWHERE)
        after = states()
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))

    def test_the_partition_depends_on_seed_and_timestep(self, unet):
        def partition(t=500, **kw):
            with patched(unet, **kw):
                run(unet, at(t))
                (made,) = get_patch(unet).last_call.partitions.values()
            return made.dst

        assert torch.equal(partition(), partition())
        for other in ({"seed": 1}, {"use_rand": False}, {"t": 501}):
            assert not torch.equal(partition(), partition(**other))
        assert torch.equal(partition(use_rand=False), partition(use_rand=False, seed=1, t=501))

    @pytest.mark.parametrize("make", [torch.tensor, lambda t: torch.tensor(t, dtype=torch.float16), lambda t: t[0]])
    def test_the_timestep_s_type_does_not_matter(self, unet, make):
        expected = patched_output(unet, EXAMPLE)
        unet.forward = lambda x, timesteps, context: type(unet).forward(unet, x, EXAMPLE[1], context)
        with patched(unet), torch.no_grad():
            assert torch.equal(unet(EXAMPLE[0], timesteps=make([500, 500]), context=EXAMPLE[2]), expected)
