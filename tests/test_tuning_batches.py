"""An image in any batch: what is done to it depends on block and timestep alone, and its attention not on the others.

PyTorch's own kernels may round differently in another batch, so full attention is the measure.
"""

from __future__ import annotations

import pytest
import torch
from blocks import golden_unet, inputs
from single import SingleAttention
from torch import Tensor, nn
from tuned_models import TRY

import agentsd
from agentsd import AgentConfig
from agentsd.hosts import find_sites
from agentsd.methods import selectable
from agentsd.tuning.result import BASE

STEPS = (900, 500, 100)
CANDIDATES = [{"method": method.name, **settings} for method in selectable() for settings in method.candidates]


@pytest.fixture(scope="module")
def unet():
    return golden_unet()


def call(unet, rows: slice, t: int) -> Tensor:
    x, _, context = inputs(4)
    x, context = x[rows], context[rows]
    with torch.no_grad():
        return unet(x, torch.full((len(x),), t), context=context)


@pytest.fixture
def tuning(unet, every_gain_counts):
    calls = []
    for t in STEPS:
        x, at, context = inputs(2, t=[t, t])
        calls.append(((x, at), {"context": context}))
    return agentsd.tune(unet, calls, 0.3, methods=TRY)


def test_the_plan_never_depends_on_the_batch(unet, tuning):
    def answers(rows: slice) -> list:
        seen = []
        with agentsd.patched(unet, tuning=tuning):
            patch = agentsd.get_patch(unet)
            patch.observer = lambda answer: seen.append((answer.name, answer.size, answer.plan, answer.timestep))
            for t in STEPS:
                call(unet, rows, t)
        assert not patch.notes
        return seen

    alone = answers(slice(0, 1))
    assert {plan.action for _, _, plan, _ in alone} == {"corrected", "pool"}
    assert answers(slice(1, 2)) == answers(slice(0, 2)) == answers(slice(0, 4)) == alone


def rounding(layer: nn.Module, image: Tensor) -> float:
    """Relative difference of the layer's answers to a batch, and to its images one by one."""
    with torch.no_grad():
        batch = layer(image, 500.0)
        alone = torch.cat([layer(image[i : i + 1], 500.0) for i in range(len(image))])
    return ((batch - alone).norm() / batch.norm()).item()


@pytest.mark.parametrize("settings", CANDIDATES, ids=lambda settings: " ".join(map(str, settings.values())))
def test_attention_is_the_same_in_any_batch(unet, settings):
    site = find_sites(unet)[0]
    layer, image = SingleAttention(site), torch.randn(2, site.channels, 64, 48)
    full = rounding(layer, image)
    patch = agentsd.patch_unet(layer, AgentConfig(**{**BASE, **settings}))
    try:
        assert rounding(layer, image) <= 4 * full
        (report,) = patch.report()
        assert set(report.calls) == {report.plan.action} != {"untouched"}
        assert not patch.notes
    finally:
        patch.remove()
