"""Settings that differ over the diffusion."""

from __future__ import annotations

import logging

import pytest
import torch
from blocks import actions, attention_calls, blocks_of, run
from patching import CHANGED, EXAMPLE, GRID, difference

import agentsd
from agentsd import Stage, apply_patch, early, get_patch, paper_stages, patched, remove_patch


class TestStages:
    @staticmethod
    def done_at(unet, t):
        """(actions, difference to unpatched, notes) at the timesteps t."""
        example = (EXAMPLE[0], torch.as_tensor(t), EXAMPLE[2])
        out = run(unet, example)
        patch = get_patch(unet)
        stage, notes, calls = actions(patch), dict(patch.notes), [layer.calls for layer in patch.report()]
        patch.remove()
        plain = run(unet, example)
        apply_patch(unet, **{f: getattr(patch.config, f) for f in agentsd.config.SETTINGS})
        return stage[0], difference(out, plain), notes, calls

    @pytest.mark.parametrize(
        ("t", "action"),
        [
            ([601, 0], "agents"),
            ([600, 600], "merge"),
            ([0, 0], "merge"),
            ([1000, 3], "agents"),
        ],
    )
    def test_the_paper_s_schedule(self, unet, t, action):
        apply_patch(unet, stages=paper_stages())
        stage, changed, notes, _ = self.done_at(unet, t)
        assert stage == action
        assert changed > CHANGED
        assert not notes

    @pytest.mark.parametrize(("t", "action"), [([401, 9], "agents"), ([400, 400], "untouched")])
    def test_agents_early_and_untouched_late(self, unet, t, action):
        apply_patch(unet, stages=early(0.6), **GRID)
        stage, changed, notes, calls = self.done_at(unet, t)
        assert stage == action
        assert (changed > CHANGED) == (action == "agents")
        assert changed == 0 or action == "agents"
        assert not notes
        assert calls[0] == {action: 1}

    @pytest.mark.parametrize("t", [[-1, -1], [1001, 1001], [float("nan")] * 2, [5, 1500]])
    def test_outside_the_diffusion_they_stand_down_and_say_so_once(self, unet, t, caplog):
        apply_patch(unet, stages=early(1.0))
        with caplog.at_level(logging.INFO, "agentsd"):
            example = (EXAMPLE[0], torch.tensor(t), EXAMPLE[2])
            run(unet, example)
            out = run(unet, example)
        patch = get_patch(unet)
        (note,) = patch.notes
        assert "1000 to 0" in note
        assert patch.notes[note] == 2
        assert len(caplog.records) == 1
        remove_patch(unet)
        assert torch.equal(out.nan_to_num(), run(unet, example).nan_to_num())

    def test_without_stages_any_timestep_is_fine(self, unet):
        apply_patch(unet)
        _, changed, notes, _ = self.done_at(unet, [-5, 2000])
        assert changed > CHANGED
        assert not notes

    def test_each_stage_merges_what_it_says(self, unet):
        stages = [Stage(0.5, {"merge_mlp": True}), Stage(1.0, {"merge_crossattn": True, "merge_attn": False})]
        block = blocks_of(unet)[0]
        with patched(unet, stages=stages):
            seen = []
            for t in (900, 100):
                with attention_calls(block.attn2) as two, attention_calls(block.ff) as ff:
                    run(unet, (EXAMPLE[0], torch.tensor([t, t]), EXAMPLE[2]))
                seen.append((two[0][0].shape[1], ff[0][0].shape[1], actions(get_patch(unet))[0]))
        assert seen == [(144, 87, "agents"), (87, 144, "untouched")]
