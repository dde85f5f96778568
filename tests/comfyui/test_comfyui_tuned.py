"""The node Agent Attention (Tuned) in a real ComfyUI: it tunes on the first sampling, and keeps what it found."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_host import Graph, Outputs
from servers import HostError
from test_comfyui import CHANGED, difference

ON_THIS = "tuned on this sampling, "
TUNED = f"{ON_THIS}used from the next one on: "
AGAIN = f"{ON_THIS}and again on the next one: "  # on a busy machine it may not be told whether a plan is faster
SAMPLED = "Agent Attention: Sampling 256x256: made without Agent Attention"
# Large enough that full attention takes most of the time, and a plan is found
LARGE = {"size": (384, 384), "steps": 2}
# Too small for any gain: seconds, where only when it tunes is of interest
SMALL = {"size": (128, 128), "steps": 1}


def tuned(tolerance=0.3, plan="", **given) -> Graph:
    return Graph(**given).on_model("AgentAttentionTuned", tolerance=tolerance, plan=plan)


def settled(comfyui, graph: Graph, *names: str) -> tuple[list[bool], Outputs]:
    """Run a graph until nothing is to be tuned on again; say which reports told of tuning first, and its outputs."""
    first = outputs = comfyui.run(graph)
    names = names or ("text",)
    while any(outputs.text(name).startswith(AGAIN) for name in names):
        outputs = comfyui.run(graph)
    assert all(outputs.text(name).startswith((TUNED, "Sampling ")) for name in names)
    return [first.text(name).startswith(ON_THIS) for name in names], first


@pytest.fixture(scope="module")
def samplings(comfyui):
    """The first and the second sampling."""
    graph = tuned(**LARGE).sampled().reported()
    _, first = settled(comfyui, graph)
    return first, comfyui.run(graph)


class TestPlan:
    def test_the_first_sampling_is_made_without_us_and_the_second_uses_the_plan(self, plain, samplings):
        (first, second), full = samplings, plain(**LARGE)
        assert np.array_equal(first.latent(), full)
        assert "tuned to 30% at a latent of 48×48: " in first.text()
        assert "Sampling 384×384: made without Agent Attention." in first.text()
        assert CHANGED < difference(second.latent(), full) < 1
        assert second.text().startswith("Sampling 384×384: tuned, U-Net output within 30% (deviation ")
        assert "measured), in all 2 U-Net calls" in second.text()
        assert "left to the host" not in second.text()

    @pytest.mark.parametrize("prefix", ["", "plan: "])
    def test_the_plan_is_in_the_report_and_needs_no_tuning(self, comfyui, plain, samplings, prefix):
        _, second = samplings
        plan = prefix + second.text().rsplit("plan: ", 1)[1]
        given = comfyui.run(tuned(0.01, plan, **LARGE).sampled().reported())
        assert np.array_equal(given.latent(), second.latent())
        assert given.text().endswith(plan)
        assert np.array_equal(comfyui.ran(**LARGE)[0], plain(**LARGE)), "off afterwards"

    def test_a_damaged_plan_or_one_for_another_model_is_named(self, comfyui, samplings):
        with pytest.raises(HostError, match="tuning"):
            comfyui.queue(tuned(plan="nonsense", **SMALL).sampled().nodes)
        plan = samplings[1].text().rsplit("plan: ", 1)[1]
        with pytest.raises(HostError, match="for another model"):
            comfyui.run(tuned(plan=plan, layout="SDXL", **SMALL).sampled())


class TestWhenItTunes:
    def tunes(self, comfyui, plain, tolerance=0.31, **other) -> bool:
        given = {**SMALL, **other}
        (tells,), first = settled(comfyui, tuned(tolerance, **given).sampled().reported())
        assert not tells or np.array_equal(first.latent(), plain(**given))
        return tells

    def test_once_for_a_model_a_size_and_a_tolerance(self, comfyui, plain):
        others = [{}, {"tolerance": 0.1}, {"size": (192, 128)}, {"weights": 2}, {"layout": "SDXL"}]
        for expected in (True, False):
            assert [self.tunes(comfyui, plain, **other) for other in others] == [expected] * len(others)

    def test_anew_for_an_earlier_part_of_the_diffusion(self, comfyui, plain):
        made = [self.tunes(comfyui, plain, 0.22, steps=2, denoise=denoise) for denoise in (0.2, 0.2, 1.0, 1.0, 0.2)]
        assert made == [True, False, True, False, False]

    def test_anew_for_a_changed_lora(self, comfyui, lora):
        def tunes(strength: float) -> bool:
            kind, inputs = lora
            graph = Graph(**SMALL).on_model(kind, **{**inputs, "strength_model": strength})
            graph.on_model("AgentAttentionTuned", tolerance=0.21).sampled().reported()
            return settled(comfyui, graph)[0][0]

        assert list(map(tunes, (0.0, 1.0, 1.0, 0.5, 0.0, 0.5))) == [True, True, False, True, False, False]

    def test_for_each_size_of_a_hires_pass(self, comfyui):
        graph = tuned(0.23, **SMALL).sampled("first").reported("first text", "first")
        graph.size = (192, 192)
        graph.sampled("second", after="first", steps=2).reported("second text", "second")
        for expected in (True, False):
            tells, outputs = settled(comfyui, graph, "first text", "second text")
            assert tells == [expected] * 2
        assert "Sampling 192×192" in outputs.text("second text")

    @pytest.mark.parametrize(
        ("graph", "size", "parts"),
        [
            (tuned(0.24, **SMALL).on_model("Tiles"), "8×8", "128×128, in parts of 64×64"),
            (tuned(0.24, positive="ConditioningSetArea"), "32×32", "256×256, in parts of 128×192"),
        ],
        ids=["tiles", "an area"],
    )
    def test_for_the_size_of_most_calls(self, comfyui, graph, size, parts):
        (tells,), first = settled(comfyui, graph.sampled().reported())
        assert tells
        assert f"tuned to 24% at a latent of {size}: " in first.text()
        assert comfyui.run(graph).text().startswith(f"Sampling {parts}")

    def test_a_node_that_calls_the_blocks_itself_is_told(self, comfyui):
        graph = tuned(**SMALL).on_model("Blocks").sampled().reported()
        assert comfyui.run(graph).text().startswith("not tuned: another node calls the U-Net's blocks itself")

    def test_a_merged_model_is_another_one(self, comfyui):
        """The host merges when it loads: before, the weights are those of whatever was sampled last."""
        graph = Graph(**SMALL)
        graph.add("other", "TinyModel", layout="SD 1", weights=3)
        merged = graph.add("merge", "ModelMergeSimple", model1=["tiny", 0], model2=["other", 0], ratio=0.5)
        for name, model in (("alone", ["tiny", 0]), ("merged", merged)):
            graph.model = model
            graph.on_model("AgentAttentionTuned", f"{name} tuned", tolerance=0.25).sampled(name)
            graph.reported(f"{name} text", name)
        for expected in (True, False):
            assert settled(comfyui, graph, "alone text", "merged text")[0] == [expected] * 2

    def test_interrupting_the_tuning_keeps_the_image_and_no_plan(self, comfyui, plain):
        given = {"size": (256, 256), "steps": 4}
        graph, before = tuned(0.01, **given).sampled().reported(), comfyui.console().count(SAMPLED)
        prompt = comfyui.queue(graph.nodes)
        # what the sampling says when it has ended, and the tuning begins
        comfyui.until(lambda: comfyui.console().count(SAMPLED) > before)
        comfyui.call("/interrupt", {})
        made = Outputs(comfyui.wait(prompt)["outputs"])
        assert made.text().startswith("not tuned: interrupted")
        assert np.array_equal(made.latent(), plain(**given))
        # it begins anew, and not with what was found by then
        tells, again = settled(comfyui, graph)
        assert tells == [True]
        assert np.array_equal(again.latent(), plain(**given))
