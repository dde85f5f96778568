"""A patched U-Net under torch.compile gives what it gives without."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from blocks import CONTEXT, actions, blocks_of, inputs, one_block_unet, run
from kinds import GRID
from patching import diffusers_unet, with_self_attention

import agentsd
from agentsd.eager import FOLLOWS, not_compiled
from agentsd.hosts import output_tensor

# What the compiler makes part of the host's graph
FOLLOWED = {
    "grid agents": GRID,
    "corrected agents": {**GRID, "method": "corrected", "agent_ratio": 0.75},
    "pooled keys and values": {**GRID, "method": "pool", "sx": 2, "sy": 2},
    "open cells": {**GRID, "method": "corrected", "agent_ratio": 0.9, "exact_ratio": 0.1},
}
# What it is kept out of: random partitions need the timestep, and clusters are sorted.
KEPT_OUT = {"AgentSD's settings": {}, "the first token of each cell": {"use_rand": False}}
SETTINGS = {**FOLLOWED, **KEPT_OUT}
# Operators that read a value on the host, which waits for the device and which no CUDA graph can record.
READS = ("item", "_local_scalar_dense", "tolist", "nonzero", "cpu", "numpy", "bincount")

pytestmark = pytest.mark.skipif(not FOLLOWS, reason="this PyTorch's compiler is kept out of all hooks")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backend_of(graphs):
    """A backend that keeps the graphs that it is given."""
    return lambda graph, example_inputs: graphs.append(graph) or graph.forward


class Compiled:
    """A compiled U-Net that keeps the graphs made so far."""

    def __init__(self, unet, **options):
        self.graphs = []
        self.unet = torch.compile(unet, backend=backend_of(self.graphs), **options)

    @property
    def made(self):
        """How many times the U-Net was compiled; a graph without attention only reads a size."""
        return sum("scaled_dot_product_attention" in graph.code for graph in self.graphs)

    def __call__(self, *example):
        return run_positional(self.unet, example)


@torch.no_grad()
def run_positional(unet, example):
    return output_tensor(unet(*example))


def given():
    return inputs(1, 16, 16)


def assert_close(output, expected, tolerance=1e-4):
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


STAGES = {"stages": agentsd.early(0.3, after={"agent_ratio": 0.99})}


class TestGraphs:
    @pytest.mark.parametrize("name", FOLLOWED)
    def test_one_graph_without_a_break_for_all_steps(self, name):
        unet, (x, t, context) = one_block_unet(), given()
        compiled = Compiled(unet, fullgraph=True)  # which makes every break an error
        plain = run(unet, (x, t, context))
        with agentsd.patched(unet, **FOLLOWED[name]):
            expected = run(unet, (x, t, context))
            assert_close(compiled(x, t, context), expected)
            for step in (100, 200):
                compiled(x, t - step, context)
            assert not agentsd.get_patch(unet).notes
        assert compiled.made == len(compiled.graphs) == 1
        assert (expected - plain).abs().max() > 1e-3
        targets = [str(node.target).split(".") for graph in compiled.graphs for node in graph.graph.nodes]
        assert not [target for target in targets if {*READS} & {*target}]

    def test_on_diffusers(self):
        unet = diffusers_unet("tiny_unet")
        example = (*inputs(2, 16, 16)[:2], torch.randn(2, 77, 32))
        with agentsd.patched(unet, **GRID):
            expected = run_positional(unet, example)
            assert set(actions(agentsd.get_patch(unet))) > {"untouched"}
            compiled = Compiled(unet, fullgraph=True)
            assert_close(compiled(*example), expected)
            assert not agentsd.get_patch(unet).notes
        assert len(compiled.graphs) == 1

    @pytest.mark.parametrize(
        ("more", "at", "sides", "graphs"),
        [
            (STAGES, (900, 800, 300, 200, 850), [16] * 5, [1, 1, 2, 2, 2]),
            ({}, [500] * 4, (16, 20, 16, 20), [1, 2, 2, 2]),
        ],
        ids=["stage", "size"],
    )
    def test_one_for_each(self, more, at, sides, graphs):
        unet, made = one_block_unet(), []
        with agentsd.patched(unet, **GRID, **more):
            compiled = Compiled(unet, fullgraph=True)
            for t, side in zip(at, sides, strict=True):
                moment = inputs(1, side, side, t=[t])
                assert_close(compiled(*moment), run(unet, moment))
                made.append(compiled.made)
        assert made == graphs

    def test_what_is_left_to_the_host_costs_the_speed_and_not_the_image(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ValueError("no such kernel")

        unet, example = one_block_unet(), given()
        with_self_attention(unet, lambda attn, x: attn(x, context=x.flip(1)))
        monkeypatch.setattr("agentsd.attention.agent.agent_attention", fail)
        for model, note in (
            (unet, "self-attention was given a context of its own"),
            (one_block_unet(), "an error of ours: ValueError: no such kernel"),
        ):
            plain = run(model, example)
            with agentsd.patched(model, **GRID):
                assert_close(Compiled(model)(*example), plain)
                assert list(agentsd.get_patch(model).notes) == [note]


def sixteen_blocks():
    """A U-Net of diffusers with the blocks of SD 1.5, more than the compiler would make graphs for."""
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    layout = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "cross_attention_dim": CONTEXT}
    layout |= {"down_block_types": (down, down, down, "DownBlock2D"), "up_block_types": ("UpBlock2D", up, up, up)}
    return diffusers_unet("tiny_unet", **layout)


class TestRegional:
    """diffusers' recommended form: each block is compiled by itself, and equal blocks share a graph."""

    EVERYWHERE: ClassVar = {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0, "max_downsample": 4}

    def compiled(self, unet):
        graphs = []
        unet.compile_repeated_blocks(backend=backend_of(graphs), fullgraph=True)
        return graphs

    @pytest.mark.parametrize("kw", [GRID, EVERYWHERE], ids=["largest layers", "three levels"])
    def test_graphs_are_shared(self, kw):
        unet, example = sixteen_blocks(), inputs()
        plain = run_positional(unet, example)
        with agentsd.patched(unet, **kw):
            expected = run_positional(unet, example)
            plans = {plan for _, plan in agentsd.get_patch(unet).explain(16, 16) if plan.acts}
        graphs = self.compiled(unet)
        assert_close(run_positional(unet, example), plain)
        unpatched = len(graphs)
        with agentsd.patched(unet, **kw):  # after compiling
            for _ in range(2):
                assert_close(run_positional(unet, example), expected)
            assert not agentsd.get_patch(unet).notes
        assert (expected - plain).abs().max() > 1e-3
        assert len(graphs) <= unpatched + len(plans) + 1
        made = len(graphs)
        assert_close(run_positional(unet, example), plain)
        assert len(graphs) == made

        torch._dynamo.reset()
        unet = sixteen_blocks()
        with agentsd.patched(unet, **kw):  # before compiling
            graphs = self.compiled(unet)
            assert_close(run_positional(unet, example), expected)
        assert len(graphs) <= unpatched + 2

    @pytest.mark.parametrize("kw", [{}, dict(agentsd.TOKEN_MERGING, merge_mlp=True)], ids=["agents", "merging"])
    def test_what_no_graph_contains_runs_outside(self, kw, caplog):
        unet, example = sixteen_blocks(), inputs()
        with agentsd.patched(unet, **kw):
            expected = run_positional(unet, example)
        self.compiled(unet)
        compiled = [block._compiled_call_impl for block in blocks_of(unet)]
        with agentsd.patched(unet, **kw):
            assert_close(run_positional(unet, example), expected)
            assert not agentsd.get_patch(unet).notes
        assert caplog.text.count("run uncompiled") == 1
        assert [block._compiled_call_impl for block in blocks_of(unet)] == compiled

    @pytest.mark.parametrize("regional", [True, False])
    def test_an_observer_is_told(self, regional):
        unet, example, seen = sixteen_blocks() if regional else one_block_unet(), inputs(), []
        compiled = unet if regional else torch.compile(unet, backend="eager")
        if regional:
            self.compiled(unet)
        with agentsd.patched(unet, **GRID):
            run_positional(compiled, example)
            agentsd.get_patch(unet).observer = seen.append
            run_positional(compiled, example)
        assert [answer.call.timestep for answer in seen] == [500] * (5 if regional else 1)  # the largest layers


