"""Tuning during a generation of a WebUI: what it makes, keeps and leaves behind. No timing is asserted."""

from __future__ import annotations

import re
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from blocks import as_model, golden_unet, inputs
from fake_webui import ON, OTHERS, Processing, fake_host, fake_unet, generate, state, step  # noqa: F401 - fixtures
from tuned_models import make_every_gain_count, quick_tune

from agentsd import TuningCancelled
from agentsd.app import kept_tunings as tuned
from agentsd.methods import method_named
from agentsd.settings import infotext, tunings
from agentsd.settings.presets import PRESETS
from agentsd.tuning import record
from agentsd.tuning.replay import Compared, compare
from agentsd.tuning.tuner import tune

FIRST, HIRES = (f"small.safetensors|{of}|16x16" for of in ("first", "hires"))
STEPS = (900, 500, 100)
TUNE, AUTO = {"tune": 0.3}, {"tuning": "auto"}
BOTH = (False, True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tuning takes no time here: tests/test_tuning.py looks at what it finds."""
    monkeypatch.setattr(tuned, "tune", quick_tune)
    monkeypatch.setattr(tuned, "compare", lambda *args, **kwargs: {"Fast": Compared(0.1, 0.7)})
    monkeypatch.setattr(tuned, "selectable", lambda: [method_named("pool")])


def make(host, settings, p=None, passes=(False,), between=lambda t: None):
    """A picture of some steps in each pass: the outputs of its model calls, what an API request is told, and p."""
    made = []

    def steps():
        for t in STEPS:
            made.append(step(host, inputs(t=[t, t])))
            between(t)

    generate(host, settings, p := p or Processing(), steps=steps, passes=passes)
    return torch.stack(made), p.processed.extra_generation_params, p


@pytest.fixture
def leaves_no_trace(host, unet):
    """Afterwards nothing is left on the U-Net; the picture made without us."""
    before = state(unet)
    yield make(host, None)[0]
    assert state(unet) == before


@pytest.fixture
def kept(host):
    """What is kept of tunings, by key."""
    return host.cache.setdefault(tuned.SECTION, {})


@pytest.fixture
def plan(host):
    """The text of a tuning that acts, made in a generation."""
    return make(host, TUNE)[1][infotext.TUNED]


@pytest.fixture
def text(host):
    return lambda: host.session.STATUS.text()


def test_the_picture_is_made_without_us_and_tuned_on(host, leaves_no_trace, kept, text):
    made, entries, p = make(host, TUNE)
    assert torch.equal(made, leaves_no_trace)
    assert vars(p.sampler) == {}
    assert list(kept) == [FIRST], entries
    assert "made without Agent Attention and tuned on" in entries[infotext.NOTE]
    assert infotext.KEY not in entries
    assert p.extra_generation_params == OTHERS, "nothing is written into an image without us"
    (found,) = tunings.read(entries[infotext.TUNED])
    assert (found.of, found.tuning.tolerance, found.tuning.size) == ("first", 0.3, (16, 16))
    assert found.tuning.acts
    assert host.session.STATUS.as_dict()["preset"] == "Tuned"
    assert "128×128: tuned to 30%" in text()
    assert tuned.Kept.from_dict(kept[FIRST]).to_dict() == kept[FIRST]
    assert [*kept[FIRST]["presets"]] == ["Fast"]


def test_its_plan_is_used_and_the_infotext_makes_the_same_picture_anywhere(host, leaves_no_trace, plan, kept, text):
    made, entries, _ = make(host, {**AUTO, "how_close": "5%"})
    named, more, _ = make(host, {"tuning": plan})
    assert not torch.equal(named, leaves_no_trace)
    assert "U-Net output within 30%" in text()
    kept.clear()
    for wanted, written in ((made, entries[infotext.KEY]), (named, more[infotext.KEY])):
        assert "auto" not in written
        again, after, _ = make(host, infotext.read(written))
        assert torch.equal(again, wanted)
        assert after[infotext.KEY] == written


def test_a_run_says_how_close_it_was(host, text):
    def closeness(**more):
        make(host, {**ON, **more})
        (told,) = host.session.STATUS.as_dict()["passes"]
        assert ("Error of attention" in text()) is (told["closeness"] is not None)
        return told["closeness"]

    told = closeness()
    assert 0 < told["mean"] <= told["worst"]
    assert re.search(r"Error of attention [\d.]+% \(worst block [\d.]+%\)", text())
    assert closeness(min_tokens=9999) is None
    host.shared.opts.agent_attention_closeness = False
    assert closeness() is None


def test_how_close_chooses_among_the_plans_found(host, plan):
    used = []
    for how_close in ("0.5%", "5%"):
        entries = make(host, {**AUTO, "how_close": how_close})[1]
        used += [found.tuning for found in tunings.read(infotext.read(entries[infotext.KEY])["tuning"])]
    assert [plan.tolerance for plan in used] == [0.005, 0.05]
    assert used[0].choices != used[1].choices


def test_each_pass_is_tuned_and_served_by_itself(host, kept):
    make(host, {**TUNE, "passes": "hires"}, passes=BOTH)
    assert list(kept) == [HIRES], "not one that is left out"
    entries = make(host, TUNE, passes=BOTH)[1]
    assert sorted(kept) == [FIRST, HIRES]
    assert [found.of for found in tunings.read(entries[infotext.TUNED])] == ["first", "hires"]
    entries = make(host, AUTO, passes=BOTH)[1]
    assert [found.of for found in tunings.read(infotext.read(entries[infotext.KEY])["tuning"])] == ["first", "hires"]
    before = dict(kept)
    make(host, {"tune": 0.2}, Processing(iteration=1))
    assert kept == before, "of a batch the first image is tuned on"


@pytest.mark.parametrize("ends", ["tuned", "cancelled"])
def test_a_plot_is_tuned_on_once_with_its_first_image(host, leaves_no_trace, monkeypatch, ends):
    """An X/Y/Z plot, or another script, makes several images of one request; the order is given with each."""
    if ends == "cancelled":
        monkeypatch.setattr(host.session.compat.HOST, "was_stopped", lambda: True)
    host.progress.current_task = "task(plot)"
    cells = [make(host, {**TUNE, **ON}) for _ in range(3)]
    assert torch.equal(cells[0][0], leaves_no_trace)
    assert "made without Agent Attention and tuned on" in cells[0][1][infotext.NOTE]
    for made, entries, _ in cells[1:]:
        assert not torch.equal(made, leaves_no_trace)
        assert (infotext.TUNED in entries, infotext.KEY in entries) == (False, True)
    status = host.session.STATUS.as_dict()
    assert status["preset"] == ("Tuned" if ends == "tuned" else "")
    assert ("not tuned" if ends == "cancelled" else "tuned to 30%") in status["text"]
    host.progress.current_task = "task(next)"
    assert torch.equal(make(host, {**TUNE, **ON})[0], leaves_no_trace)


@pytest.mark.parametrize("elsewhere", ["another size", "another checkpoint", "other weights under the same name"])
def test_what_is_not_tuned_has_the_other_settings_and_says_so(host, unet, plan, kept, text, elsewhere):
    if elsewhere == "another size":
        kept["small.safetensors|first|8x8"] = kept.pop(FIRST)
    elif elsewhere == "another checkpoint":
        host.shared.sd_model.sd_checkpoint_info.name = "other.safetensors"
    else:
        torch.nn.init.normal_(next(unet.parameters()))
    made, entries, _ = make(host, {**AUTO, **ON})
    assert "so the other settings were used" in text()
    assert "tuning=" not in entries[infotext.KEY]
    assert torch.equal(made, make(host, ON)[0])


def test_a_given_plan_for_another_model_is_refused_and_the_image_made_without_us(host, leaves_no_trace, text):
    made, _, _ = make(host, {"tuning": "first tuning 1 16x16 0.02 12345678 | method=pool sx=2 | 0.0 aa"})
    assert "for another model" in text()
    assert torch.equal(made, leaves_no_trace)


@pytest.mark.parametrize("stop", ["skipped", "interrupted", "stopping_generation"])
def test_skip_and_interrupt_end_the_tuning_and_keep_the_image(host, leaves_no_trace, plan, kept, monkeypatch, stop):
    before, said = dict(kept), host.shared.state

    def press(self):
        monkeypatch.undo()
        setattr(said, stop, True)

    monkeypatch.setattr(type(said), "nextjob", press)
    made, entries, p = make(host, {"tune": 0.1})
    assert torch.equal(made, leaves_no_trace)
    assert kept == before
    assert p.comments == ["Agent Attention: not tuned, cancelled"]
    assert infotext.TUNED not in entries
    assert (said.skipped, said.interrupted, said.stopping_generation) == (False, False, stop != "skipped")
    assert said.textinfo is None


@pytest.mark.parametrize("where", ["tune", "compare", "put"])
def test_a_tuning_that_fails_costs_no_image_and_nothing_kept(host, leaves_no_trace, plan, kept, monkeypatch, where):
    before = dict(kept)
    monkeypatch.setattr(tuned.Store if where == "put" else tuned, where, lambda *args, **kwargs: 1 / 0)
    made, entries, _ = make(host, {"tune": 0.1})
    assert torch.equal(made, leaves_no_trace)
    assert "an error of ours - ZeroDivisionError" in entries[infotext.NOTE]
    assert kept == before


def test_a_report_that_fails_costs_no_image(host, leaves_no_trace, text, monkeypatch):
    monkeypatch.setattr("agentsd.patching.closeness.Watch.read", lambda self: 1 / 0)
    make(host, ON)
    assert "an error of ours: ZeroDivisionError" in text()


def test_an_image_that_is_lost_leaves_nothing(host, leaves_no_trace, kept):
    with pytest.raises(ZeroDivisionError):
        make(host, TUNE, between=lambda t: 1 / 0)
    assert not kept


def refiner(host):
    host.shared.sd_model = as_model(golden_unet())


def other_weights(host):
    host.shared.sd_model.sd_checkpoint_info = SimpleNamespace(name="refiner.safetensors")


def interrupted(host):
    host.shared.state.interrupted = True


REFUSED = {
    refiner: "another checkpoint took over",
    other_weights: "another checkpoint took over",
    interrupted: "the image was interrupted",
    "merging": "token merging",
    "no call": "not tuned; the U-Net was not called",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_tuned_on_costs_no_image(host, leaves_no_trace, kept, monkeypatch, what):
    if what == "merging":
        monkeypatch.setattr(Processing, "get_token_merging_ratio", lambda self, for_hr=False: 0.5)
    if what == "no call":
        monkeypatch.setattr(record, "copied", lambda value: 1 / 0)
    made, entries, _ = make(host, TUNE, between=lambda t: callable(what) and what(host))
    assert REFUSED[what] in entries[infotext.NOTE]
    assert not kept
    assert what is refiner or torch.equal(made, leaves_no_trace)


def test_a_refiner_loaded_into_the_same_unet_loses_the_plan(host, plan):
    """The plan is the other checkpoint's."""
    before = make(host, AUTO)[0]
    after = make(host, AUTO, between=lambda t: other_weights(host))[0]
    usual = make(host, {})[0]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:], usual[1:])


