"""SD.Next's ways on a tiny pipeline of diffusers: batches announced, passes not, options of its own."""

from __future__ import annotations

import importlib
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from fake_webui import _forget_ours as forget_ours
from fake_webui import stand_ins, state
from tiny_pipelines import tiny_unet

from agentsd import get_patch
from agentsd.app.decision import SamplingPass
from agentsd.settings import infotext
from agentsd.tuning.fingerprint import ordered_sites, structure_of
from agentsd.words import percent

ON = {"until": 1.0, "min_tokens": 1}
WIDTH = 32  # channels of the tiny U-Net's context


class Processing:
    """What SD.Next's processing object is to us."""

    def __init__(self):
        self.extra_generation_params = {"Other extension": "here"}
        self.is_hr_pass, self.iteration = False, 0
        self.init_images = []  # of an image made from text, too

    def comment(self, text):
        raise AssertionError(text)


@pytest.fixture
def host(monkeypatch):
    """SD.Next's modules, as far as we import them, around a tiny U-Net."""
    parts = "processing_callbacks progress script_callbacks scripts shared sd_models ui_components"
    fake = {name.rpartition(".")[2]: module for name, module in stand_ins(monkeypatch, parts).items()}
    fake["ui_components"].InputAccordion = object
    fake["scripts"].scripts_data = []
    fake["processing_callbacks"].p = None
    ended = []
    fake["script_callbacks"].on_after_process = ended.append
    shared, model = fake["shared"], SimpleNamespace(unet=tiny_unet())
    shared.opts = SimpleNamespace(token_merging_method="None", tome_ratio=0.0, todo_ratio=0.0)
    shared.OptionInfo = lambda *args: args
    shared.sd_model, fake["sd_models"].model_data = model, SimpleNamespace(sd_model=model, sd_refiner=None)
    forget_ours()
    batch = importlib.import_module("agentsd.webui.batch")
    ended.append(batch.end_all)  # as the script registers it
    yield SimpleNamespace(
        batch=batch, session=batch.session, shared=shared, model=model, ended=ended, parts=fake, host=batch.compat.HOST
    )
    forget_ours()


@pytest.fixture
def unet(host):
    return host.model.unet


def call(unet, size=16, t=500):
    generator = torch.Generator().manual_seed(size)
    x, context = torch.randn(2, 4, size, size, generator=generator), torch.randn(2, 7, WIDTH, generator=generator)
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=context).sample


def generate(host, settings=ON, p=None, batches=1, passes=((False, 16),), steps=2, end=True):
    """A generation as SD.Next makes it: the outputs of its U-Net's calls, two for each pass."""
    p, made = p or Processing(), []
    host.session.before_process(p)
    host.session.process(p, [settings if settings is not None else False])
    try:
        for p.iteration in range(batches):
            host.batch.begin(p)
            for p.is_hr_pass, size in passes:
                host.parts["processing_callbacks"].p = p
                made += [call(host.model.unet, size) for _ in range(steps)]
            p.is_hr_pass = False
            host.batch.end(p)
        p.processed = SimpleNamespace(images=[], index_of_first_image=0)
        host.session.postprocess(p, p.processed)
    finally:
        for callback in host.ended:
            callback(p)
    return made


def test_it_is_recognised(host):
    assert type(host.host).__name__ == "SDNext"


def test_pasted_values_are_updates(host):
    """Its paste asks for the name of a field whose reader gives a bare value, and ours are not names."""
    ratio = host.host.pasted(infotext.reader("ratio"))
    assert ratio({infotext.KEY: "ratio=0.4"})["value"] == 0.4
    assert ratio({}) is None


def test_patched_during_the_batch_and_no_longer(host, unet):
    before, plain = state(unet), call(unet)
    p = Processing()
    made = generate(host, p=p)
    assert not any(torch.equal(one, plain) for one in made)
    assert torch.equal(made[0], made[1]), "the first call is patched like the others"
    assert state(unet) == before
    assert torch.equal(call(unet), plain)
    assert infotext.read(p.extra_generation_params[infotext.KEY])["until"] == 1.0
    assert host.session.STATUS.notes() == []


