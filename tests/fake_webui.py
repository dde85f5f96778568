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
OTHERS = {"Other extension": "here"}  # in every infotext


class Sampler:
    """What the WebUI's sampler is to us: `launch_sampling` runs the steps."""

    def launch_sampling(self, steps, func):
        return func()


class Processing:
    """What the WebUI's processing object is to us."""

    def __init__(self, **more):
        self.extra_generation_params = {**OTHERS}
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


def stand_in(monkeypatch, name):
    """Make a module of the host, which `find_spec` finds too, and the attribute of its package."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    if "." in name:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)
    return module


def stand_ins(monkeypatch, more=""):
    """Make the host's package `modules`, with these parts beside those that every WebUI has."""
    stand_in(monkeypatch, "modules")
    parts = f"progress script_callbacks scripts shared sd_models ui_components {more}".split()
    fake = SimpleNamespace(**{part: stand_in(monkeypatch, f"modules.{part}") for part in parts})
    fake.scripts.scripts_data, fake.ui_components.InputAccordion = [], object
    fake.shared.opts, fake.sd_models.model_data = SimpleNamespace(), SimpleNamespace()
    fake.twice = False  # whether a hires pass is announced twice, as in Forge
    return fake


@contextmanager
def imported(name):
    """A module of ours that imports the host's."""
    _forget_ours()
    try:
        yield importlib.import_module(f"agentsd.webui.{name}")
    finally:
        _forget_ours()


def _forget_ours():
    """They keep the host's modules that they were imported with."""
    for name in [name for name in sys.modules if name.startswith("agentsd.webui.")]:
        if name.split(".")[2] in ("batch", "compat", "session", "tuning"):
            del sys.modules[name]
            vars(agentsd.webui).pop(name.split(".")[2], None)


@pytest.fixture(name="host")
def fake_host(monkeypatch):
    """The WebUI's modules, as far as we import them, around a small U-Net."""
    fake = stand_ins(monkeypatch, "cache extensions infotext_utils sd_unet")
    fake.sd_unet.current_unet, fake.extensions.active = None, list
    shared = fake.shared
    # what a test expects must not hang on the clock of a busy machine; tests of what was measured set it back
    shared.opts.agent_attention_even_if_slower, shared.loaded_hypernetworks = True, []
    shared.state, shared.sd_model = State(), as_model(golden_unet())
    shared.sd_model.sd_checkpoint_info = SimpleNamespace(name="small.safetensors")
    fake.sd_models.model_data = type("Loaded", (), {"sd_model": property(lambda self: shared.sd_model)})()
    fake.infotext_utils.create_override_settings_dict = override_settings
    cache = {}
    fake.cache.cache = lambda section: cache.setdefault(section, {})
    with imported("session") as session:
        yield SimpleNamespace(**{**vars(fake), "session": session, "cache": cache, "override_names": []})


def override_settings(texts):
    """As the WebUI's `create_override_settings_dict`; names beyond its own are those of the options."""
    names = {"Token merging ratio": "token_merging_ratio", "Upcast cross attention": "upcast_attn"}
    pairs = (text.split(": ") for text in texts)
    return {names.get(name, name): value == "True" if value.isalpha() else float(value) for name, value in pairs}


@pytest.fixture(name="unet")
def fake_unet(host):
    return host.shared.sd_model.model.diffusion_model


def step(host, given=None):
    """A model call as the host makes it."""
    host.session.before_model_call()
    return run(host.shared.sd_model.model.diffusion_model, given or inputs())


def process(host, p, args, passes):
    """Make images as the host does; each of `passes` is (whether it is the hires pass, size of the latent, steps)."""
    host.session.before_process(p)
    host.session.process(p, args)
    host.session.before_batch(p)
    p.params_txt = dict(p.extra_generation_params)  # what the host keeps of its last generation
    for p.is_hr_pass, size, steps in passes:
        p.sampler = Sampler()
        for _ in range(1 + (host.twice and p.is_hr_pass)):
            host.session.before_sampling(p, torch.empty(2, 4, *size))
        p.sampler.launch_sampling(1, steps)
    host.session.after_batch(p)
    images, written = ["a grid", Image.new("RGB", (128, 128), (100, 100, 100))], p.extra_generation_params
    p.processed = SimpleNamespace(images=images, index_of_first_image=1, extra_generation_params=written)
    host.session.postprocess(p, p.processed)
    return p


def generate(host, settings=ON, p=None, steps=None, passes=(False,), record=False):
    """A generation of one step a pass, or these; the outputs of its model calls."""
    made = []
    args = [settings if settings is not None else False] + [None] * (ARGUMENTS.index(RECORD) - 1) + [True]
    steps = steps or (lambda: made.append(step(host)))
    process(host, p or Processing(), args if record else args[:1], [(hires, (16, 16), steps) for hires in passes])
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
    hires, rows = state["hires"] or {}, 2 * state["batch_size"]
    scale = hires.get("scale", 1)
    p = Processing(**{name: state[name] for name in ("width", "height", "steps", "batch_size")})
    p.denoising_strength, p.init_images, p.enable_hr = state["denoising"], ["an image"] * img2img, bool(hires)
    p.hr_upscale_to_x, p.hr_upscale_to_y = int(state["width"] * scale), int(state["height"] * scale)
    p.hr_second_pass_steps = hires.get("steps", 0)

    def own_merging(for_hr=False):
        general, of_hr = (getattr(opts, f"token_merging_ratio{name}", 0) for name in ("", "_hr"))
        if img2img:
            asked = "token_merging_ratio" in host.override_names and general
            return asked or getattr(opts, "token_merging_ratio_img2img", 0) or general
        return (for_hr and of_hr) or general

    def passes():
        for is_hires, height, width, ts in passes_of(state, opts):
            if is_hires and hires_checkpoint is not None:
                host.shared.sd_model = hires_checkpoint
            size = height // 8, width // 8

            def steps(size=size, ts=ts):
                for i, t in enumerate(ts):
                    if refiner is not None and i == len(ts) // 2:
                        host.shared.sd_model = refiner
                    with around():
                        step(host, inputs(rows, *size, t=[t] * rows))

            yield is_hires, size, steps

    p.get_token_merging_ratio = own_merging
    with overridden(opts, override_settings(state["overrides"])):
        return process(host, p, [settings], passes())
