"""The life of a patch, on real LDM blocks and a host made of nothing but the calls that the WebUI makes."""

from __future__ import annotations

import runpy
import sys
import threading
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from blocks import as_model, golden_unet, inputs, run
from fake_webui import (  # noqa: F401 - fixtures
    ON,
    OTHERS,
    Processing,
    fake_host,
    fake_unet,
    generate,
    state,
    step,
)

from agentsd import get_patch
from agentsd.app import token_map as tokenmap
from agentsd.settings import NAMES, infotext

BOTH = (False, True)


@pytest.fixture
def leaves_no_trace(unet):
    before, plain = state(unet), run(unet, inputs())
    yield plain
    assert state(unet) == before
    assert torch.equal(run(unet, inputs()), plain)


def test_patched_during_the_pass_and_not_a_moment_longer(host, leaves_no_trace):
    (made,) = generate(host, p=(p := Processing()))
    assert not torch.equal(made, leaves_no_trace)
    assert vars(p.sampler) == {}
    assert p.extra_generation_params.items() >= OTHERS.items()
    assert infotext.read(p.extra_generation_params[infotext.KEY])["until"] == 1.0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whatever_ends_the_pass(host, unet, leaves_no_trace, error):
    def fail():
        host.session.before_model_call()
        assert get_patch(unet) is not None
        raise error

    generate(host, record=True)
    with pytest.raises(error):
        generate(host, p=(p := Processing()), steps=fail, record=True)
    assert vars(p.sampler) == {}
    assert "without an image" in host.session.token_map("", 1, 1).text


# What a damaged entry of an infotext puts into the controls
DAMAGED = {
    name: value
    for name in NAMES
    if (value := infotext.reader(name)({infotext.KEY: "ratio=7; agent_ratio=0.9"})) is not None
}


@pytest.mark.parametrize("settings", [{"ratio": 7}, DAMAGED], ids=["a value", "a damaged infotext"])
def test_bad_value_is_told_and_the_image_made_without_us(host, leaves_no_trace, settings):
    (made,) = generate(host, settings, p := Processing())
    assert torch.equal(made, leaves_no_trace)
    assert "ratio must be a number from 0.0 to 0.99; got 7" in p.processed.extra_generation_params[infotext.NOTE]
    assert "ratio must be" in p.comments[0]
    assert p.extra_generation_params == OTHERS


@pytest.mark.parametrize("where", ["patch_unet", "sampling"])
def test_an_error_of_ours_costs_no_image(host, leaves_no_trace, monkeypatch, where):
    monkeypatch.setattr(host.session if where == "patch_unet" else host.session.compat.HOST, where, lambda *a: 1 / 0)
    (made,) = generate(host, p=(p := Processing()))
    assert torch.equal(made, leaves_no_trace)
    assert "ZeroDivisionError" in host.session.STATUS.text()
    assert p.extra_generation_params == OTHERS


NOT_MADE = {
    "NO_UNET": {"steps": lambda: None},
    "NO_PASS": {"passes": ()},
    "NOT_CHOSEN": {"settings": {**ON, "passes": "hires"}},
}


@pytest.mark.parametrize("reason", NOT_MADE)
def test_why_no_pass_was_made_is_told(host, reason):
    if reason == "NO_UNET":
        host.shared.sd_model = as_model(torch.nn.Linear(1, 1))
    generate(host, p=(p := Processing()), **NOT_MADE[reason])
    assert getattr(host.session, reason) in host.session.STATUS.text()
    assert p.extra_generation_params == OTHERS


def test_two_passes_have_their_own_settings_and_one_left_to_the_host_is_noted(host, monkeypatch):
    generate(host, {**ON, "until": 0.4}, Processing(), passes=BOTH)
    first, hires = host.session.STATUS.as_dict()["passes"]
    assert not first["calls"].get("agents")
    assert hires["calls"]["corrected"] > 0
    monkeypatch.setattr(Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.5 if for_hr else 0)
    generate(host, p=(p := Processing()), passes=BOTH)
    assert infotext.read(p.extra_generation_params[infotext.KEY])["until"] == 1.0
    assert "token merging" in p.extra_generation_params[infotext.NOTE]


