"""One decision: what the preview says of a pass is what the run does, to the number of patched calls."""

from __future__ import annotations

import random
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from blocks import as_model, golden_unet, sdxl_like_unet
from fake_webui import fake_host, fake_unet, generate_like  # noqa: F401 - fixtures

from agentsd import config as core
from agentsd.app import decision
from agentsd.panel.routes import Routes
from agentsd.settings import schema
from agentsd.settings.presets import PRESETS
from agentsd.tuning.fingerprint import ordered_sites, structure_of

STATE = {"tab": "txt2img", "width": 128, "height": 128, "steps": 3, "batch_size": 1, "denoising": 0.5}
STATE |= {"hires": None, "overrides": []}
ANY = {"min_tokens": 0}
HIRES = {"scale": 1.5, "steps": 0}
# Settings of the panel: presets where any layer is large enough, dials, passes, parts of the diffusion, rules
SETTINGS = [
    *({**values, **ANY} for values in PRESETS.values()),
    {},
    {**ANY, "until": 0.5},
    {**ANY, "since": 0.3, "until": 0.8},
    {**ANY, "until": 0.4, "hires_until": 0.9, "after": "token merging"},
    {**ANY, "since": 0.7, "until": 0.6},
    {**ANY, "passes": "first"},
    {**ANY, "passes": "hires"},
    {**ANY, "method": "agent", "ratio": 0.4, "merge_mlp": True},
    {**ANY, "method": "pool", "max_downsample": "2"},
    {**ANY, "merge_attn": False},
    {**ANY, "rules": "downsample=2 max_downsample=2 method=pool | since=0.5 full"},
    {**ANY, "rules": "blocks=nothing.* full"},
    {**ANY, "tuning": "auto"},
    {**ANY, "tuning": "first tuning 1 16x16 0.02 12345678 | method=pool sx=2 | 0.0 aa"},
    {**ANY, "tuning": "OURS"},
    {**ANY, "fp32": True, "agent_ratio": 0.75},
]
SIZES = [(128, 128), (64, 128), (128, 64), (64, 64)]
IMG2IMG = [(steps, strength) for steps in (1, 2, 4, 7) for strength in (0.0, 0.1, 0.3, 0.5, 0.75, 1.0)]
HOST = [
    {},
    {"overrides": ["Token merging ratio: 0.5"]},
    {"overrides": ["hypertile_enable_unet: True"]},
    {"overrides": ["Upcast cross attention: True"]},
    {"opts": {"token_merging_ratio": 0.3}},
    {"opts": {"token_merging_ratio_hr": 0.3}},
    {"opts": {"token_merging_ratio_img2img": 0.3}},
    {"opts": {"hypertile_enable_unet_secondpass": True}},
    {"opts": {"img2img_fix_steps": True}},
]


def cases():
    """Some hundred of them: each value of each list several times, beside drawn values of the others."""
    draw = random.Random(0)
    for settings, tab in product(SETTINGS, ("txt2img", "hires", "img2img")):
        yield settings, tab, draw.choice(SIZES), draw.choice((1, 1, 2)), draw.choice(IMG2IMG), draw.choice(HOST), ""
    for steps_and_strength in IMG2IMG:
        settings = draw.choice([{**ANY, "until": 0.6}, {**ANY, "since": 0.75}, ANY])
        yield settings, "img2img", (128, 128), 1, steps_and_strength, draw.choice((HOST[0], HOST[-1])), ""
    for host, tab in product(HOST, ("hires", "img2img")):
        yield draw.choice(SETTINGS[:8]), tab, (128, 128), 1, (3, 0.6), host, ""
    for special, settings in product(("SDXL", "refiner", "hires checkpoint"), (ANY, {**ANY, "max_downsample": "auto"})):
        yield settings, "hires", (128, 128), 2, (4, 0.5), {}, special


def case_name(case):
    settings, tab, size, batch, img2img, host, special = case
    told = {name: value for name, value in settings.items() if name not in ANY and schema.DEFAULTS[name] != value}
    return f"{special or told} {tab} {size[0]}x{size[1]} {batch} {img2img} {host}"


CASES = list(cases())
OUTCOMES = []  # of each case: whether anything was changed


