"""Tuning during a generation of a WebUI: what it makes, keeps and leaves behind. No timing is asserted."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from blocks import as_model, golden_unet, inputs, run
from fake_webui import ON, Processing, fake_host, fake_unet, generate, state  # noqa: F401 (fixtures)
from tuned_models import make_every_gain_count, quick_tune

from agentsd import TuningCancelled
from agentsd.app import kept_tunings as tuned
from agentsd.methods import method_named
from agentsd.settings import infotext, tunings
from agentsd.settings.presets import PRESETS
from agentsd.tuning import record
from agentsd.tuning.replay import Compared, compare
from agentsd.tuning.result import Tuning
from agentsd.tuning.tuner import tune

SECTION = tuned.SECTION
STEPS = (900, 500, 100)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tuning takes no time here: tests/test_tuning.py looks at what it finds."""
    monkeypatch.setattr(tuned, "tune", quick_tune)
    monkeypatch.setattr(tuned, "compare", lambda *args, **kwargs: {"Fast": Compared(0.1, 0.7)})
    monkeypatch.setattr(tuned, "selectable", lambda: [method_named("pool")])


def real(monkeypatch):
    """A tuning as it is, of a few candidates and one preset."""
    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.setattr(tuned, "compare", compare)
    monkeypatch.setattr(tuned, "PRESETS", {"Fast": PRESETS["Fast"]})
    make_every_gain_count(monkeypatch)


def make(host, settings, p=None, passes=(False,), between=lambda t: None):
    """A picture of some steps in each pass: the outputs of its model calls, what an API request is told, and p."""
    made = []

    def steps():
        for t in STEPS:
            host.session.before_model_call()
            made.append(run(host.shared.sd_model.model.diffusion_model, inputs(t=[t, t])))
            between(t)

    p = p or Processing()
    generate(host, settings, p, steps=steps, passes=passes)
    return torch.stack(made), p.processed.extra_generation_params, p


def keys(host):
    return sorted(host.cache.get(SECTION, {}))


@pytest.fixture
def plan(host):
    """The text of a tuning that acts, made in a generation."""
    return make(host, {"tune": 0.3})[1][infotext.TUNED]


def test_the_picture_is_made_without_us_and_tuned_on(host, unet):
    plain, _, _ = make(host, None)
    before = state(unet)
    made, entries, p = make(host, {"tune": 0.3})
    assert torch.equal(made, plain)
    assert state(unet) == before
    assert vars(p.sampler) == {}
    assert keys(host) == ["small.safetensors|first|16x16"], entries
    assert "made without Agent Attention and tuned on" in entries[infotext.NOTE]
    assert infotext.KEY not in entries
    assert p.extra_generation_params == {"Other extension": "here"}, "nothing is written into an image without us"
    (found,) = tunings.read(entries[infotext.TUNED])
    assert (found.of, found.tuning.tolerance, found.tuning.size) == ("first", 0.3, (16, 16))
    assert found.tuning.acts
    status = host.session.STATUS.as_dict()
    assert status["preset"] == "Tuned"
    assert "128×128: tuned to within 30%" in status["text"]


def test_its_plan_is_used_and_the_infotext_makes_the_same_picture_anywhere(host, plan):
    plain, _, _ = make(host, None)
    made, entries, _ = make(host, {"tuning": "auto", "how_close": "5%"})
    named, more, _ = make(host, {"tuning": plan})
    assert not torch.equal(named, plain)
    assert "U-Net output within 30%" in host.session.STATUS.text()
    host.cache.clear()
    for wanted, written in ((made, entries[infotext.KEY]), (named, more[infotext.KEY])):
        assert "auto" not in written
        again, after, _ = make(host, infotext.read(written))
        assert torch.equal(again, wanted)
        assert after[infotext.KEY] == written


