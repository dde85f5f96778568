"""A patched U-Net under torch.compile gives what it gives without."""

from __future__ import annotations

import pytest
import torch
from blocks import flat_unet, inputs

import agentsd

SETTINGS = {
    "grid agents": {"ratio": 0.0, "agent_source": "grid"},
    "AgentSD's settings": {},
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