@pytest.mark.parametrize("case", CASES, ids=[case_name(case) for case in CASES])
def test_the_run_does_what_the_preview_says(host, unet, case):
    settings, tab, (height, width), batch, (steps, strength), around, special = case
    vars(host.shared.opts).update(around.get("opts", {}))
    host.override_names[:] = ["token_merging_ratio"] if "Token" in str(around.get("overrides")) else []
    if special == "SDXL":
        host.shared.sd_model = as_model(sdxl_like_unet())
    if settings.get("tuning") == "OURS":
        sites = ordered_sites(unet)
        letters, plan = "a" + "." * (len(sites) - 2) + "a", f"first tuning 1 {width // 8}x{height // 8} 0.02"
        settings = {**settings, "tuning": f"{plan} {structure_of(sites)} | method=pool sx=2 | 0.0 {letters}"}
    state = {**STATE, "height": height, "width": width, "batch_size": batch, "steps": steps, "denoising": strength}
    state |= {"tab": "img2img" if tab == "img2img" else "txt2img", "hires": HIRES if tab == "hires" else None}
    state["overrides"] = around.get("overrides", [])
    said = Routes(host.session.compat.HOST).preview({**state, "values": settings})
    more = {"refiner": as_model(golden_unet())} if special == "refiner" else {}
    if special == "hires checkpoint":
        more = {"hires_checkpoint": as_model(golden_unet())}
    generate_like(host, state, settings, **more)
    assert "error of ours" not in host.session.STATUS.text()
    other = {"hires": "first"}
    foretold = [one for one in said["passes"] if settings.get("passes") != other.get(one["of"], "hires")]
    done = host.session.STATUS.passes
    assert [one.made.patches for one in done] == [one["patched"] for one in foretold]
    assert [ours(one.calls) for one in done] == [ours(one["calls"]) for one in foretold]
    OUTCOMES.append(any(ours(one.calls) for one in done))


def ours(calls):
    return {action: n for action, n in calls.items() if action != "untouched" and n}


def test_there_are_some_hundred_cases_and_not_all_alike():
    assert len(CASES) > 100
    if len(OUTCOMES) == len(CASES):  # all were run before this one
        assert min(OUTCOMES.count(True), OUTCOMES.count(False)) > 20


def test_an_image_of_one_pass_makes_its_config_once(host, monkeypatch):
    made, configs = [], []
    to_config, check = schema.to_config, core.AgentConfig.__post_init__
    monkeypatch.setattr(schema, "to_config", lambda *a, **k: made.append(a) or to_config(*a, **k))
    monkeypatch.setattr(core.AgentConfig, "__post_init__", lambda self: configs.append(self) or check(self))
    decision._config.cache_clear()
    generate_like(host, STATE, ANY)
    assert (len(made), len(configs)) == (1, 1)


def test_the_preview_visits_few_files(host, monkeypatch):
    """A page's question after its first: what is read or worked out once for a model and settings, is."""
    program, visited = Routes(host.session.compat.HOST), set()
    program.preview({**STATE, "values": ANY})

    def trace(frame, event, arg):
        file = frame.f_code.co_filename
        name = file.rpartition("/agentsd/")[2]
        if event == "call" and name != file:
            visited.add(name)

    sys.setprofile(trace)
    try:
        program.preview({**STATE, "values": ANY})
    finally:
        sys.setprofile(None)
    deciding = {name for name in visited if name.startswith(("app/", "panel/", "webui/"))}
    assert 0 < len(deciding) <= 5, sorted(deciding)
    assert len(visited) <= 18, sorted(visited)


class TestTheHostsOwnSchedule:
    """Steps are where the host's sampler has them, as read in AUTOMATIC1111 1.10.1."""

    @pytest.fixture
    def samplers(self, host, monkeypatch):
        class KDiffusion:
            model_wrap = SimpleNamespace(log_sigmas=torch.zeros(1), sigma_to_t=lambda sigmas: 100 * sigmas)

            def get_sigmas(self, p, steps):
                assert p.scheduler == "Karras"
                return torch.tensor([10.0 / 2**i for i in range(steps)] + [0.0])

        class Timesteps:
            def get_timesteps(self, p, steps):
                return torch.clip(torch.tensor(list(range(0, 1000, 1000 // steps))) + 1, 0, 999)

        class Model:
            __slots__ = ()  # a sampler that writes into the loaded model would change the next image

        def create_sampler(name, model):
            assert isinstance(model, Model)
            return {"DPM++ 2M": KDiffusion, "DDIM": Timesteps}[name]()

        modules = {"sd_samplers": SimpleNamespace(create_sampler=create_sampler)}
        monkeypatch.setattr("agentsd.webui.compat.a1111._module", modules.get)
        monkeypatch.setattr(host.session.compat.HOST, "model", Model)
        return host.session.compat.HOST

    @pytest.mark.parametrize(
        ("sampler", "of", "steps", "strength", "moments"),
        [
            ("DPM++ 2M", "first", 4, 1.0, (0.0, 0.5, 0.75, 0.875)),
            ("DPM++ 2M", "img2img", 4, 0.5, (0.5, 0.75, 0.875)),
            ("DDIM", "first", 4, 1.0, (0.249, 0.499, 0.749)),
            ("DDIM", "img2img", 4, 0.75, (0.499, 0.749)),
            ("DDIM", "img2img", 4, 0.25, ()),
            ("not known", "first", 3, 1.0, decision.evenly(3)),
        ],
    )
    def test_where_the_steps_of_a_pass_are(self, samplers, sampler, of, steps, strength, moments):
        schedule = samplers.schedule(sampler, "Karras")
        assert samplers.moments(of, steps, 0, strength, schedule) == pytest.approx(moments)