def test_a_run_says_how_close_it_was(host):
    make(host, {"until": 1.0, "min_tokens": 0})
    assert re.search(r"Error of attention [\d.]+% \(worst block [\d.]+%\)", host.session.STATUS.text())
    (told,) = host.session.STATUS.as_dict()["passes"]
    assert 0 < told["closeness"]["mean"] <= told["closeness"]["worst"]
    make(host, {"until": 1.0, "min_tokens": 9999})
    assert "Error of attention" not in host.session.STATUS.text()
    host.shared.opts.agent_attention_closeness = False
    make(host, {"until": 1.0, "min_tokens": 0})
    (told,) = host.session.STATUS.as_dict()["passes"]
    assert told["closeness"] is None
    assert "Error of attention" not in host.session.STATUS.text()


def test_how_close_chooses_among_the_plans_found(host, plan):
    used = []
    for how_close in ("0.5%", "5%"):
        entries = make(host, {"tuning": "auto", "how_close": how_close})[1]
        used += [found.tuning for found in tunings.read(infotext.read(entries[infotext.KEY])["tuning"])]
    assert [plan.tolerance for plan in used] == [0.005, 0.05]
    assert used[0].choices != used[1].choices


def test_each_pass_is_tuned_and_served_by_itself(host):
    entries = make(host, {"tune": 0.3}, passes=(False, True))[1]
    assert keys(host) == ["small.safetensors|first|16x16", "small.safetensors|hires|16x16"]
    assert [found.of for found in tunings.read(entries[infotext.TUNED])] == ["first", "hires"]
    entries = make(host, {"tuning": "auto"}, passes=(False, True))[1]
    assert [found.of for found in tunings.read(infotext.read(entries[infotext.KEY])["tuning"])] == ["first", "hires"]


def test_of_a_batch_the_first_image_is_tuned_on(host, plan):
    kept = dict(host.cache[SECTION])
    make(host, {"tune": 0.2}, Processing(iteration=1))
    assert host.cache[SECTION] == kept


@pytest.mark.parametrize("ends", ["tuned", "cancelled"])
def test_a_plot_is_tuned_on_once_with_its_first_image(host, monkeypatch, ends):
    """An X/Y/Z plot, or another script, makes several images of one request; the order is given with each."""
    if ends == "cancelled":
        monkeypatch.setattr(host.session.compat.HOST, "was_stopped", lambda: True)
    plain, _, _ = make(host, None)
    host.progress.current_task = "task(plot)"
    cells = [make(host, {"tune": 0.3, **ON}) for _ in range(3)]
    assert torch.equal(cells[0][0], plain)
    assert "made without Agent Attention and tuned on" in cells[0][1][infotext.NOTE]
    for made, entries, _ in cells[1:]:
        assert not torch.equal(made, plain)
        assert infotext.TUNED not in entries
        assert infotext.KEY in entries
    status = host.session.STATUS.as_dict()
    assert status["preset"] == ("Tuned" if ends == "tuned" else "")
    assert ("not tuned" if ends == "cancelled" else "tuned to within 30%") in status["text"]
    host.progress.current_task = "task(next)"
    assert torch.equal(make(host, {"tune": 0.3, **ON})[0], plain)


@pytest.mark.parametrize("elsewhere", ["another size", "another checkpoint", "other weights under the same name"])
def test_what_is_not_tuned_has_the_other_settings_and_says_so(host, plan, elsewhere):
    if elsewhere == "another size":
        host.cache[SECTION]["small.safetensors|first|8x8"] = host.cache[SECTION].pop("small.safetensors|first|16x16")
    elif elsewhere == "another checkpoint":
        host.shared.sd_model.sd_checkpoint_info.name = "other.safetensors"
    else:
        torch.nn.init.normal_(next(host.shared.sd_model.model.diffusion_model.parameters()))
    made, entries, _ = make(host, {"tuning": "auto", **ON})
    text = host.session.STATUS.text()
    usual, _, _ = make(host, ON)
    assert torch.equal(made, usual)
    assert "so the other settings were used" in text
    assert "tuning=" not in entries[infotext.KEY]