def test_merging_alone_acts_on_a_u_net_that_was_compiled_before():
    """The compiler does not look for new hooks: the seam, which it sees, makes it compile anew."""
    unet, example = one_block_unet(), given()
    settings = dict(agentsd.TOKEN_MERGING, merge_attn=False, merge_mlp=True, sx=2, sy=2)
    plain = run_positional(unet, example)
    with agentsd.patched(unet, **settings):
        expected = run_positional(unet, example)
    compiled = torch.compile(unet, backend="eager")
    run_positional(compiled, example)
    with agentsd.patched(compiled, **settings):
        assert_close(run_positional(compiled, example), expected)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_same():
    unet, example = one_block_unet(), given()
    with agentsd.patched(unet, **GRID):
        assert_close(run_positional(torch.compile(unet), example), run(unet, example), 1e-3)


@pytest.mark.parametrize("through", ["the U-Net", "what torch.compile returned", "Module.compile"])
def test_a_patch_may_come_and_go_on_a_compiled_u_net(through):
    unet, example, compiled = one_block_unet(), given(), None
    both = FOLLOWED["grid agents"], FOLLOWED["open cells"]
    with torch.inference_mode():
        expected = [unet(*example)]
        for settings in both:
            with agentsd.patched(unet, **settings):
                expected.append(unet(*example))
        if through == "Module.compile":
            unet.compile(backend="aot_eager")
        compiled = unet if through == "Module.compile" else torch.compile(unet, backend="aot_eager")
        found = [compiled(*example)]
        for settings in both:
            agentsd.apply_patch(unet if through == "the U-Net" else compiled, **settings)
            found.append(compiled(*example))
        agentsd.remove_patch(compiled)
        assert torch.equal(compiled(*example), found[0])
    assert_close(found, expected)
    assert min((found[i] - found[i - 1]).abs().max() for i in range(3)) > 1e-3


