"""How far the diffusion is, where the timestep is no training step from 1000 to 0."""

import logging
import math

import pytest
import torch

import agentsd
from agentsd import Rule, get_patch, progress_of_sigma
from agentsd.schedule import Timesteps, progress_of, progress_of_edm, progress_of_flow

D = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from kinds import CORRECTED  # noqa: E402
from tiny_pipelines import picture, run, tiny_sd, tiny_unet  # noqa: E402

# The middle of the diffusion, and the σ that Stable Diffusion has there
HALF = 0.5
SIGMA_AT_HALF = 1.6183
FULL = Rule(None)


def test_the_noise_of_stable_diffusion_s_schedule_of_edm_and_of_flow():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    for t in (0, 1, 17, 500, 998):
        sigma, expected = float(((1 - kept[t]) / kept[t]).sqrt()), pytest.approx(progress_of(t), abs=1e-9)
        assert progress_of_sigma(sigma) == expected
        assert progress_of_edm(math.log(sigma) / 4) == expected
        assert progress_of_flow(1000 * sigma / (1 + sigma)) == expected
    assert progress_of_sigma(SIGMA_AT_HALF) == pytest.approx(HALF, abs=1e-4)
    assert (progress_of_sigma(0), progress_of_sigma(80), progress_of_sigma(math.inf)) == (1, 0, 0)
    assert (progress_of_flow(1000), progress_of_flow(0)) == (0, 1)
    assert progress_of_edm(981) == progress_of(981)  # another scheduler since


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([999, 500, 1, 0.3, 0], [0.001, 0.5, 0.999, 0.9997, 1]),
        ([999, 20, 980, 0.3], [0.001, 0.98, 0.02, 0.9997]),
        ([0], [1]),
        ([1.09, 0.7, 0.0, 0.0, -1.5], [None] * 5),  # EDM
        ([1.0, 0.9, 0.0], [None] * 3),  # flows of 0 to 1
        ([1095, 790, 420, -48], [None] * 4),  # consistency models
        ([math.nan, 900], [None, 0.1]),
        ([1.09, -1.5, 981], [None, None, 0.019]),  # another scheduler since
    ],
)
def test_training_steps_or_nothing(timesteps, expected):
    seen = Timesteps()
    assert [seen.progress(t) for t in timesteps] == pytest.approx(expected)


def halves(model, steps, **more):
    """For each half of the diffusion: at which of the timesteps agents acted; and the notes."""
    for since, until in ((0.0, HALF), (HALF, 1.0)):
        rules = [FULL, Rule({"method": "corrected"}, since=since, until=until)]
        agentsd.apply_patch(model, **CORRECTED, rules=rules, **more)
        patch, acted = get_patch(model), []
        for t in steps:
            run(getattr(model, "unet", model), timestep=torch.as_tensor(t))
            acted.append(any("corrected" in layer.calls for layer in patch.report()))
            for layer in patch._layers:
                layer.calls.clear()
        yield acted, dict(patch.notes)


def test_edm_s_timesteps_are_refused_once_for_the_run_unless_the_caller_tells(caplog):
    scheduler = D.EDMDPMSolverMultistepScheduler()
    scheduler.set_timesteps(12)
    with caplog.at_level(logging.INFO, "agentsd"):
        for acted, notes in halves(tiny_unet(), scheduler.timesteps):
            assert not any(acted)
            assert list(notes.values()) == [12]
    assert len(caplog.records) == 2  # a patch each
    assert all("progress" in record.getMessage() for record in caplog.records)
    early = [float(sigma) > SIGMA_AT_HALF for sigma in scheduler.sigmas[:-1]]
    told = halves(tiny_unet(), scheduler.timesteps, progress=lambda t: progress_of_sigma(math.exp(4 * t)))
    assert [*told] == [(early, {}), ([not each for each in early], {})]
    assert 2 < sum(early) < 10


@pytest.mark.parametrize("progress", [lambda t: 1 / 0, lambda t: "half"])
def test_a_callback_that_fails_costs_no_image(progress):
    for acted, notes in halves(tiny_unet(), [900, 100], progress=progress):
        assert not any(acted)
        assert list(notes.values()) == [2]


KARRAS = {"prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 80}
DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "algorithm_type": "dpmsolver++"}
SCHEDULERS = {
    "EDM": lambda: D.EDMEulerScheduler(),
    "continuous": lambda: D.EulerDiscreteScheduler(timestep_type="continuous", **KARRAS),
    "flow": lambda: D.FlowMatchEulerDiscreteScheduler(),
    "flow by sigmas": lambda: D.DPMSolverMultistepScheduler(**DPM),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_s_scheduler_says_it(name):
    pipe = tiny_sd()
    pipe.scheduler = SCHEDULERS[name]()
    pipe.scheduler.set_timesteps(12)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[: len(pipe.scheduler.timesteps)]]
    if "flow" in name:
        sigmas = [sigma / (1 - sigma) if sigma < 1 else math.inf for sigma in sigmas]
    early = [sigma > SIGMA_AT_HALF for sigma in sigmas]
    assert [*halves(pipe, pipe.scheduler.timesteps)] == [(early, {}), ([not each for each in early], {})]
    assert 1 < sum(early) < 11


def test_svd_is_known_by_its_unet():
    from test_diffusers_models import svd

    unet, call = svd()  # at ln σ / 4 = 0.4
    for until, acts in ((0.3, True), (0.05, False)):
        agentsd.apply_patch(unet, **CORRECTED, rules=[FULL, Rule({"method": "corrected"}, until=until)])
        with torch.no_grad():
            call(unet)
        assert any("corrected" in layer.calls for layer in get_patch(unet).report()) == acts
        assert get_patch(unet).notes == {}


def test_a_tuning_under_edm_has_parts_by_the_noise():
    pipe = tiny_sd()
    pipe.scheduler = D.EDMEulerScheduler()
    with agentsd.record_calls(pipe, moments=3) as calls:
        picture(pipe, steps=10)
    first, middle, last = at = sorted({call.progress for call in calls})
    assert (first, last) == (0, 1)
    assert 0.1 < middle < 0.9
    tuning = agentsd.tune(pipe, calls, 0.5, methods=["pool"])
    assert [d.progress for d in tuning.plan.deviations] == at
    agentsd.apply_patch(pipe, tuning=tuning)
    picture(pipe)
    assert get_patch(pipe).notes == {}


def test_recording_says_why_it_keeps_nothing(caplog):
    with caplog.at_level(logging.INFO, "agentsd"), agentsd.record_calls(unet := tiny_unet()) as calls:
        run(unet, timestep=torch.tensor(1.09))
        run(unet, timestep=torch.tensor(-0.5))
    assert calls == []
    assert len(caplog.records) == 1
