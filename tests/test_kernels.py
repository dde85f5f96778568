"""How many kernels a method dispatches: on a fast card, small layers take as long as their launches do."""

from __future__ import annotations

import pytest
import torch
from blocks import HALVES, Recorder
from kinds import GRID
from patching import diffusers_unet

from agentsd import get_patch, patched

SIZE = (48, 40)
CORRECTED = {"method": "corrected", "agent_ratio": 0.9375, "ratio": 0.0}
# settings, and the most kernels a layer beyond full attention's
MOST = {
    "grid agents": (GRID, 4),
    "pooled keys and values": ({"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0}, 6),
    "pooled over cells that the edge cuts short": ({"method": "pool", "sx": 3, "sy": 3, "ratio": 0.0}, 6),
    "corrected agents": (CORRECTED, 30),
    "corrected agents, open cells": ({**CORRECTED, "exact_ratio": 0.14}, 46),
    "AgentSD's settings": ({}, 40),
    "token merging": ({"method": "merge", "sx": 2, "sy": 2}, 40),
}


@pytest.fixture(scope="module")
def unets():
    """Diffusers' U-Net, which calls the fused kernel, in each precision."""
    return {dtype: diffusers_unet("tiny_unet").to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def kernels(unet, dtype) -> list[str]:
    import tiny_pipelines

    given = tiny_pipelines.unet_inputs(unet, *SIZE)
    given = {name: t.to(dtype) if name != "timestep" else t for name, t in given.items()}
    with torch.no_grad():
        unet(**given)  # tables are made once
        with Recorder() as seen:
            unet(**given)
    return seen.kernels


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("settings", "most"), MOST.values(), ids=MOST)
def test_few_beyond_full_attention(unets, dtype, settings, most):
    unet = unets[dtype]
    plain = kernels(unet, dtype)
    with patched(unet, **settings):
        ours, patch = kernels(unet, dtype), get_patch(unet)
        acting = sum(layer.plan is not None and layer.plan.acts for layer in patch.report())
        assert acting == 3
        assert not patch.notes
    # one more, since diffusers' processor divides its result by 1 and ours doesn't
    assert len(ours) - len(plain) + acting <= most * acting


@pytest.mark.parametrize("settings", [GRID, {}, {"merge_attn": False}], ids=["agents", "AgentSD's settings", "none"])
def test_none_where_layers_are_untouched(unets, settings):
    unet = unets[torch.float32]
    plain = kernels(unet, torch.float32)
    with patched(unet, **{**settings, "min_tokens": 10**6}):
        assert kernels(unet, torch.float32) == plain