def test_no_sampler_is_made(host, monkeypatch):
    """The host's function gives it to the model, and an image that is half done is lost."""
    made, p = [], Processing()
    p.steps, p.sampler_name, p.width, p.height = 2, "Euler a", 128, 128
    module = SimpleNamespace(create_sampler=lambda *names: made.append(names))
    monkeypatch.setitem(sys.modules, "modules.sd_samplers", module)
    generate(host, p=p)
    assert infotext.KEY in p.extra_generation_params
    assert not made


def test_a_checkpoint_is_looked_up_here_alone(host, monkeypatch):
    """The host's own search goes online for a name that it does not know, and downloads what it finds."""
    known = {"mine.safetensors [0123456789]": SimpleNamespace(name="mine")}
    monkeypatch.setitem(sys.modules, "modules.sd_checkpoint", SimpleNamespace(checkpoint_aliases=known))
    host.parts["sd_models"].get_closet_checkpoint_match = lambda title: pytest.fail(f"searched for {title}")
    for title, name in (("mine.safetensors [0123456789]", "mine"), ("owner/name", "owner/name")):
        host.host.options = {"sd_model_checkpoint": title}
        assert host.host.other_checkpoint() == name


def test_no_model_is_loaded_to_answer(host):
    del host.shared.sd_model  # a property that loads one
    host.parts["sd_models"].model_data.sd_model = None
    assert host.host.unet() is None


def test_off_does_nothing(host, unet):
    p = Processing()
    made = generate(host, None, p)
    assert all(torch.equal(one, call(unet)) for one in made)
    assert p.extra_generation_params == {"Other extension": "here"}


def test_each_pass_has_its_own_settings(host, unet):
    plain = call(unet, 16), call(unet, 24)
    settings = {**ON, "until": 0.4, "hires_until": 1.0}  # t = 500 is half way
    made = generate(host, settings, batches=2, passes=((False, 16), (True, 24)))
    assert all(torch.equal(made[i], plain[0]) for i in (0, 1, 4, 5))
    assert not any(torch.equal(made[i], plain[1]) for i in (2, 3, 6, 7))
    passes = host.session.STATUS.as_dict()["passes"]
    assert [(one["hires"], one["latent"]) for one in passes] == [(False, (16, 16)), (True, (24, 24))] * 2


def test_a_pass_that_is_switched_off(host, unet):
    made = generate(host, {**ON, "passes": "first"}, passes=((False, 16), (True, 24)))
    assert not torch.equal(made[0], call(unet, 16))
    assert torch.equal(made[2], call(unet, 24))


def test_the_object_that_samples_tells_the_pass(host, unet):
    """Where only the hires pass is made again, SD.Next samples with the object of the run before."""
    p, earlier = Processing(), Processing()
    earlier.is_hr_pass = True
    host.session.process(p, [ON])
    host.batch.begin(p)
    host.parts["processing_callbacks"].p = earlier
    call(unet)
    host.batch.end(p)
    assert host.session.STATUS.as_dict()["passes"][0]["hires"]


def test_an_exception_in_the_u_net(host, unet):
    before = state(unet)
    handle = unet.mid_block.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(host)
    handle.remove()
    assert state(unet) == before
    assert get_patch(unet) is None


def test_an_interrupted_image_has_its_settings(host, unet):
    """SD.Next writes its infotext while the pass is under way, and calls no postprocess."""
    p = Processing()
    host.session.process(p, [ON])
    host.batch.begin(p)
    call(unet)
    assert infotext.KEY in p.extra_generation_params
    for callback in host.ended:
        callback(p)
    assert get_patch(unet) is None
    assert host.session.STATUS.passes[0].patched


