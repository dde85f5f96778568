"""Is it faster here? Measured in passes that are made anyway, kept, and acted on; with clocks of the test's own."""

import re

import pytest
import torch
from blocks import inputs, run
from fake_webui import Processing, Sampler, fake_host, fake_unet, generate_like, state  # noqa: F401 - fixtures

from agentsd.app.timings import SECTION, StepClock, Timing, Timings
from agentsd.panel.routes import Routes
from agentsd.settings import infotext

ON = {"min_tokens": 0, "until": 1.0}
STATE = {"tab": "txt2img", "width": 128, "height": 128, "steps": 4, "batch_size": 1, "denoising": 0.5}
STATE |= {"hires": None, "overrides": []}


class Clock:
    """A clock that says how long work takes: ours, and the host's."""

    def __init__(self, ours, hosts):
        self.seconds, self.runs = (ours, hosts), 0

    def timed(self, run, device):
        self.runs += 1
        return run(), self.seconds[(self.runs + 1) % 2]


@pytest.fixture(autouse=True)
def left_alone_where_slower(host, monkeypatch):
    host.shared.opts.agent_attention_even_if_slower = False
    monkeypatch.setattr(infotext, "_PASTED", set())


@pytest.fixture
def card(host, monkeypatch):
    """The U-Net is on an accelerator, whose clock is the test's."""
    monkeypatch.setattr(host.session, "_is_cpu", lambda unet: False)

    def put(ours, hosts):
        clock = Clock(ours, hosts)
        monkeypatch.setattr(type(host.session.compat.HOST), "clock", clock)
        return clock

    return put


def line(host, settings=ON, **more):
    """The preview's line of the first pass."""
    return Routes(host.session.compat.HOST).preview({**STATE, **more, "values": settings})["lines"][0]


def made(host, settings=ON, **more):
    """An image: what its pass came to."""
    p = generate_like(host, {**STATE, **more}, settings)
    (told,) = host.session.STATUS.as_dict()["passes"]
    return told, p


def is_changed(told):
    return bool(set(told["calls"]) - {"untouched"})


class TestOnACard:
    def test_the_first_pass_times_its_layers_and_those_after_it_know(self, host, unet, card):
        clock, before, calls = card(0.001, 0.003), state(unet), []
        handle = unet.register_forward_pre_hook(lambda *given: calls.append(1))
        assert "measured" not in line(host)["text"]
        assert is_changed(made(host)[0])
        timed = clock.runs
        assert timed > 0
        assert len(calls) == 4, "no call is made for it"
        assert re.search(r"measured here: self-attention \d+ → [\d.]+ ms per U-Net call", line(host)["text"])
        assert is_changed(made(host)[0])
        assert clock.runs == timed, "it is measured once"
        handle.remove()
        assert state(unet) == before

    def test_where_ours_is_slower_later_passes_are_left_alone_and_say_so(self, host, unet, card):
        card(0.004, 0.002)
        told, p = made(host)
        assert is_changed(told), "the first image is made with agents, as ever"
        said = line(host)
        assert said["text"].endswith("nothing happens.")
        words = r"Measured to be slower here: self-attention (\d+) → (\d+) ms per U-Net call\. Change “Settings → Agent"
        without, with_ = map(int, re.match(words, said["hint"]).groups())
        assert with_ == 2 * without
        told, p = made(host)
        assert not is_changed(told)
        assert told["obstacles"][0] in said["hint"].lower().replace("u-net", "U-Net")
        assert infotext.KEY not in p.extra_generation_params
        assert infotext.KEY not in p.params_txt
        assert "slower here" in p.processed.extra_generation_params[infotext.NOTE]

    def test_other_settings_sizes_batches_and_models_are_measured_by_themselves(self, host, unet, card):
        card(0.004, 0.002)
        made(host)
        assert not is_changed(made(host)[0])
        for settings, more in (({**ON, "agent_ratio": 0.9}, {}), (ON, {"width": 192}), (ON, {"batch_size": 2})):
            assert is_changed(made(host, settings, **more)[0])
        host.shared.sd_model.sd_checkpoint_info.name = "other.safetensors"
        assert is_changed(made(host)[0])

    def test_whoever_wants_it_all_the_same_has_it(self, host, unet, card):
        card(0.004, 0.002)
        made(host)
        for wanted in (True, False):
            host.shared.opts.agent_attention_even_if_slower = wanted
            assert is_changed(made(host)[0]) == wanted
            assert ("measured here" in line(host)["text"]) == wanted
        # for one image, as an API call's override settings or the page's
        once = {"overrides": ["agent_attention_even_if_slower: True"]}
        assert is_changed(made(host, **once)[0])
        assert "measured here" in line(host, **once)["text"]

    def test_the_settings_of_an_infotext_make_its_image_again(self, host, unet, card):
        card(0.004, 0.002)
        first, p = made(host)
        written = {infotext.KEY: p.extra_generation_params[infotext.KEY]}
        assert not is_changed(made(host)[0])
        pasted = {name: infotext.reader(name)(written) for name in ("enabled", *ON)}
        assert pasted == {"enabled": True, **ON}
        again, p = made(host, pasted)
        assert again["calls"] == first["calls"]
        assert p.extra_generation_params.items() >= written.items()
        assert "Slower than without; measured here" in line(host, pasted)["text"], "and the preview knows"

    def test_where_one_pass_was_left_alone_the_entry_names_the_other(self, host, unet, card):
        """Elsewhere both would be patched, and the image another one."""
        state = {**STATE, "hires": {"scale": 1.5, "steps": 0}}
        card(0.004, 0.002)
        generate_like(host, state, {**ON, "passes": "hires"})
        card(0.001, 0.002)
        entry = generate_like(host, state, ON).extra_generation_params[infotext.KEY]
        first, hires = host.session.STATUS.passes
        assert (first.patched, hires.patched) == (True, False)
        assert infotext.read(entry)["passes"] == "first"

    def test_an_image_of_a_batch_has_its_own_entry(self, host, unet, card):
        """The second is left alone, since the first was measured."""
        card(0.004, 0.002)
        entries, p = [], Processing(steps=1)
        host.session.before_process(p)
        host.session.process(p, [ON])
        for p.iteration in range(2):
            host.session.before_batch(p)
            p.sampler = Sampler()
            host.session.before_sampling(p, torch.empty(2, 4, 16, 16))
            p.sampler.launch_sampling(1, lambda: [step(host, unet) for _ in range(2)])
            host.session.after_batch(p)
            entries.append(infotext.KEY in p.extra_generation_params)
        assert entries == [True, False]