def test_upcasting_is_tuned_for(host):
    host.shared.opts.upcast_attn = True
    (found,) = tunings.read(make(host, TUNE)[1][infotext.TUNED])
    assert {settings["attn_precision"] for settings in found.tuning.candidates} == {"fp32"}


def test_the_panel_has_the_tunings_of_this_checkpoint(host, plan, kept):
    other = tuned.Kept("other.safetensors", "first", tunings.read(plan)[0].tuning)
    kept[other.key] = other.to_dict()
    panel = import_module("agentsd.webui.session").panel_tunings()
    assert "128×128" in panel.results()
    assert "other" not in panel.results()
    assert "1 tuning of small.safetensors forgotten" in panel.forget()
    assert list(kept) == [other.key]


def test_a_tuning_knows_the_lora_and_the_guidance_and_another_lora_is_told(host, kept, text):
    def with_lora(weight):
        return Processing(
            cfg_scale=7.0, extra_network_data={"lora": [SimpleNamespace(items=["detail", weight])], "hypernet": []}
        )

    make(host, TUNE, with_lora("0.8"))
    assert kept[FIRST]["tuning"]["conditions"] == {"pass": "first", "lora": "detail 0.8", "cfg": "7"}
    make(host, {**AUTO, "how_close": "5%"}, with_lora("0.3"))
    assert "but tuned with lora detail 0.8 and not detail 0.3" in text()


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_time_left_is_told_and_the_presets_can_be_cancelled(unet, monkeypatch, cancelled):
    """A tuning as it is, of a few candidates and one preset."""
    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.setattr(tuned, "compare", compare)
    monkeypatch.setattr(tuned, "PRESETS", {"Fast": PRESETS["Fast"]})
    make_every_gain_count(monkeypatch)
    before, calls, said = state(unet), [(inputs(t=[t, t])[:2], {"context": inputs()[2]}) for t in STEPS], []

    def progress(done, total, text):
        said.append((done, total, text))
        return not (cancelled and "presets" in text)

    with pytest.raises(TuningCancelled) if cancelled else nullcontext():
        tuned.make(unet, calls, 0.3, checkpoint="x", of="first", progress=progress)
    assert state(unet) == before
    assert all(" left" in text for done, _, text in said if done)
    assert {total for _, total, _ in said} == {said[0][1]}
    assert said[-1][0] <= said[-1][1] - cancelled