OBSTACLES = {
    "ToMe": {"token_merging_method": "ToMe", "tome_ratio": 0.5},
    "ToDo": {"token_merging_method": "ToDo", "todo_ratio": 0.5},
    "HyperTile": {"hypertile_unet_enabled": True},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_stands_down_beside_its_own(host, unet, reason):
    vars(host.shared.opts).update(OBSTACLES[reason])
    p = Processing()
    (made, _) = generate(host, p=p)
    assert torch.equal(made, call(unet))
    assert reason in host.session.STATUS.text()
    assert reason in host.host.obstacle(SamplingPass((16, 16))).text
    assert p.extra_generation_params == {"Other extension": "here"}


def test_an_unused_ratio_is_no_obstacle(host, unet):
    vars(host.shared.opts).update(token_merging_method="ToDo", tome_ratio=0.5, hypertile_unet_enabled=True)
    host.shared.opts.hypertile_hires_only = True
    made = generate(host, passes=((False, 16), (True, 24)))
    assert not torch.equal(made[0], call(unet, 16))
    assert torch.equal(made[2], call(unet, 24))
    assert host.host.obstacle(SamplingPass((16, 16))) is None


def test_a_model_without_a_u_net(host):
    host.shared.sd_model = host.parts["sd_models"].model_data.sd_model = SimpleNamespace(transformer=torch.nn.Module())
    p = Processing()
    generate(host, p=p)
    assert host.session.NO_UNET in host.session.STATUS.text()
    assert p.extra_generation_params == {"Other extension": "here"}


def test_a_pass_that_was_not_chosen_is_told_of(host):
    generate(host, {**ON, "passes": "hires"})
    assert host.session.NOT_CHOSEN in host.session.STATUS.text()


def test_a_batch_without_a_call(host):
    p = Processing()
    generate(host, p=p, steps=0)
    assert host.session.NO_PASS in host.session.STATUS.text()
    assert p.extra_generation_params == {"Other extension": "here"}


def test_a_refiner_that_is_loaded_meanwhile(host, unet):
    refiner, plain = tiny_unet(), call(unet)
    before = state(refiner)
    p = Processing()
    host.session.process(p, [ON])
    host.batch.begin(p)
    host.parts["sd_models"].model_data.sd_refiner = SimpleNamespace(unet=refiner)
    call(unet)
    assert not torch.equal(call(refiner), plain)
    assert get_patch(unet) is None
    host.batch.end(p)
    assert state(refiner) == before
    assert host.session.STATUS.as_dict()["passes"][0]["models"] == 2


def test_an_image_in_the_middle_of_another_one(host, unet):
    plain, p = call(unet), Processing()
    host.session.process(p, [ON])
    host.batch.begin(p)
    outer = call(unet)
    assert torch.equal(generate(host, None)[0], plain)
    assert torch.equal(call(unet), outer)
    host.batch.end(p)
    assert get_patch(unet) is None


def test_a_batch_that_a_thread_has_lost(host, unet):
    before = state(unet)

    def lose():
        p = Processing()
        host.session.process(p, [ON])
        host.batch.begin(p)
        call(unet)

    thread = threading.Thread(target=lose)
    thread.start()
    thread.join()
    assert get_patch(unet) is not None
    generate(host, None)
    assert state(unet) == before


def test_an_error_of_ours_costs_no_image(host, unet, monkeypatch):
    monkeypatch.setattr(type(host.batch.compat.HOST), "obstacle", lambda *args: 1 / 0)
    p = Processing()
    (made, _) = generate(host, p=p)
    assert torch.equal(made, call(unet))
    assert "ZeroDivisionError" in host.session.STATUS.text()
    assert p.extra_generation_params == {"Other extension": "here"}


def test_it_is_not_tuned_on_and_says_so(host, unet):
    tuning, comments = importlib.import_module("agentsd.webui.tuning"), []
    before, p = state(unet), Processing()
    p.comment = comments.append
    (made, _) = generate(host, {**ON, "tune": 0.02}, p)
    assert torch.equal(made, call(unet))
    assert state(unet) == before
    assert comments == [f"Agent Attention: not tuned, {tuning.NO_END}"]
    assert f"not tuned, {tuning.NO_END}" in host.session.STATUS.text()
    assert tuning.NO_END in p.processed.extra_generation_params[infotext.NOTE]
    assert p.extra_generation_params == {"Other extension": "here"}
    assert tuning.panel_tunings().refusal == tuning.NO_END, "as the panel says"


def test_what_was_tuned_elsewhere_is_used(host, unet):
    sites = ordered_sites(unet)
    plan = f"first tuning 1 16x16 0.05 {structure_of(sites)} | method=pool sx=2 sy=2 | 0.0 {'a' * len(sites)}"
    p = Processing()
    (made, _) = generate(host, {**ON, "tuning": plan}, p)
    assert not torch.equal(made, call(unet))
    assert f"U-Net output within {percent(0.05)}" in host.session.STATUS.text()
    assert infotext.read(p.extra_generation_params[infotext.KEY])["tuning"] == plan