def test_a_given_plan_for_another_model_is_refused_and_the_image_made_without_us(host, unet):
    other = "first tuning 1 16x16 0.02 12345678 | pool sx=2 | 0.0 aa".replace("pool", "method=pool")
    made, _, _ = make(host, {"tuning": other})
    assert "for another model" in host.session.STATUS.text()
    assert torch.equal(made, make(host, None)[0])


STOPS = ("skipped", "interrupted", "stopping_generation")


@pytest.mark.parametrize("stop", STOPS)
def test_skip_and_interrupt_end_the_tuning_and_keep_the_image(host, unet, plan, monkeypatch, stop):
    kept, before = dict(host.cache[SECTION]), state(unet)

    def press(self):
        monkeypatch.undo()
        setattr(host.shared.state, stop, True)

    monkeypatch.setattr(type(host.shared.state), "nextjob", press)
    made, entries, p = make(host, {"tune": 0.1})
    assert torch.equal(made, make(host, None)[0])
    assert host.cache[SECTION] == kept
    assert state(unet) == before
    assert p.comments == ["Agent Attention: not tuned, cancelled"]
    assert infotext.TUNED not in entries
    assert (host.shared.state.skipped, host.shared.state.interrupted) == (False, False)
    assert host.shared.state.stopping_generation is (stop != "skipped")
    assert host.shared.state.textinfo is None


@pytest.mark.parametrize("where", ["tune", "compare", "put"])
def test_a_tuning_that_fails_costs_no_image_and_nothing_that_was_kept(host, unet, plan, monkeypatch, where):
    kept, before = dict(host.cache[SECTION]), state(unet)
    owner = tuned.Store if where == "put" else tuned
    monkeypatch.setattr(owner, where, lambda *args, **kwargs: 1 / 0)
    made, entries, _ = make(host, {"tune": 0.1})
    assert torch.equal(made, make(host, None)[0])
    assert "an error of ours - ZeroDivisionError" in entries[infotext.NOTE]
    assert host.cache[SECTION] == kept
    assert state(unet) == before


def test_a_report_that_fails_costs_no_image(host, unet, monkeypatch):
    before = state(unet)
    monkeypatch.setattr("agentsd.patching.closeness.Watch.read", lambda self: 1 / 0)
    make(host, {"until": 1.0, "min_tokens": 0})
    assert "an error of ours: ZeroDivisionError" in host.session.STATUS.text()
    assert state(unet) == before


def test_an_image_that_is_lost_leaves_nothing(host, unet):
    before = state(unet)

    def fail(t):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        make(host, {"tune": 0.3}, between=fail)
    assert state(unet) == before
    assert keys(host) == []


def refiner(host, t):
    host.shared.sd_model = as_model(golden_unet())


def other_weights(host, t):
    host.shared.sd_model.sd_checkpoint_info = SimpleNamespace(name="refiner.safetensors")


def interrupted(host, t):
    host.shared.state.interrupted = True


def nothing(host, t):
    pass


REFUSED = {
    "another checkpoint took over": refiner,
    "another checkpoint took over ": other_weights,
    "the image was interrupted": interrupted,
    "token merging": nothing,
    "not tuned; the U-Net was not called": nothing,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_tuned_on_costs_no_image(host, unet, monkeypatch, reason):
    plain, before = make(host, None)[0], state(unet)
    if reason == "token merging":
        monkeypatch.setattr(Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.5)
    if "not called" in reason:
        monkeypatch.setattr(record, "copied", lambda value: 1 / 0)
    made, entries, _ = make(host, {"tune": 0.3}, between=lambda t: REFUSED[reason](host, t))
    assert reason.strip() in entries[infotext.NOTE]
    assert keys(host) == []
    assert state(unet) == before
    assert REFUSED[reason] is refiner or torch.equal(made, plain)


def test_a_refiner_loaded_into_the_same_unet_loses_the_plan(host, plan):
    """The plan is the other checkpoint's."""
    before = make(host, {"tuning": "auto", "passes": "both"})[0]
    after, _, _ = make(host, {"tuning": "auto"}, between=lambda t: other_weights(host, t))
    usual = make(host, {})[0]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:], usual[1:])


