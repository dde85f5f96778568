"""Fixtures of all tests of the core."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run: a failure seen once is seen again.
settings.register_profile("agentsd", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("agentsd")


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    """The models are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)
