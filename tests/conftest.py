"""Fixtures of all tests of the core."""

from __future__ import annotations

import copy
import os
import random
import socket

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


@pytest.fixture(autouse=True, scope="session")
def _on_device():
    """On the device that AGENTSD_DEVICE names, if it does."""
    name = os.environ.get("AGENTSD_DEVICE")
    if not name:
        yield
        return
    from device import OnDevice

    with OnDevice(torch.device(name)):
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def unet():
    """A U-Net of its own for each test, with attention at two levels."""
    from patching import GOLDEN

    return copy.deepcopy(GOLDEN)


@pytest.fixture(params=["LDM", "diffusers"])
def any_unet(request):
    """A U-Net of either family of hosts."""
    from patching import UNETS

    return UNETS[request.param]()


@pytest.fixture
def flat():
    """One that has a single level, for latents of any size."""
    from patching import FLAT

    return copy.deepcopy(FLAT)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test runs in an empty folder, and off line as far as the hub is concerned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*given):
        raise AssertionError(f"somebody wants to go on line: {given}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of the embedded model, one of random weights that knows four prompts."""
    from drawing import stand_in

    from agentsd import embedded

    pipe = stand_in()
    monkeypatch.setattr(embedded, "load", lambda *given: pipe)
    return pipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A diffusers folder of a tiny Stable Diffusion."""
    from tiny_pipelines import tiny_sd

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(path)
    return path


@pytest.fixture
def every_gain_counts(monkeypatch):
    """As on a machine on which every method is faster than full attention: the layers of the tests are too small."""
    from tuned_models import make_every_gain_count

    make_every_gain_count(monkeypatch)
