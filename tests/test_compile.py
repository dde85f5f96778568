"""A patched U-Net under torch.compile gives what it gives without."""

from __future__ import annotations

import pytest
import torch
from blocks import flat_unet, inputs

import agentsd

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
