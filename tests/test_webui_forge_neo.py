"""Forge's forks without running them: stand-ins made to the signatures read in Forge Neo's and reForge's code."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from blocks import golden_unet
from fake_webui import OTHERS, Processing, generate, imported, stand_in, stand_ins, state, step

from agentsd.app.decision import SamplingPass
from agentsd.settings import infotext
from agentsd.settings.schema import SETTINGS
from agentsd.webui import xyz


class FakeInitialModel:
    """What Forge Neo holds until a model is loaded: never None, and without forge_objects."""


class AxisOption:
    """Forge Neo's, of `lib_xyz.classes`: its third name is `format_value`, and `prepare` comes last."""

    def __init__(self, label, type, apply, format_value=str, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


def with_unet(unet):
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
    return SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher), model=patcher.model, is_sd2=False)


@pytest.fixture
def host(monkeypatch):
    """Forge Neo and reForge, as far as we import them: no cache, no HyperTile, no upcast."""
    fake = stand_ins(monkeypatch, "sd_unet")
    fake.twice = True
    comfy = stand_in(monkeypatch, "comfy")  # Forge Neo has part of such a package: whoever imports it is misled
    monkeypatch.setattr(comfy, "__path__", [], raising=False)
    fake.plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])
    script_class = type("XYZ", (), {"__module__": "xyz_grid.py"})
    fake.scripts.scripts_data = [SimpleNamespace(script_class=script_class, module=fake.plot)]
    fake.sd_unet.current_unet = None
    with imported("session") as fake.session:
        fake.ours = fake.session.compat.HOST
        load(fake, with_unet(golden_unet()))
        yield fake


def load(host, model):
    host.shared.sd_model = host.sd_models.model_data.sd_model = model


def test_each_is_recognised_and_both_passes_are_patched_once(host):
    assert type(host.ours).__name__ == "WebUI"
    assert not [name for name in sys.modules if name.startswith("comfy.")], "nothing misleading is imported"
    unet = host.ours.unet()
    before, plain = state(unet), step(host)
    first, second = generate(host, p=(p := Processing()), passes=(False, True))
    assert not torch.equal(first, plain)
    assert torch.equal(first, second)
    assert [one["hires"] for one in host.session.STATUS.as_dict()["passes"]] == [False, True]
    assert infotext.KEY in p.extra_generation_params
    assert state(unet) == before
    p = Processing(get_token_merging_ratio=lambda for_hr=False: 0.5)
    assert torch.equal(generate(host, p=p)[0], plain)
    assert "token merging" in host.session.STATUS.text()
    assert p.extra_generation_params == OTHERS


def test_an_axis_for_every_setting_once(host):
    for _ in range(2):
        xyz.register(host.ours.xyz_grids())
    ours = [option for option in host.plot.axis_options if option.label.startswith(xyz.PREFIX)]
    assert len(ours) == sum(row.axis for row in SETTINGS)
    assert all(callable(option.apply) and callable(option.confirm) for option in ours)
    assert all(option.prepare is None for option in ours)


@pytest.mark.parametrize("model", [FakeInitialModel(), with_unet(torch.nn.Linear(1, 1))], ids=["none yet", "a DiT"])
def test_models_without_a_u_net(host, model):
    load(host, model)
    assert host.ours.unet() is None
    assert host.ours.obstacle(SamplingPass((16, 16))) is None
    generate(host, p=(p := Processing()), steps=lambda: None)
    assert host.session.NO_UNET in host.session.STATUS.text()
    assert p.extra_generation_params == OTHERS