def step(host, unet):
    host.session.before_model_call()
    run(unet, inputs())


class TestOnACpu:
    """The seconds of ordinary calls: each takes as long as the test says, with and without."""

    @pytest.fixture
    def took(self, host, unet, monkeypatch):
        from agentsd import get_patch

        seconds, now = {True: 1.0, False: 1.0}, [0.0]
        handle = unet.register_forward_hook(lambda *given: now.append(now[-1] + seconds[get_patch(unet) is not None]))
        monkeypatch.setattr(type(host.session.compat.HOST), "now", staticmethod(lambda: now[-1]))
        yield seconds
        handle.remove()

    def test_runs_with_and_without_tell(self, host, took):
        took[True] = 0.5
        made(host)
        assert "measured" not in line(host)["text"], "without is not known yet"
        generate_like(host, STATE, {"enabled": False})
        assert line(host)["text"].endswith("Expected: 2.00× faster; measured here: 1000 → 500 ms per U-Net call.")

    def test_where_it_is_slower_it_is_left_alone_until_that_changes(self, host, took):
        took[True] = 1.5
        for _ in range(6):
            generate_like(host, STATE, {"enabled": False})
        made(host)
        assert "Measured to be slower here: 1000 → 1500 ms per U-Net call" in line(host)["hint"]
        took[False] = 2.0  # a busier machine, say
        outcomes = [is_changed(made(host)[0]) for _ in range(4)]
        assert (outcomes[0], outcomes[-1]) == (False, True), "the last runs without count"

    def test_noise_is_no_verdict(self, host, took):
        took[True] = 1.04
        generate_like(host, STATE, {"enabled": False})
        made(host)
        assert is_changed(made(host)[0])

    def test_a_pass_with_both_is_enough(self, host, took, monkeypatch):
        """Where agents end early, one pass has calls with and without."""

        settings, took[True] = {**ON, "until": 0.5}, 0.5
        made(host, settings, steps=8)
        assert "in 4 of 8 steps. No gain in time is expected; measured here" in line(host, settings, steps=8)["text"]
        for _ in range(3):
            generate_like(host, STATE, {"enabled": False})
        assert "Expected: 1.33× faster; measured here: 1000 → 500 ms" in line(host, settings, steps=8)["text"]

    def test_what_others_change_is_not_taken_for_full_attention(self, host, took):
        host.shared.opts.hypertile_enable_unet = True
        generate_like(host, STATE, {"enabled": False})
        made(host)
        assert not host.cache.get(SECTION)


def test_what_is_damaged_in_the_cache_counts_as_absent():
    for damaged in (None, "text", {}, [1], ["a", "b"], [0.0], [0.0, 1.0]):
        kept = {"case without calls": damaged, "case without layers": damaged}
        assert Timings({SECTION: kept}.get).find(("case", "")) is None


def test_figures_are_told_in_digits_that_differ():
    assert Timing(0.33, 0.41).words() == "410 → 330 ms per U-Net call"
    assert Timing(0.0012, 0.0034, layers=True).words() == "self-attention 3.4 → 1.2 ms per U-Net call"
    times = iter([0.0, 9.0, 10.0, 11.0, 13.0, 15.5])
    clock = StepClock(lambda: next(times))
    assert clock.pace().last_words() == "", "no call, no pace"
    for count in (0, 5, 10, 15, 15, 15):
        clock.lap(count)
    assert clock.pace().last_words() == "1.00 s per U-Net call with, 2.25 s without"
    found = [Timing(*seconds).slower for seconds in ((1.2, 1.0), (1.01, 1.0), (1.0, None), (None, None))]
    assert found == [True, False, False, False]
