"""A WebUI made of nothing but the calls that it makes, and the modules of it that we import."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from blocks import as_model, golden_unet, inputs, run
from PIL import Image

import agentsd.webui
from agentsd.settings.schema import ARGUMENTS, RECORD

ON = {"until": 1.0, "min_tokens": 0}  # the U-Net's layers are small


class Sampler:
    """What the WebUI's sampler is to us: `launch_sampling` runs the steps."""

    def launch_sampling(self, steps, func):
        return func()


class Processing:
    """What the WebUI's processing object is to us."""

    def __init__(self, **more):
        self.extra_generation_params = {"Other extension": "here"}
        self.comments, self.sampler, self.is_hr_pass = [], Sampler(), False
        vars(self).update(more)

    def comment(self, text):
        self.comments.append(text)

    def get_token_merging_ratio(self, for_hr=False):
        return 0


class State:
    """What the WebUI's `shared.state` is to us."""

    skipped = interrupted = stopping_generation = False
    job_count, job_no, sampling_step, sampling_steps, textinfo = 1, 0, 0, 1, None

    def nextjob(self):
        self.job_no += 1


class Loaded:
    """What the WebUI's `sd_models.model_data` is to us."""

    def __init__(self, shared):
        self._shared = shared

    @property
    def sd_model(self):
        return self._shared.sd_model


@pytest.fixture(name="host")
def fake_host(monkeypatch):
    """The WebUI's modules, as far as we import them, around a small U-Net."""
    parts = (
        "cache call_queue devices extensions progress script_callbacks scripts shared sd_models sd_unet ui_components"
    )
    names = ("modules", *(f"modules.{part}" for part in parts.split()))
    fake = {name: ModuleType(name) for name in names}
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(fake["modules"], name.split(".")[1], module)
    fake["modules.scripts"].scripts_data = []
    fake["modules.ui_components"].InputAccordion = object
    fake["modules.sd_unet"].current_unet = None
    fake["modules.call_queue"].queue_lock = threading.Lock()
    shared = fake["modules.shared"]
    shared.opts, shared.loaded_hypernetworks, shared.state = SimpleNamespace(), [], State()
    shared.sd_model = as_model(golden_unet())
    shared.sd_model.sd_checkpoint_info = SimpleNamespace(name="small.safetensors")
    fake["modules.sd_models"].model_data = Loaded(shared)
    cache: dict[str, dict] = {}
    fake["modules.cache"].cache = lambda section: cache.setdefault(section, {})
    _forget_ours()
    session = importlib.import_module("agentsd.webui.session")
    progress = fake["modules.progress"]
    extensions = fake["modules.extensions"]
    extensions.active = list
    more = {"sd_unet": fake["modules.sd_unet"], "progress": progress, "extensions": extensions, "cache": cache}
    yield SimpleNamespace(session=session, shared=shared, **more)
    _forget_ours()


def _forget_ours():
    """They keep the host's modules that they were imported with."""
    for name in [name for name in sys.modules if name.startswith("agentsd.webui.")]:
        if name.split(".")[2] in ("batch", "compat", "session", "tuning"):
            del sys.modules[name]
            vars(agentsd.webui).pop(name.split(".")[2], None)


@pytest.fixture(name="unet")
def fake_unet(host):
    return host.shared.sd_model.model.diffusion_model


def generate(host, settings=ON, p=None, steps=None, passes=(False,), record=False):
    """A generation as the host makes it; the outputs of its model calls."""
    p, made = p or Processing(), []

    def step():
        host.session.before_model_call()
        made.append(run(host.shared.sd_model.model.diffusion_model, inputs()))

    args = [settings if settings is not None else False] + [None] * (ARGUMENTS.index(RECORD) - 1) + [True]
    args = args if record else args[:1]
    host.session.before_process(p)
    host.session.process(p, args)
    for hires in passes:
        p.is_hr_pass, p.sampler = hires, Sampler()
        host.session.before_sampling(p, torch.empty(2, 4, 16, 16))
        p.sampler.launch_sampling(1, steps or step)
    picture = Image.new("RGB", (128, 128), (100, 100, 100))
    p.processed = SimpleNamespace(
        images=["a grid", picture], index_of_first_image=1, extra_generation_params=p.extra_generation_params
    )
    host.session.postprocess(p, p.processed)
    return made


def state(unet):
    """What a patch could leave behind."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in unet.named_modules()
    ]
