"""SD.Next's ways on a tiny pipeline of diffusers: batches announced, passes not, options of its own."""

from __future__ import annotations

import importlib
import sys
import threading
from types import SimpleNamespace

import fake_webui
import pytest
import torch
from fake_webui import OTHERS, imported, stand_ins, state
from tiny_pipelines import tiny_unet

from agentsd import get_patch
from agentsd.app.decision import SamplingPass
from agentsd.settings import infotext
from agentsd.tuning.fingerprint import ordered_sites, structure_of
from agentsd.words import percent

ON = {"until": 1.0, "min_tokens": 1}
WIDTH = 32  # channels of the tiny U-Net's context
BOTH = ((False, 16), (True, 24))


class Processing(fake_webui.Processing):
    """What SD.Next's processing object is to us; its images are empty even for one made from text."""

    def __init__(self, comment=pytest.fail):
        super().__init__(comment=comment, iteration=0, init_images=[])


@pytest.fixture
def host(monkeypatch):
    """SD.Next's modules, as far as we import them, around a tiny U-Net."""
    fake = stand_ins(monkeypatch, "processing_callbacks")
    fake.processing_callbacks.p, fake.script_callbacks.on_after_process = None, None
    fake.shared.opts = SimpleNamespace(token_merging_method="None", tome_ratio=0.0, todo_ratio=0.0)
    load(fake, SimpleNamespace(unet=tiny_unet()))
    with imported("batch") as fake.batch:
        fake.session, fake.ours = fake.batch.session, fake.batch.compat.HOST
        fake.said = fake.session.STATUS.text
        yield fake


def load(host, model):
    host.sd_models.model_data = SimpleNamespace(sd_model=model, sd_refiner=None)


@pytest.fixture
def unet(host):
    return host.sd_models.model_data.sd_model.unet


def call(unet, size=16, t=500):
    generator = torch.Generator().manual_seed(size)
    x, context = torch.randn(2, 4, size, size, generator=generator), torch.randn(2, 7, WIDTH, generator=generator)
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=context).sample


def begin(host, p=None, settings=ON):
    """The beginning of a batch."""
    p = p or Processing()
    host.session.before_process(p)
    host.session.process(p, [settings if settings is not None else False])
    host.batch.begin(p)
    host.processing_callbacks.p = p
    return p


def generate(host, settings=ON, p=None, batches=1, passes=((False, 16),), steps=2):
    """A generation as SD.Next makes it: the outputs of its U-Net's calls, two for each pass."""
    p, made = p or Processing(), []
    try:
        for p.iteration in range(batches):
            host.batch.begin(p) if p.iteration else begin(host, p, settings)
            for p.is_hr_pass, size in passes:
                made += [call(host.sd_models.model_data.sd_model.unet, size) for _ in range(steps)]
            p.is_hr_pass = False
            host.batch.end(p)
        p.processed = SimpleNamespace(images=[], index_of_first_image=0)
        host.session.postprocess(p, p.processed)
    finally:
        host.batch.end_all(p)  # as the script has it registered
    return made


def test_its_ways(host, monkeypatch):
    assert type(host.ours).__name__ == "SDNext"
    # its paste asks for the name of a field whose reader gives a bare value, and ours are not names
    ratio = host.ours.pasted(infotext.reader("ratio"))
    assert ratio({infotext.KEY: "ratio=0.4"})["value"] == 0.4
    assert ratio({}) is None
    # its own search for a checkpoint goes online for a name that it does not know, and downloads what it finds
    known = {"mine.safetensors [0123456789]": SimpleNamespace(name="mine")}
    monkeypatch.setitem(sys.modules, "modules.sd_checkpoint", SimpleNamespace(checkpoint_aliases=known))
    host.sd_models.get_closet_checkpoint_match = lambda title: pytest.fail(f"searched for {title}")
    for title, name in (("mine.safetensors [0123456789]", "mine"), ("owner/name", "owner/name")):
        host.ours.options = {"sd_model_checkpoint": title}
        assert host.ours.other_checkpoint() == name
    load(host, None)  # its `shared.sd_model` would load one to answer
    assert host.ours.unet() is None


def test_patched_during_the_batch_and_no_longer(host, unet, monkeypatch):
    # the host's function gives a sampler to the model, and an image that is half done is lost
    module = SimpleNamespace(create_sampler=lambda *names: pytest.fail("a sampler is made"))
    monkeypatch.setitem(sys.modules, "modules.sd_samplers", module)
    before, plain, p = state(unet), call(unet), Processing()
    p.steps, p.sampler_name, p.width, p.height = 2, "Euler a", 128, 128
    first, second = generate(host, p=p)
    assert not torch.equal(first, plain)
    assert torch.equal(first, second), "the first call is patched like the others"
    assert state(unet) == before
    assert torch.equal(call(unet), plain)
    assert infotext.read(p.extra_generation_params[infotext.KEY])["until"] == 1.0
    assert host.session.STATUS.notes() == []
    without = generate(host, None, p := Processing())
    assert torch.equal(without[0], plain)
    assert p.extra_generation_params == OTHERS


