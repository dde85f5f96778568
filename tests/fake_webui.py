"""A WebUI made of nothing but the calls that it makes, and the modules of it that we import."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from blocks import as_model, golden_unet, inputs, run
from PIL import Image

import agentsd.webui
from agentsd import get_patch
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
        self.width = self.height = self.hr_upscale_to_x = self.hr_upscale_to_y = 128
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


def stand_in(monkeypatch, name):
    """Make a module of the host, which `find_spec` finds too, and the attribute of its package."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    if "." in name:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)
    return module


def stand_ins(monkeypatch, parts):
    """Make the host's package `modules` with these parts: modules by name."""
    return {name: stand_in(monkeypatch, name) for name in ("modules", *(f"modules.{part}" for part in parts.split()))}


@pytest.fixture(name="host")
def fake_host(monkeypatch):
    """The WebUI's modules, as far as we import them, around a small U-Net."""
    parts = "cache extensions infotext_utils progress script_callbacks scripts shared sd_models sd_unet ui_components"
    fake = stand_ins(monkeypatch, parts)
    fake["modules.scripts"].scripts_data = []
    fake["modules.ui_components"].InputAccordion = object
    fake["modules.sd_unet"].current_unet = None
    shared = fake["modules.shared"]
    # what a test expects must not hang on the clock of a busy machine; tests of what was measured set it back
    shared.opts, shared.loaded_hypernetworks = SimpleNamespace(agent_attention_even_if_slower=True), []
    shared.state = State()
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
    fake["modules.infotext_utils"].create_override_settings_dict = override_settings
    more = {"sd_unet": fake["modules.sd_unet"], "progress": progress, "extensions": extensions, "cache": cache}
    more["override_names"] = []
    yield SimpleNamespace(session=session, shared=shared, **more)
    _forget_ours()


def override_settings(texts):
    """As the WebUI's `create_override_settings_dict`; names beyond its own are those of the options."""
    names = {"Token merging ratio": "token_merging_ratio", "Upcast cross attention": "upcast_attn"}
    pairs = (text.split(": ") for text in texts)
    return {names.get(name, name): value == "True" if value.isalpha() else float(value) for name, value in pairs}


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
    host.session.before_batch(p)
    p.params_txt = dict(p.extra_generation_params)  # what the host keeps of its last generation
    for hires in passes:
        p.is_hr_pass, p.sampler = hires, Sampler()
        host.session.before_sampling(p, torch.empty(2, 4, 16, 16))
        p.sampler.launch_sampling(1, steps or step)
    host.session.after_batch(p)
    picture = Image.new("RGB", (128, 128), (100, 100, 100))
    p.processed = SimpleNamespace(
        images=["a grid", picture], index_of_first_image=1, extra_generation_params=p.extra_generation_params
    )
    host.session.postprocess(p, p.processed)
    return made


def left_to_others(host):
    """A step whose self-attention another extension answers."""
    unet = host.shared.sd_model.model.diffusion_model
    host.session.before_model_call()
    for layer in get_patch(unet)._layers:
        layer.seam.remove()
        layer.seam.obstacle = "another extension answers"
    run(unet, inputs())


def state(unet):
    """What a patch could leave behind."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in unet.named_modules()
    ]


# Images as the WebUI's page would have them made


@contextmanager
def overridden(opts, settings):
    """Options that override settings hold for one request."""
    before = dict(vars(opts))
    vars(opts).update(settings)
    try:
        yield
    finally:
        vars(opts).clear()
        vars(opts).update(before)


def timesteps(steps):
    """What its samplers are given by default: as many timesteps from 999 to 0."""
    return torch.linspace(999, 0, steps).tolist()


def passes_of(state, opts):
    """Each pass of a page's state as the WebUI makes it: (hires, height, width, timesteps)."""
    steps, strength = state["steps"], min(state["denoising"], 0.999)
    if state["tab"] == "img2img":
        if getattr(opts, "img2img_fix_steps", False):  # modules/sd_samplers_common.py: setup_img2img_steps
            total, t_enc = int(steps / strength) if strength > 0 else 0, steps - 1
        else:
            total, t_enc = steps, int(strength * steps)
        return [(False, state["height"], state["width"], timesteps(total)[total - t_enc - 1 :])]
    made = [(False, state["height"], state["width"], timesteps(steps))]
    if state["hires"]:
        wanted, scale = state["hires"]["steps"] or steps, state["hires"]["scale"]
        total = int(wanted / strength) if strength > 0 else 0
        sides = int(state["height"] * scale), int(state["width"] * scale)
        made.append((True, *sides, timesteps(total)[total - wanted :] if total else []))
    return made


def generate_like(host, state, settings, *, refiner=None, hires_checkpoint=None, around=lambda: nullcontext()):
    """Make the image of a page's state, as the WebUI does it, and return its processing object."""
    img2img, opts = state["tab"] == "img2img", host.shared.opts
    hires = state["hires"] or {}
    scale = hires.get("scale", 1)
    p = Processing(
        width=state["width"],
        height=state["height"],
        steps=state["steps"],
        batch_size=state["batch_size"],
        denoising_strength=state["denoising"],
        init_images=["an image"] if img2img else [],
        enable_hr=bool(hires),
        hr_upscale_to_x=int(state["width"] * scale),
        hr_upscale_to_y=int(state["height"] * scale),
        hr_second_pass_steps=hires.get("steps", 0),
    )

    def own_merging(for_hr=False):
        general, of_hr = (getattr(opts, f"token_merging_ratio{name}", 0) for name in ("", "_hr"))
        if img2img:
            asked = "token_merging_ratio" in host.override_names and general
            return asked or getattr(opts, "token_merging_ratio_img2img", 0) or general
        return (for_hr and of_hr) or general

    p.get_token_merging_ratio = own_merging
    with overridden(opts, override_settings(state["overrides"])):
        host.session.before_process(p)
        host.session.process(p, [settings])
        host.session.before_batch(p)
        p.params_txt = dict(p.extra_generation_params)
        for is_hires, height, width, ts in passes_of(state, opts):
            if is_hires and hires_checkpoint is not None:
                host.shared.sd_model = hires_checkpoint
            p.is_hr_pass, p.sampler = is_hires, Sampler()
            host.session.before_sampling(p, torch.empty(1, 4, height // 8, width // 8))

            def steps(height=height, width=width, ts=ts):
                for i, t in enumerate(ts):
                    if refiner is not None and i == len(ts) // 2:
                        host.shared.sd_model = refiner
                    host.session.before_model_call()
                    rows = 2 * state["batch_size"]
                    given = inputs(rows, height // 8, width // 8, t=[t] * rows)
                    with around():
                        run(host.shared.sd_model.model.diffusion_model, given)

            p.sampler.launch_sampling(len(ts), steps)
        host.session.after_batch(p)
        images, written = [Image.new("RGB", (64, 64))], p.extra_generation_params
        p.processed = SimpleNamespace(images=images, index_of_first_image=0, extra_generation_params=written)
        host.session.postprocess(p, p.processed)
    return p