def test_a_pass_that_is_left_out_is_not_tuned(host):
    make(host, {"tune": 0.3, "passes": "hires"}, passes=(False, True))
    assert keys(host) == ["small.safetensors|hires|16x16"]


def test_upcasting_is_tuned_for(host):
    host.shared.opts.upcast_attn = True
    (found,) = tunings.read(make(host, {"tune": 0.3})[1][infotext.TUNED])
    assert {settings["attn_precision"] for settings in found.tuning.candidates} == {"fp32"}


def test_the_panel_has_the_tunings_of_this_checkpoint(host, plan):
    other = tuned.Kept("other.safetensors", "first", tunings.read(plan)[0].tuning)
    host.cache[SECTION][other.key] = other.to_dict()
    panel = import_module("agentsd.webui.tuning").panel_tunings()
    assert "small.safetensors" in panel.results()
    assert "other.safetensors" not in panel.results()
    assert "1 tuning of small.safetensors forgotten" in panel.forget()
    assert keys(host) == [other.key]


def test_a_tuning_knows_the_lora_and_the_guidance(host):
    p = Processing()
    p.cfg_scale = 7.0
    network = SimpleNamespace(items=["detail", "0.8"])
    p.extra_network_data = {"lora": [network], "hypernet": []}
    make(host, {"tune": 0.3}, p)
    (kept,) = host.cache[SECTION].values()
    assert kept["tuning"]["conditions"] == {"pass": "first", "lora": "detail 0.8", "cfg": "7"}


def test_another_lora_than_was_tuned_with_is_told(host, plan):
    p = Processing()
    p.extra_network_data = {"lora": [SimpleNamespace(items=["detail", "0.8"])]}
    make(host, {"tuning": "auto", "how_close": "5%"}, p)
    assert "but tuned with lora none and not detail 0.8" in host.session.STATUS.text()


def test_the_time_left_is_told(unet, monkeypatch):
    real(monkeypatch)
    calls, said = [(inputs(t=[t, t])[:2], {"context": inputs()[2]}) for t in STEPS], []
    tuned.make(unet, calls, 0.3, checkpoint="x", of="first", progress=lambda *given: said.append(given))
    assert all(" left" in text for done, _, text in said if done)
    assert {total for _, total, _ in said} == {said[0][1]}
    assert said[-1][0] <= said[-1][1]


def test_what_is_damaged_in_the_cache_counts_as_absent(host, plan):
    (key,) = keys(host)
    for damaged in ({**host.cache[SECTION][key], "tuning": {}}, "text"):
        host.cache[SECTION][key] = damaged
        make(host, {"tuning": "auto"})
        assert "not tuned on this checkpoint at this size" in host.session.STATUS.text()


def test_cancelling_while_the_presets_are_tried_leaves_the_model(unet, monkeypatch):
    real(monkeypatch)
    before, calls = state(unet), [(inputs(t=[t, t])[:2], {"context": inputs()[2]}) for t in STEPS]

    def progress(done, total, text):
        assert done < total
        return "presets" not in text

    with pytest.raises(TuningCancelled):
        tuned.make(unet, calls, 0.3, checkpoint="x", of="first", progress=progress)
    assert state(unet) == before


def test_kept_tunings_survive_the_cache(host, plan):
    (data,) = host.cache[SECTION].values()
    kept = tuned.Kept.from_dict(data)
    assert kept.to_dict() == data
    assert isinstance(kept.tuning, Tuning)
    assert {"Fast"} == {point.name for point in kept.presets}
    assert all(point.deviation >= 0 and point.speed_up > 0 for point in kept.presets)