@pytest.mark.parametrize("name", KEPT_OUT)
def test_outside_of_graphs_it_gives_the_same_and_later_calls_compile_nothing(name):
    unet, (x, t, context), made = one_block_unet(), given(), []
    with agentsd.patched(unet, **KEPT_OUT[name]):
        compiled = Compiled(unet)
        for step in (0, 50, 100, 150, 200):
            moment = x, t - step, context
            assert_close(compiled(*moment), run(unet, moment))
            made.append(len(compiled.graphs))
        assert not agentsd.get_patch(unet).notes
    assert 0 < made[1] == made[-1]


PATCHED_FIRST = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from blocks import one_block_unet, inputs
import agentsd

unet, (x, t, context), graphs = one_block_unet(), inputs(), []

def backend(graph, example_inputs):
    graphs.append(graph)
    return graph.forward

with torch.inference_mode():
    agentsd.apply_patch(unet, **{settings!r})
    patched = unet(x, t, context)
    assert "torch._dynamo" not in sys.modules, "nothing has needed the compiler yet"
    compiled = torch.compile(unet, backend=backend)
    torch.testing.assert_close(compiled(x, t, context), patched, rtol=1e-4, atol=1e-4)
    assert "torch._dynamo" in sys.modules
    compiled(x, t - 50, context)  # the host's own embedding of the timestep is compiled twice
    first = len(graphs)
    for step in range(2, 7):
        compiled(x, t - 50 * step, context)
    assert len(graphs) == first > 0, (first, len(graphs))
    ours = ("avg_pool2d", "argsort", "embedding_bag", "one_hot", "bincount")
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any(name in target for name in ours for target in targets) == {followed}
    assert not agentsd.get_patch(unet).notes
"""


@pytest.mark.parametrize("name", ["grid agents", "AgentSD's settings"])
def test_hooks_are_in_or_out_of_graphs_whatever_was_imported_first(name):
    """In a process of its own, where the patch is there before anything has imported the compiler."""
    tests = Path(__file__).parent
    code = PATCHED_FIRST.format(
        paths=[str(tests.parent), str(tests)], settings=SETTINGS[name], followed=name in FOLLOWED
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # which PyTorch warns of where it compiles one of our frames for every hook anew
    assert "recompile_limit" not in done.stderr
    assert "cache_size_limit" not in done.stderr


def test_what_is_not_compiled_changes_neither_name_nor_result_nor_error_and_belongs_to_each_copy():
    class Hook:
        calls = 0

        @not_compiled
        def double(self, x, *, times=1):
            """Twice as much."""
            self.calls += 1
            return 2 * x * times

    first = Hook()
    second = copy.deepcopy(first)
    assert (first.double.__name__, first.double.__doc__) == ("double", "Twice as much.")
    assert first.double(3, times=2) == 12
    assert (first.calls, second.calls) == (1, 0)
    with pytest.raises(TypeError, match="NoneType"):
        first.double(None)

    @torch.compile(backend="eager", fullgraph=True)
    def theirs(x):
        return first.double(x.sin())

    with pytest.raises(torch._dynamo.exc.Unsupported):
        theirs(torch.randn(3))
