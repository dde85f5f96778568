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

    def test_the_second_uses_the_plan(self, plain, samplings):
        _, second = samplings
        assert difference(second.latent(), plain(**LARGE)) > CHANGED
        assert difference(second.latent(), plain(**LARGE)) < 1
        assert second.text().startswith("Sampling 384×384: 2304 tokens")
        assert "left to the host" not in second.text()

    def test_the_plan_is_in_the_report_and_needs_no_tuning(self, comfyui, samplings):
        _, second = samplings
        plan = second.text().rsplit("plan: ", 1)[1]
        given = comfyui.run(tuned(LARGE, tolerance=0.01, plan=plan).nodes)
        assert np.array_equal(given.latent(), second.latent())
        assert f"plan: {plan}" in given.text()

    def test_off_afterwards(self, comfyui, plain, samplings):
        assert np.array_equal(comfyui.run(Graph(**LARGE).sampled().nodes).latent(), plain(**LARGE))

    def test_a_damaged_plan_is_named(self, comfyui):
        with pytest.raises(GraphError, match="tuning"):
            comfyui.run(tuned(SMALL, plan="nonsense").nodes)

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