def test_announced_twice_patched_once(host):
    """Forge announces a hires pass twice, with the same sampler."""
    host.twice = True
    generate(host, p=(p := Processing()), passes=(True,))
    assert vars(p.sampler) == {}
    assert len(host.session.STATUS.passes) == 1


def test_another_wrapper_of_the_sampler_stays(host, unet):
    """Somebody wraps launch_sampling before us, somebody else after us: both are called, neither is taken out."""
    p, seen = Processing(), []

    def wrap(name, launch):
        return lambda *args: (seen.append(name), launch(*args))[1]

    p.sampler.launch_sampling = inner = wrap("inner", p.sampler.launch_sampling)
    host.session.before_process(p)
    host.session.process(p, [ON])
    host.session.before_sampling(p)
    ours = p.sampler.launch_sampling
    p.sampler.launch_sampling = outer = wrap("outer", ours)
    p.sampler.launch_sampling(1, lambda: run(unet, inputs()))
    assert seen == ["outer", "inner"]
    assert p.sampler.launch_sampling is outer
    p.sampler.launch_sampling = ours
    ours.unwrap()
    assert p.sampler.launch_sampling is inner
    assert get_patch(unet) is None


def test_a_refiner_is_followed_and_recorded_and_both_are_cleaned(host, unet, leaves_no_trace):
    other = golden_unet()
    before = state(other)

    def steps():
        for model, t in ((unet, 900), (other, 100)):
            host.shared.sd_model = as_model(model)
            step(host, inputs(t=[t, t]))
            assert [get_patch(one) is not None for one in (unet, other)] == [model is unet, model is other]

    generate(host, steps=steps, record=True)
    assert state(other) == before
    assert host.session.STATUS.as_dict()["passes"][0]["models"] == 2
    assert [call.progress for call in host.session.STATUS.recording.calls] == [0.1, 0.9]


def test_nested_generations_are_as_they_are_alone_and_leave_the_outer_one_patched(host, leaves_no_trace):
    outer, inner = [], []

    def steps():
        for settings in ({**ON, "agent_ratio": 0.9}, None):
            outer.append(step(host))
            inner.extend(generate(host, settings))
        outer.append(step(host))

    generate(host, p=(p := Processing()), steps=steps)
    assert torch.equal(outer[0], outer[1])
    assert torch.equal(outer[0], outer[2])
    assert torch.equal(inner[0], generate(host, {**ON, "agent_ratio": 0.9})[0])
    assert torch.equal(inner[1], leaves_no_trace)
    assert infotext.read(p.extra_generation_params[infotext.KEY])["agent_ratio"] == 0.95


def test_leftovers_of_another_thread_are_cleaned(host, unet, leaves_no_trace):
    """A thread that was lost in the middle of a pass."""
    held = []

    def lose():
        host.session.process(p := Processing(), [ON])
        held.append(host.session.around_pass(p, False, (16, 16)))
        held[0].__enter__()

    thread = threading.Thread(target=lose)
    thread.start()
    thread.join()
    assert get_patch(unet) is not None
    host.session.before_process(Processing())
    assert get_patch(unet) is None, "while the lost thread's frame is still held"


