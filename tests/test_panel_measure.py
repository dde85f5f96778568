"""Measuring the U-Net from the panel: on a real LDM U-Net, without a WebUI."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from blocks import golden_unet

from agentsd import get_patch
from agentsd.app import measure
from agentsd.app.preview import SamplingPass
from agentsd.calibration import Calibration
from agentsd.settings import table

GRID = {"agent_source": "grid", "until": 1.0, "min_tokens": 0}
VALUES = table.check(GRID)
HERE = SamplingPass(128, 64)


@pytest.fixture
def unet():
    return golden_unet()


def to_config(values, sampling):
    return table.to_config(values, hires=sampling.hires)


def todo(values=None, *passes):
    return measure.tasks(table.check(values or GRID), passes or (HERE,), to_config)


@contextmanager
def at_rest(unet):
    with torch.no_grad():
        yield unet, None


def finished(job, seconds=60.0):
    end = time.monotonic() + seconds
    while job.as_dict()["state"] == "running" and time.monotonic() < end:
        time.sleep(0.02)
    return job.as_dict()


def test_a_task_for_each_pass_in_which_agents_act():
    hires = SamplingPass(256, 128, 0.5, hires=True)
    first, second = todo({"until": 0.6}, HERE, hires)
    assert (first.sampling, first.progress) == (HERE, 0.3)
    assert (second.sampling, second.progress) == (hires, 0.75)
    assert not todo({"passes": "hires"}, HERE)
    assert not todo({"until": 0.6}, SamplingPass(128, 64, 0.7))
    assert todo({"enabled": False}, HERE), "what is switched off can be measured"


def test_both_are_timed_and_the_unet_is_left_as_it_was(unet):
    before = {name: set(vars(module)) for name, module in unet.named_modules()}
    [task] = todo({"method": "agent", "min_tokens": 0})
    ticks = []
    with torch.no_grad():
        outcome = measure.measure(unet, task, lambda: ticks.append(1))
    assert len(ticks) == 2 * (measure.ROUNDS + 1)
    assert outcome.before > 0
    assert outcome.after > 0
    assert outcome.peak_before is None, "a CPU does not tell"
    assert get_patch(unet) is None
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == before


def test_a_job_tells_its_progress_its_outcome_and_a_threshold(unet):
    job = measure.Job()
    assert job.start(VALUES, todo(), lambda: at_rest(unet)) == ""
    told = finished(job)
    assert (told["state"], told["progress"]) == ("done", 1.0)
    assert told["head"][0] == "Size"
    assert [row[0] for row in told["rows"]] == ["128×64"]
    assert len(told["rows"][0]) == len(told["head"])
    assert all(time > 0 for time in job.times(unet, VALUES, HERE)), "the preview says it too"
    assert job.times(unet, {**VALUES, "ratio": 0.2}, HERE) is None, "of other settings nothing is known"
    assert job.times(unet, VALUES, SamplingPass(64, 64)) is None
    assert job.times(golden_unet(), VALUES, HERE) is None
    assert told["min_tokens"] >= 0
    assert get_patch(unet) is None


def test_a_job_can_be_cancelled_and_is_the_only_one(unet):
    job, reached, go = measure.Job(), threading.Event(), threading.Event()

    @contextmanager
    def slow():
        reached.set()
        go.wait(30)
        with at_rest(unet) as model:
            yield model

    assert job.start(VALUES, todo(), slow) == ""
    assert reached.wait(30)
    assert "is running" in job.start(VALUES, todo(), slow)
    job.cancel()
    go.set()
    told = finished(job)
    assert told["state"] == "cancelled"
    assert not told["rows"]
    assert get_patch(unet) is None


def test_a_job_refuses_while_the_model_is_in_use():
    @contextmanager
    def in_use():
        raise measure.Busy("An image is being generated")
        yield

    job = measure.Job()
    job.start(VALUES, todo(), in_use)
    told = finished(job)
    assert (told["state"], told["text"]) == ("busy", "An image is being generated")


def test_a_job_that_fails_says_so(unet):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory left")

    unet.forward = broken
    job = measure.Job()
    job.start(VALUES, todo(), lambda: at_rest(unet))
    told = finished(job)
    assert told["state"] == "failed"
    assert "no memory left" in told["text"]
    assert get_patch(unet) is None


def test_nothing_to_measure_is_said():
    assert "no pass is changed" in measure.Job().start({}, [], None)


def test_a_cancelled_job_stops_in_its_last_seconds_too(unet, monkeypatch):
    monkeypatch.setattr(measure, "CALIBRATION_SECONDS", 300.0)
    job = measure.Job()
    job.start(VALUES, todo(), lambda: at_rest(unet))
    end = time.monotonic() + 60
    while not job.as_dict()["rows"] and time.monotonic() < end:
        time.sleep(0.01)
    assert job.as_dict()["state"] == "running", "single layers are being timed"
    job.cancel()
    assert finished(job, 20)["state"] == "cancelled"
    assert get_patch(unet) is None


def test_the_threshold_does_not_contradict_the_table(unet, monkeypatch):
    """Where the whole U-Net was slower, layers of that size are not said to be faster."""
    real = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *args: replace(real(*args), before=10.0, after=11.0))
    monkeypatch.setattr(measure, "calibrate", lambda *args, **more: Calibration(64, ()))
    job = measure.Job()
    job.start(VALUES, todo(), lambda: at_rest(unet))
    told = finished(job)
    assert "0.91×" in told["rows"][0]
    assert told["min_tokens"] == 16 * 8 + 1, "one more than the largest layers have"
    assert told["text"].startswith("These settings are not faster at 128×64 on this machine")


def test_a_job_knows_whose_panel_shows_it(unet):
    job = measure.Job()
    job.start(VALUES, todo(), lambda: at_rest(unet), "img2img")
    assert finished(job)["tab"] == "img2img"
