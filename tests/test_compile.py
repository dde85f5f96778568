"""A patched U-Net under torch.compile gives what it gives without."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import flat_unet, inputs

import agentsd
from agentsd.eager import not_compiled

SETTINGS = {
    "grid agents": {"ratio": 0.0, "agent_source": "grid"},
    "AgentSD's settings": {},
    "corrected agents": {"ratio": 0.0, "method": "corrected", "agent_ratio": 0.75},
    "pooled keys and values": {"ratio": 0.0, "method": "pool", "sx": 2, "sy": 2},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(backend: str, **settings: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """(unpatched, patched, patched and compiled) for the same input, and why the patch stood down."""
    unet, given = flat_unet(), inputs()
    with torch.inference_mode():
        plain = unet(given[0], given[1], given[2])
        with agentsd.patched(unet, **settings):
            patched = unet(given[0], given[1], given[2])
            compiled = torch.compile(unet, backend=backend)
            first = compiled(given[0], given[1], given[2])
            notes = dict(agentsd.get_patch(unet).notes)
    return plain, patched, first, notes


@pytest.mark.parametrize("name", SETTINGS)
def test_the_compiled_u_net_gives_the_same(name):
    plain, patched, compiled, notes = outputs("aot_eager", **SETTINGS[name])
    torch.testing.assert_close(compiled, patched, rtol=1e-4, atol=1e-4)
    assert (compiled - plain).abs().max() > 1e-3  # it is the patched one that was compiled
    assert notes == {}


@pytest.mark.parametrize("through", ["the U-Net", "what torch.compile returned", "Module.compile"])
def test_a_patch_may_come_and_go_on_a_compiled_u_net(through):
    unet, (x, t, context) = flat_unet(), inputs()
    settings = SETTINGS["grid agents"]
    with torch.inference_mode(), agentsd.patched(unet, **settings):
        patched = unet(x, t, context)
    if through == "Module.compile":
        unet.compile(backend="aot_eager")
        compiled = unet
    else:
        compiled = torch.compile(unet, backend="aot_eager")
    with torch.inference_mode():
        before = compiled(x, t, context)
        agentsd.apply_patch(unet if through == "the U-Net" else compiled, **settings)
        during = compiled(x, t, context)
        agentsd.remove_patch(compiled)
        after = compiled(x, t, context)
    torch.testing.assert_close(during, patched, rtol=1e-4, atol=1e-4)
    assert (during - before).abs().max() > 1e-3
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_later_calls_compile_nothing(name):
    compiled_graphs = []

    def backend(graph, example_inputs):
        compiled_graphs.append(graph)
        return graph.forward

    unet, (x, t, context) = flat_unet(), inputs()
    with torch.inference_mode(), agentsd.patched(unet, **SETTINGS[name]):
        compiled = torch.compile(unet, backend=backend)
        compiled(x, t, context)
        compiled(x, t - 50, context)
        before = len(compiled_graphs)
        for step in (100, 150, 200):
            compiled(x, t - step, context)
    assert 0 < before == len(compiled_graphs)


PATCHED_FIRST = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from blocks import flat_unet, inputs
import agentsd

unet, (x, t, context), graphs = flat_unet(), inputs(), []

def backend(graph, example_inputs):
    graphs.append(graph)
    return graph.forward

with torch.inference_mode():
    plain = unet(x, t, context)
    agentsd.apply_patch(unet, **{settings!r})
    patched = unet(x, t, context)
    assert "torch._dynamo" not in sys.modules, "nothing has needed the compiler yet"
    compiled = torch.compile(unet, backend=backend)
    torch.testing.assert_close(compiled(x, t, context), patched, rtol=1e-4, atol=1e-4)
    assert (patched - plain).abs().max() > 1e-2
    assert "torch._dynamo" in sys.modules
    compiled(x, t - 50, context)  # the host's own embedding of the timestep is compiled twice
    first = len(graphs)
    for step in range(2, 7):
        compiled(x, t - 50 * step, context)
    assert len(graphs) == first > 0, (first, len(graphs))
    ours = ("scaled_dot_product_attention", "avg_pool2d", "argsort", "embedding_bag", "one_hot", "bincount")
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets and not [target for target in targets if any(name in target for name in ours)]
    assert not agentsd.get_patch(unet).notes
    agentsd.remove_patch(unet)
    torch.testing.assert_close(compiled(x, t, context), plain, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("name", ["grid agents", "AgentSD's settings"])
def test_hooks_stay_out_of_graphs_whatever_was_imported_first(name):
    """In a process of its own, where the patch is there before anything has imported the compiler."""
    tests = Path(__file__).parent
    code = PATCHED_FIRST.format(paths=[str(tests.parent), str(tests)], settings=SETTINGS[name])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # which PyTorch warns of where it compiles one of our frames for every hook anew
    assert "recompile_limit" not in done.stderr
    assert "cache_size_limit" not in done.stderr


class TestNotCompiled:
    def test_it_changes_neither_name_nor_result(self):
        @not_compiled
        def double(x, *, times=1):
            """Twice as much."""
            return 2 * x * times

        assert (double.__name__, double.__doc__) == ("double", "Twice as much.")
        assert double(3, times=2) == 12

    def test_it_breaks_the_graph_around_a_call(self):
        graphs = []

        def backend(graph, example_inputs):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return graph.forward

        @not_compiled
        def ours(x):
            return x.cos()

        @torch.compile(backend=backend)
        def theirs(x):
            return ours(x.sin()).tan()

        x = torch.randn(3)
        torch.testing.assert_close(theirs(x), x.sin().cos().tan())
        assert [sum(name in targets for targets in graphs) for name in ("sin", "cos", "tan")] == [1, 0, 1]

    def test_exceptions_pass_through(self):
        @not_compiled
        def fail():
            raise KeyError("theirs")

        with pytest.raises(KeyError, match="theirs"):
            fail()

    def test_methods_of_deep_copies_are_their_own(self):
        class Hook:
            def __init__(self):
                self.calls = 0

            @not_compiled
            def __call__(self, *args):
                self.calls += 1

        first = Hook()
        second = copy.deepcopy(first)
        first()
        assert (first.calls, second.calls) == (1, 0)