OBSTACLES = {
    "SD Unet": lambda host: setattr(host.sd_unet, "current_unet", object()),
    "token merging": lambda host: setattr(Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.5),
    "HyperTile": lambda host: setattr(host.shared.opts, "hypertile_enable_unet", True),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_stands_down_and_says_so_once(host, leaves_no_trace, capsys, caplog, monkeypatch, reason):
    monkeypatch.setattr(Processing, "get_token_merging_ratio", Processing.get_token_merging_ratio)
    OBSTACLES[reason](host)
    p = Processing()
    host.session.STATUS._said.clear()
    for _ in range(2):
        (made,) = generate(host, p=p, record=True)
    assert torch.equal(made, leaves_no_trace)
    seen = host.session.token_map("", 1, 1)
    assert (seen.image, reason in seen.text) == (None, True)
    assert (capsys.readouterr().out + caplog.text).count(reason) == 1
    assert reason in host.session.STATUS.text()
    assert p.extra_generation_params == OTHERS


def test_hypernetworks_reach_the_keys_and_values(host, monkeypatch):
    """With a hypernetwork that silences keys and values, agents see only zeros, as the host's attention would."""
    module = ModuleType("modules.hypernetworks.hypernetwork")
    module.apply_hypernetworks = lambda loaded, context, layer=None: (context * 0, context * 0)
    monkeypatch.setitem(sys.modules, "modules.hypernetworks", ModuleType("modules.hypernetworks"))
    monkeypatch.setitem(sys.modules, "modules.hypernetworks.hypernetwork", module)
    (without,) = generate(host)
    host.shared.loaded_hypernetworks = ["one"]
    (made,) = generate(host)
    assert not torch.allclose(made, without)


def test_upcast_of_the_host(host, unet):
    host.shared.opts.upcast_attn = True
    configs = []
    generate(host, steps=lambda: (host.session.before_model_call(), configs.append(get_patch(unet).config)))
    assert configs[0].attn_precision == "fp32"


def test_an_xyz_cell_does_not_inherit_the_infotext_of_the_one_before(host):
    """The plot's cells share one dictionary of the host's."""
    shared = {**OTHERS}
    generate(host, p=Processing(extra_generation_params=shared))
    generate(host, None, Processing(extra_generation_params=shared))
    assert shared == OTHERS


# The token map


SIMILARITY = {"min_tokens": 0, **ON, "method": "agent", "agent_source": "similarity", "ratio": 0.4}


def test_the_map_of_the_last_image(host, leaves_no_trace):
    (plain,) = generate(host, SIMILARITY)
    (made,) = generate(host, SIMILARITY, record=True)
    assert torch.equal(made, plain)
    seen = host.session.token_map("", 1, 1)
    assert seen.image.size == (768, 768)
    assert "256 tokens were merged into 154" in seen.text
    generate(host, p=Processing(paste_to=(32, 16, 64, 96)), record=True)  # only the masked part was inpainted
    assert host.session.STATUS.recording.image.size == (64, 96)


@pytest.mark.parametrize("later", [{"settings": ON}, {"settings": None, "record": True}, {"settings": {"ratio": 7}}])
def test_the_record_goes_with_the_next_image(host, later):
    generate(host, record=True)
    generate(host, **later)
    assert host.session.STATUS.recording is None
    seen = host.session.token_map("", 1, 1)
    assert (seen.image, tokenmap.RECORD in seen.text) == (None, True)


def test_both_passes_of_the_first_of_several_images(host):
    generate(host, p=(p := Processing(iteration=0)), passes=BOTH, record=True)
    recording = host.session.STATUS.recording
    assert [call.hires for call in recording.calls] == [False, True]
    p.iteration, p.is_hr_pass = 1, False
    host.session.before_sampling(p)
    p.sampler.launch_sampling(1, lambda: step(host))
    assert len(recording.calls) == 2


def test_tiles_have_no_map(host):
    generate(host, steps=lambda: step(host, inputs(height=8)), record=True)
    assert "parts of the image" in host.session.token_map("", 1, 1).text


SCRIPT = str(Path(__file__).parents[1] / "scripts" / "agent_attention.py")


def test_another_extensions_package_of_the_same_name_is_told_and_nothing_is_loaded(monkeypatch, tmp_path, host):
    theirs = ModuleType("agentsd")
    theirs.__file__ = str(tmp_path / "other" / "agentsd" / "__init__.py")
    monkeypatch.setitem(sys.modules, "agentsd", theirs)
    with pytest.raises(ImportError, match="Disable that extension") as raised:
        runpy.run_path(SCRIPT)
    assert theirs.__file__ in str(raised.value)


@pytest.mark.parametrize("announces", [True, False])
def test_the_script_listens_to_the_end_of_a_generation_where_passes_are_not_announced(monkeypatch, host, announces):
    listening = {}
    for name in ("cfg_denoiser", "before_ui", "ui_settings", "app_started", "after_process"):
        listen = partial(listening.__setitem__, name)
        monkeypatch.setattr(sys.modules["modules.script_callbacks"], f"on_{name}", listen, raising=False)
    monkeypatch.setattr(sys.modules["modules.scripts"], "Script", object, raising=False)
    monkeypatch.setattr(type(host.session.compat.HOST), "announces_passes", announces)
    runpy.run_path(SCRIPT)
    ends = listening.get("after_process")
    assert (ends is None) if announces else (ends.__name__ == "end_all")