def test_each_pass_has_its_own_settings(host, unet):
    plain = call(unet, 16), call(unet, 24)
    settings = {**ON, "until": 0.4, "hires_until": 1.0}  # t = 500 is half way
    made = generate(host, settings, batches=2, passes=BOTH)
    assert all(torch.equal(made[i], plain[0]) for i in (0, 1, 4, 5))
    assert not any(torch.equal(made[i], plain[1]) for i in (2, 3, 6, 7))
    passes = host.session.STATUS.as_dict()["passes"]
    assert [(one["hires"], one["latent"]) for one in passes] == [(False, (16, 16)), (True, (24, 24))] * 2
    made = generate(host, {**ON, "passes": "first"}, passes=BOTH)
    assert (torch.equal(made[0], plain[0]), torch.equal(made[2], plain[1])) == (False, True)


def test_the_object_that_samples_tells_the_pass(host, unet):
    """Where only the hires pass is made again, SD.Next samples with the object of the run before."""
    p = begin(host)
    host.processing_callbacks.p = Processing()
    host.processing_callbacks.p.is_hr_pass = True
    call(unet)
    host.batch.end(p)
    assert host.session.STATUS.as_dict()["passes"][0]["hires"]


def test_an_interrupted_image_has_its_settings(host, unet):
    """SD.Next writes its infotext while the pass is under way, and calls no postprocess."""
    p = begin(host)
    call(unet)
    assert infotext.KEY in p.extra_generation_params
    host.batch.end_all(p)
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
    made, _ = generate(host, p=(p := Processing()))
    assert torch.equal(made, call(unet))
    assert reason in host.said()
    assert reason in host.ours.obstacle(SamplingPass((16, 16))).text
    assert p.extra_generation_params == OTHERS


def test_an_unused_ratio_is_no_obstacle(host, unet):
    vars(host.shared.opts).update(token_merging_method="ToDo", tome_ratio=0.5, hypertile_unet_enabled=True)
    host.shared.opts.hypertile_hires_only = True
    made = generate(host, passes=BOTH)
    assert (torch.equal(made[0], call(unet, 16)), torch.equal(made[2], call(unet, 24))) == (False, True)
    assert host.ours.obstacle(SamplingPass((16, 16))) is None


@pytest.mark.parametrize("reason", ["NO_UNET", "NOT_CHOSEN", "NO_PASS"])
def test_why_no_pass_was_made_is_told(host, reason):
    if reason == "NO_UNET":
        load(host, SimpleNamespace(transformer=torch.nn.Module(), unet=torch.nn.Identity()))
    settings = {**ON, "passes": "hires" if reason == "NOT_CHOSEN" else "both"}
    generate(host, settings, p := Processing(), steps=2 if reason == "NOT_CHOSEN" else 0)
    assert getattr(host.session, reason) in host.said()
    assert p.extra_generation_params == OTHERS


def test_a_refiner_that_is_loaded_meanwhile(host, unet):
    refiner, plain = tiny_unet(), call(unet)
    before, p = state(refiner), begin(host)
    host.sd_models.model_data.sd_refiner = SimpleNamespace(unet=refiner)
    call(unet)
    assert not torch.equal(call(refiner), plain)
    assert get_patch(unet) is None
    host.batch.end(p)
    assert state(refiner) == before
    assert host.session.STATUS.as_dict()["passes"][0]["models"] == 2


def test_an_image_in_the_middle_of_another_one(host, unet):
    plain, p = call(unet), begin(host)
    outer = call(unet)
    assert torch.equal(generate(host, None)[0], plain)
    assert torch.equal(call(unet), outer)
    host.batch.end(p)
    assert get_patch(unet) is None


def test_a_batch_that_a_thread_has_lost(host, unet):
    before = state(unet)
    thread = threading.Thread(target=lambda: (begin(host), call(unet)))
    thread.start()
    thread.join()
    assert get_patch(unet) is not None
    generate(host, None)
    assert state(unet) == before


@pytest.mark.parametrize("where", ["obstacle", "sampling", "is_hires", "the U-Net"])
def test_an_error_costs_no_image_and_leaves_nothing(host, unet, monkeypatch, where):
    before, plain, p = state(unet), call(unet), Processing()
    if where == "the U-Net":  # which is not ours
        handle = unet.mid_block.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(host)
        handle.remove()
    else:
        monkeypatch.setattr(type(host.ours), where, lambda *args: 1 / 0)
        assert torch.equal(generate(host, p=p)[0], plain)
        assert "ZeroDivisionError" in host.said()
        assert p.extra_generation_params == OTHERS
    assert state(unet) == before


def test_it_is_not_tuned_on_and_says_so(host, unet):
    tuning, comments = importlib.import_module("agentsd.webui.session"), []
    before, p = state(unet), Processing(comments.append)
    made, _ = generate(host, {**ON, "tune": 0.02}, p)
    assert torch.equal(made, call(unet))
    assert state(unet) == before
    assert comments == [f"Agent Attention: not tuned, {tuning.NO_END}"]
    assert f"not tuned, {tuning.NO_END}" in host.said()
    assert tuning.NO_END in p.processed.extra_generation_params[infotext.NOTE]
    assert p.extra_generation_params == OTHERS
    assert tuning.panel_tunings().refusal == tuning.NO_END, "as the panel says"


def test_what_was_tuned_elsewhere_is_used(host, unet):
    sites = ordered_sites(unet)
    plan = f"first tuning 1 16x16 0.05 {structure_of(sites)} | method=pool sx=2 sy=2 | 0.0 {'a' * len(sites)}"
    made, _ = generate(host, {**ON, "tuning": plan}, p := Processing())
    assert not torch.equal(made, call(unet))
    assert f"U-Net output within {percent(0.05)}" in host.said()
    assert infotext.read(p.extra_generation_params[infotext.KEY])["tuning"] == plan
