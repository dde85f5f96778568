"""The nodes in a real ComfyUI, through its HTTP API: exact latents of a small U-Net in the layouts of SD 1 and SDXL."""

from __future__ import annotations

import time

import numpy as np
import pytest
from comfyui_host import Graph
from servers import HostError

from agentsd.methods import METHODS

CHANGED = 1e-3
OURS = ("AgentAttention", {})


def ours(**inputs):
    return "AgentAttention", inputs


def difference(a, b) -> float:
    """The largest difference of two latents, relative to the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


# SDXL's largest layers have a quarter of the tokens
@pytest.mark.parametrize(("layout", "size", "layers"), [("SD 1", (256, 256), 5), ("SDXL", (512, 512), 10)])
def test_on_it_says_what_it_did_and_off_is_as_if_never_installed(comfyui, plain, never_installed, layout, size, layers):
    graph = {"layout": layout, "size": size}
    assert np.array_equal(plain(**graph), never_installed[layout])
    on, said = comfyui.ran(OURS, **graph)
    assert difference(on, never_installed[layout]) > CHANGED
    told = f"1024 tokens → 64 agents in {layers} layers, in all 2 U-Net calls."
    assert said == f"Sampling {size[0]}×{size[1]}: {told}"
    assert np.array_equal(comfyui.ran(**graph)[0], never_installed[layout])


RULES = "blocks=input_blocks.* full | downsample=2 max_downsample=2 min_tokens=0 method=pool"
SIZES = [{"size": (200, 264)}, {"size": (72, 768)}, {"layout": "SDXL", "size": (520, 456)}]
AREA = [f"{n} tokens → {n // 16} agents in 5 layers, " for n in (1024, 384)]
# inputs of the node, what is sampled, and words of the report
ACTS = [
    *(({"method": method, "ratio": 0.4 if method == "merge" else 0.0}, {"size": (512, 512), "steps": 1},
       ["in 5 layers, in 1 of 1 U-Net calls"]) for method in METHODS),
    ({"rules": RULES, "until": 0.3}, {"steps": 4},
     ["256 tokens → 16 pooled keys in 5 layers, 1024 tokens → 64 agents in 3 layers, in 1 of 4"]),
    *(({}, graph, ["{}×{}".format(*graph["size"])]) for graph in SIZES),
    *(({}, {"steps": 3, "sampler_name": sampler}, []) for sampler in ("heun", "dpmpp_2m_sde", "uni_pc")),
    ({"rules": "min_tokens=0"}, {"positive": "ConditioningSetArea"},
     ["Sampling 256×256, in parts of 128×192: ", *AREA]),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "given", "told"), ACTS, ids=str)
def test_it_acts_and_says_what_it_did(comfyui, plain, inputs, given, told):
    on, said = comfyui.ran(ours(**inputs), **given)
    assert np.isfinite(on).all()
    assert difference(on, plain(**given)) > CHANGED
    assert all(words in said for words in told), said
    assert "left to the host" not in said


def test_a_bad_value_is_named_before_the_graph_runs(comfyui):
    for inputs, said in (
        ({"from": 0.6, "until": 0.5}, "until must be above from"),
        ({"rules": "nonsense"}, "nonsense"),
    ):
        with pytest.raises(HostError, match=said):
            comfyui.queue(Graph().on_model("AgentAttention", **inputs).sampled().nodes)


def test_branches_of_one_graph_are_independent(comfyui, plain):
    graph, methods = Graph(), {"one": "agent", "none": "", "other": "pool"}
    for name, method in methods.items():
        graph.model = ["tiny", 0]
        if method:
            graph.on_model("AgentAttention", f"{name} agents", method=method)
        graph.sampled(name)
    outputs = comfyui.run(graph)
    for name, method in methods.items():
        alone = comfyui.ran(ours(method=method))[0] if method else plain()
        assert np.array_equal(outputs.latent(name), alone)


@pytest.mark.parametrize("inputs", [{}, {"agent_source": "similarity", "ratio": 0.3}], ids=["grid", "similarity"])
def test_an_image_of_a_batch_is_the_image_alone(comfyui, inputs):
    (alone, _), (batch, _) = comfyui.ran(ours(**inputs)), comfyui.ran(ours(**inputs), batch=3)
    assert batch.shape[0] == 3
    assert difference(batch[:1], alone) < 1e-4


def test_interrupt(comfyui, plain):
    expected, _ = comfyui.ran(OURS)
    prompt = comfyui.queue(Graph(steps=200).on_model("AgentAttention").sampled().nodes)
    time.sleep(2)
    comfyui.call("/interrupt", {})
    assert any("interrupted" in message[0] for message in comfyui.wait(prompt)["status"]["messages"])
    assert np.array_equal(comfyui.ran()[0], plain())
    assert np.array_equal(comfyui.ran(OURS)[0], expected)
    assert "an error of ours" not in comfyui.console()
