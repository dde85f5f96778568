"""The nodes in a real ComfyUI, through its HTTP API: exact latents of a small U-Net in the layouts of SD 1 and SDXL."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfyui_host import Graph, GraphError

from agentsd.methods import METHODS

CHANGED = 1e-3
# SDXL's largest layers have a quarter of the tokens
SIZES = {"SD 1": (256, 256), "SDXL": (512, 512)}


def difference(a, b) -> float:
    """The largest difference of two latents, relative to the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


class TestOnAndOff:
    @pytest.mark.parametrize("layout", SIZES)
    def test_off_is_as_if_never_installed(self, comfyui, plain, never_installed, layout):
        size = SIZES[layout]
        assert np.array_equal(plain(layout=layout, size=size), never_installed[layout])
        on = comfyui.run(Graph(layout, size).agents().sampled().nodes).latent()
        assert difference(on, never_installed[layout]) > CHANGED
        again = comfyui.run(Graph(layout, size).sampled().nodes).latent()
        assert np.array_equal(again, never_installed[layout])

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, comfyui, plain, method):
        given = {"size": (512, 512), "steps": 1}
        inputs = {"method": method, "ratio": 0.4 if method == "merge" else 0.0}
        outputs = comfyui.run(Graph(**given).agents(**inputs).sampled().reported().nodes)
        assert "in 5 layers, in 1 of 1 U-Net calls" in outputs.text()
        assert "left to the host" not in outputs.text()
        assert difference(outputs.latent(), plain(**given)) > CHANGED

    def test_the_same_seed_gives_the_same_latent(self, comfyui):
        nodes = Graph().agents(ratio=0.4, agent_source="similarity").sampled().nodes
        assert np.array_equal(comfyui.run(nodes).latent(), comfyui.run(nodes).latent())

    def test_what_the_report_says(self, comfyui):
        sd1 = comfyui.run(Graph().agents().sampled().reported().nodes).text()
        assert sd1 == "Sampling 256×256: 1024 tokens → 64 agents in 5 layers, in all 2 U-Net calls."
        sdxl = comfyui.run(Graph("SDXL", SIZES["SDXL"]).agents().sampled().reported().nodes).text()
        assert sdxl.startswith("Sampling 512×512: 1024 tokens → 64 agents in 10 layers, in all 2 U-Net calls")

    def test_from_and_until_follow_the_diffusion(self, comfyui, plain):
        graph = Graph(steps=4).agents(until=0.3).sampled().reported()
        outputs = comfyui.run(graph.nodes)
        assert "in 1 of 4 U-Net calls" in outputs.text()
        assert difference(outputs.latent(), plain(steps=4)) > CHANGED

    def test_rules_name_blocks_as_in_the_webui(self, comfyui):
        rules = "blocks=input_blocks.* full | downsample=2 max_downsample=2 min_tokens=0 method=pool"
        text = comfyui.run(Graph().agents(rules=rules).sampled().reported().nodes).text()
        assert "256 tokens → 16 pooled keys in 5 layers, 1024 tokens → 64 agents in 3 layers, in all 2" in text

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ({"from": 0.6, "until": 0.5}, "until must be above from"),
            ({"agent_ratio": 1.5}, "agent_ratio must be a number"),
            ({"rules": "nonsense"}, "nonsense"),
        ],
    )
    def test_a_bad_value_is_named_before_the_graph_runs(self, comfyui, inputs, said):
        with pytest.raises(GraphError, match=said):
            comfyui.queue(Graph().agents(**inputs).sampled().nodes)


class TestBranches:
    def test_two_branches_of_one_graph_are_independent(self, comfyui, plain):
        agents = comfyui.run(Graph().agents().sampled().nodes).latent()
        pool = comfyui.run(Graph().agents(method="pool").sampled().nodes).latent()
        graph = Graph()
        for name, on in (("one", {}), ("none", None), ("other", {"method": "pool"})):
            graph.model = ["tiny", 0]
            if on is not None:
                graph.agents(name + " agents", **on)
            graph.sampled(name)
        outputs = comfyui.run(graph.nodes)
        assert np.array_equal(outputs.latent("one"), agents)
        assert np.array_equal(outputs.latent("other"), pool)
        assert np.array_equal(outputs.latent("none"), plain())

    def test_two_samplers_of_one_model_report_one_after_the_other(self, comfyui):
        """As a second pass at a larger size: the report is of the sampler that it is connected to."""
        graph = Graph().agents().sampled("first").reported("first text", "first")
        graph.size = (384, 256)
        graph.sampled("second", after="first").reported("second text", "second")
        outputs = comfyui.run(graph.nodes)
        assert "384×256" in outputs.text("second text")


class TestSizesAndBatches:
    @pytest.mark.parametrize(
        ("layout", "size"), [("SD 1", (264, 200)), ("SD 1", (200, 264)), ("SD 1", (72, 768)), ("SDXL", (520, 456))]
    )
    def test_odd_sizes(self, comfyui, plain, layout, size):
        outputs = comfyui.run(Graph(layout, size).agents().sampled().reported().nodes)
        assert f"{size[0]}×{size[1]}" in outputs.text()
        assert "left to the host" not in outputs.text()
        assert difference(outputs.latent(), plain(layout=layout, size=size)) > CHANGED

    @pytest.mark.parametrize("source", ["grid", "similarity"])
    def test_an_image_of_a_batch_is_the_image_alone(self, comfyui, source):
        inputs = {"agent_source": source, "ratio": 0.0 if source == "grid" else 0.3}
        alone = comfyui.run(Graph().agents(**inputs).sampled().nodes).latent()
        batch = comfyui.run(Graph(batch=3).agents(**inputs).sampled().nodes).latent()
        assert batch.shape[0] == 3
        assert difference(batch[:1], alone) < 1e-4

    @pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "ddim", "uni_pc"])
    def test_samplers(self, comfyui, plain, sampler):
        on = comfyui.run(Graph(steps=3, sampler=sampler).agents().sampled().nodes).latent()
        assert np.isfinite(on).all()
        assert difference(on, plain(steps=3, sampler=sampler)) > CHANGED

    def test_conditioning_of_an_area(self, comfyui):
        graph = Graph()
        area = graph.add("area", "ConditioningSetArea", conditioning=["tiny", 1], width=128, height=192, x=64, y=0,
                         strength=1.0)  # fmt: skip
        off = comfyui.run(graph.sampled(positive=area).nodes).latent()
        outputs = comfyui.run(graph.agents(rules="min_tokens=0").sampled(positive=area).reported().nodes)
        assert difference(outputs.latent(), off) > CHANGED
        assert outputs.text().startswith("Sampling 256×256, in parts of 128×192: ")
        assert all(f"{n} tokens → {n // 16} agents in 5 layers, " in outputs.text() for n in (1024, 384))
        assert "left to the host" not in outputs.text()


class TestEnds:
    def test_interrupt(self, comfyui, plain):
        expected = comfyui.run(Graph().agents().sampled().nodes).latent()
        prompt = comfyui.queue(Graph(steps=200).agents().sampled().nodes)
        time.sleep(2)
        comfyui.post("/interrupt", {})
        entry = comfyui.wait(prompt)
        assert any("interrupted" in message[0] for message in entry["status"]["messages"])
        assert np.array_equal(comfyui.run(Graph().sampled().nodes).latent(), plain())
        assert np.array_equal(comfyui.run(Graph().agents().sampled().nodes).latent(), expected)

    def test_nothing_of_ours_is_printed_as_an_error(self, comfyui):
        comfyui.run(Graph().agents().sampled().nodes)
        assert "an error of ours" not in comfyui.output()
