"""The node Agent Attention (Tuned) in a real ComfyUI: it tunes on the first sampling, and keeps what it found."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfyui_host import Graph, GraphError, Outputs
from test_comfyui import CHANGED, difference

from agentsd.words import percent

TUNED = "tuned on this sampling, used from the next one on: "
SAMPLED = "Agent Attention: Sampling 256x256: made without Agent Attention"
# Large enough that full attention takes most of the time, and a plan is found
LARGE = {"size": (384, 384), "steps": 2}
# Too small for any gain: seconds, where only when it tunes is of interest
SMALL = {"size": (128, 128), "steps": 1}
TOLERANCE = 0.3


def tuned(given, tolerance=TOLERANCE, **inputs) -> Graph:
    return Graph(**given).on_model("AgentAttentionTuned", tolerance=tolerance, **inputs).sampled().reported()


@pytest.fixture(scope="module")
def samplings(comfyui):
    """The first and the second sampling."""
    return [comfyui.run(tuned(LARGE).nodes) for _ in range(2)]


class TestPlan:
    def test_the_first_sampling_is_made_without_us_and_tuned_on(self, plain, samplings):
        first, _ = samplings
        assert np.array_equal(first.latent(), plain(**LARGE))
        assert first.text().startswith(f"{TUNED}tuned to {percent(TOLERANCE)} at a latent of 48×48: deviation")
        assert "Sampling 384×384: made without Agent Attention." in first.text()

    def test_the_second_uses_the_plan(self, plain, samplings):
        _, second = samplings
        assert difference(second.latent(), plain(**LARGE)) > CHANGED
        assert difference(second.latent(), plain(**LARGE)) < 1
        assert second.text().startswith("Sampling 384×384: tuned, U-Net output within 30% (deviation ")
        assert "measured), in all 2 U-Net calls" in second.text()
        assert "left to the host" not in second.text()

    @pytest.mark.parametrize("prefix", ["", "plan: "])
    def test_the_plan_is_in_the_report_and_needs_no_tuning(self, comfyui, samplings, prefix):
        _, second = samplings
        plan = prefix + second.text().rsplit("plan: ", 1)[1]
        given = comfyui.run(tuned(LARGE, tolerance=0.01, plan=plan).nodes)
        assert np.array_equal(given.latent(), second.latent())
        assert given.text().endswith(plan)

    def test_off_afterwards(self, comfyui, plain, samplings):
        assert np.array_equal(comfyui.run(Graph(**LARGE).sampled().nodes).latent(), plain(**LARGE))

    def test_a_damaged_plan_is_named(self, comfyui):
        with pytest.raises(GraphError, match="tuning"):
            comfyui.queue(tuned(SMALL, plan="nonsense").nodes)

    def test_a_plan_for_another_layout_is_an_error(self, comfyui, samplings):
        plan = samplings[1].text().rsplit("plan: ", 1)[1]
        with pytest.raises(GraphError, match="for another model"):
            comfyui.run(tuned({**SMALL, "layout": "SDXL"}, plan=plan).nodes)


class TestWhenItTunes:
    def test_once_for_a_model_a_size_and_a_tolerance(self, comfyui, plain):
        def tunes(tolerance=TOLERANCE, **other) -> bool:
            given = {**SMALL, **other}
            made = comfyui.run(tuned(given, tolerance).nodes)
            if made.text().startswith(TUNED):
                assert np.array_equal(made.latent(), plain(**given))
                return True
            assert made.text().startswith("Sampling ")
            return False

        assert tunes()
        assert not tunes()
        assert tunes(tolerance=0.1)
        assert tunes(size=(192, 128))
        assert tunes(weights=2)
        assert tunes(layout="SDXL")
        assert not any((tunes(), tunes(tolerance=0.1), tunes(size=(192, 128)), tunes(weights=2), tunes(layout="SDXL")))

    def test_anew_for_a_changed_lora(self, comfyui, lora):
        def tunes(strength: float) -> bool:
            graph, (kind, inputs) = Graph(**SMALL), lora
            graph.on_model(kind, **{**inputs, "strength_model": strength})
            graph.on_model("AgentAttentionTuned", tolerance=0.21).sampled().reported()
            return comfyui.run(graph.nodes).text().startswith(TUNED)

        assert [tunes(strength) for strength in (0.0, 1.0, 1.0, 0.5, 0.0, 0.5)] == [
            True,
            True,
            False,
            True,
            False,
            False,
        ]

    def test_anew_for_an_earlier_part_of_the_diffusion(self, comfyui, plain):
        def run(denoise: float) -> Outputs:
            graph = Graph(**{**SMALL, "steps": 2}).on_model("AgentAttentionTuned", tolerance=0.22)
            return comfyui.run(graph.sampled(denoise=denoise).reported().nodes)

        made = [run(denoise) for denoise in (0.2, 0.2, 1.0, 1.0, 0.2)]
        assert [each.text().startswith(TUNED) for each in made] == [True, False, True, False, False]
        assert np.array_equal(made[2].latent(), plain(**{**SMALL, "steps": 2}))

    def test_for_each_size_of_a_hires_pass(self, comfyui):
        graph = Graph(**SMALL).on_model("AgentAttentionTuned", tolerance=0.23).sampled("first")
        graph.reported("first text", "first")
        graph.size = (192, 192)
        graph.sampled("second", after="first", steps=2).reported("second text", "second")
        for expected in (True, False):
            outputs = comfyui.run(graph.nodes)
            assert [outputs.text(name).startswith(TUNED) for name in ("first text", "second text")] == [expected] * 2
        assert "Sampling 192×192" in outputs.text("second text")

    def test_for_the_tile_where_the_image_is_made_in_tiles(self, comfyui, plain):
        graph = Graph(**SMALL).on_model("AgentAttentionTuned", tolerance=0.24).on_model("Tiles").sampled().reported()
        first, second = (comfyui.run(graph.nodes).text() for _ in range(2))
        assert first.startswith(f"{TUNED}tuned to 24% at a latent of 8×8")
        assert second.startswith("Sampling 128×128, in parts of 64×64")

    def test_a_node_that_calls_the_blocks_itself_is_told(self, comfyui):
        graph = Graph(**SMALL).on_model("AgentAttentionTuned", tolerance=0.25).on_model("Blocks").sampled().reported()
        assert comfyui.run(graph.nodes).text().startswith("not tuned: another node calls the U-Net's blocks itself")

    def test_a_merged_model_is_another_one(self, comfyui):
        """The host merges when it loads: before, the weights are those of whatever was sampled last."""
        graph = Graph(**SMALL)
        for name in ("alone", "merged"):
            graph.model = ["tiny", 0]
            if name == "merged":
                graph.add("other", "TinyModel", layout="SD 1", weights=3)
                graph.model = graph.add("merge", "ModelMergeSimple", model1=["tiny", 0], model2=["other", 0], ratio=0.5)
            graph.on_model("AgentAttentionTuned", f"{name} tuned", tolerance=0.25).sampled(name)
            graph.reported(f"{name} text", name)
        for expected in (True, False):
            outputs = comfyui.run(graph.nodes)
            assert [outputs.text(f"{name} text").startswith(TUNED) for name in ("alone", "merged")] == [expected] * 2

    def test_interrupting_the_tuning_keeps_the_image_and_no_plan(self, comfyui, plain):
        given = {"size": (256, 256), "steps": 4}
        graph, before = tuned(given, 0.01), comfyui.output().count(SAMPLED)
        prompt = comfyui.queue(graph.nodes)
        end = time.monotonic() + 120
        # what the sampling says when it has ended, and the tuning begins
        while comfyui.output().count(SAMPLED) == before and time.monotonic() < end:
            time.sleep(0.05)
        comfyui.post("/interrupt", {})
        made = Outputs(comfyui.wait(prompt)["outputs"])
        assert made.text().startswith("not tuned: interrupted")
        assert np.array_equal(made.latent(), plain(**given))
        # it begins anew, and not with what was found by then
        again = comfyui.run(graph.nodes)
        assert again.text().startswith(TUNED)
        assert np.array_equal(again.latent(), plain(**given))
