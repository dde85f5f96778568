"""Forge's forks without running them: stand-ins made to the signatures read in Forge Neo's and reForge's code."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from blocks import golden_unet, inputs, run
from fake_webui import ON, Processing, Sampler, stand_in, stand_ins, state
from fake_webui import _forget_ours as forget_ours

from agentsd.app.decision import SamplingPass
from agentsd.settings import infotext
from agentsd.settings.schema import SETTINGS


class FakeInitialModel:
    """What Forge Neo holds until a model is loaded: never None, and without forge_objects."""


class AxisOption:
    """Forge Neo's, of `lib_xyz.classes`: its third name is `format_value`, and `prepare` comes last."""

    def __init__(self, label, type, apply, format_value=str, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


def with_unet(unet):
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
    return SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher), is_sd2=False)


@pytest.fixture
def host(monkeypatch):
    """Forge Neo and reForge, as far as we import them."""
    stand_ins(monkeypatch, "progress script_callbacks scripts shared sd_models sd_unet ui_components")
    comfy = stand_in(monkeypatch, "comfy")  # Forge Neo has part of such a package: whoever imports it is misled
    monkeypatch.setattr(comfy, "__path__", [], raising=False)
    modules = sys.modules
    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])
    script_class = type("XYZ", (), {"__module__": "xyz_grid.py"})
    modules["modules.scripts"].scripts_data = [SimpleNamespace(script_class=script_class, module=plot)]
    modules["modules.ui_components"].InputAccordion = object
    modules["modules.sd_unet"].current_unet = None
    modules["modules.shared"].opts = SimpleNamespace()  # no HyperTile, no upcast
    modules["modules.shared"].OptionHTML = str
    forget_ours()
    session = importlib.import_module("agentsd.webui.session")
    ours = SimpleNamespace(session=session, host=session.compat.HOST, plot=plot)

    def load(model):
        modules["modules.shared"].sd_model = model
        modules["modules.sd_models"].model_data = SimpleNamespace(sd_model=model)

    ours.load = load
    load(with_unet(golden_unet()))
    yield ours
    forget_ours()


def generate(host, p, unet, passes=(False, True)):
    """A generation with hires fix as these hosts make it."""
    made = []
    host.session.before_process(p)
    host.session.process(p, [ON])
    for p.is_hr_pass in passes:
        p.sampler = Sampler()
        for _ in range(2 if p.is_hr_pass else 1):
            host.session.before_sampling(p, torch.empty(2, 4, 16, 16))
        p.sampler.launch_sampling(1, lambda: made.append(run(unet, inputs())))
    host.session.postprocess(p, SimpleNamespace(images=[], index_of_first_image=0))
    return made


def test_each_is_recognised_and_nothing_misleading_is_imported(host):
    assert type(host.host).__name__ == "WebUI"
    assert not [name for name in sys.modules if name.startswith("comfy.")]


def test_both_passes_are_patched_once(host):
    unet = host.host.unet()
    before, plain, p = state(unet), run(unet, inputs()), Processing()
    first, second = generate(host, p, unet)
    assert not torch.equal(first, plain)
    assert torch.equal(first, second)
    assert [one["hires"] for one in host.session.STATUS.as_dict()["passes"]] == [False, True]
    assert infotext.KEY in p.extra_generation_params
    assert state(unet) == before


def test_stands_down_beside_its_token_merging(host):
    unet, p = host.host.unet(), Processing(get_token_merging_ratio=lambda for_hr=False: 0.5)
    assert torch.equal(generate(host, p, unet)[0], run(unet, inputs()))
    assert "token merging" in host.session.STATUS.text()
    assert p.extra_generation_params == {"Other extension": "here"}


def test_an_axis_for_every_setting_once(host):
    from agentsd.webui import xyz

    for _ in range(2):
        xyz.register(host.host.xyz_grids())
    ours = [option for option in host.plot.axis_options if option.label.startswith(xyz.PREFIX)]
    assert len(ours) == sum(row.axis for row in SETTINGS)
    assert all(callable(option.apply) and callable(option.confirm) for option in ours)
    assert all(option.prepare is None for option in ours)


@pytest.mark.parametrize("model", [FakeInitialModel(), with_unet(torch.nn.Linear(1, 1))], ids=["none yet", "a DiT"])
def test_models_without_a_u_net(host, model):
    host.load(model)
    assert host.host.unet() is None
    assert host.host.obstacle(SamplingPass((16, 16))) is None
    p = Processing()
    generate(host, p, golden_unet())
    assert host.session.NO_UNET in host.session.STATUS.text()
    assert p.extra_generation_params == {"Other extension": "here"}
