"""Tuning of the tests' models, whose layers are too small for any gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentsd import Tuning, TuningCancelled
from agentsd.app.kept_tunings import Kept
from agentsd.schedule import Block
from agentsd.tuning import probe, replay, tuner
from agentsd.tuning.fingerprint import ordered_sites, structure_of, weights_of
from agentsd.tuning.record import progress_of
from agentsd.tuning.result import Deviation, TunedPlan

TRY = ({"method": "corrected", "agent_ratio": 0.75}, {"method": "pool", "sx": 2, "sy": 2})

# A plan, and a tuning with it
TEXT = "tuning 1 64x64 0.02 12345678 | method=corrected agent_ratio=0.95 | 0.0 a..a | 0.5 aaaa"
PLAN = TunedPlan(0.02, ("a..a", "aaaa"), (Deviation(0.1, 0.015, 0.017),), 0.625, True)
TUNING = replace(
    Tuning.from_text(TEXT),
    plan=PLAN,
    seconds_full=0.4,
    frontier=(TunedPlan(0.005, ("a...", "...."), (Deviation(0.1, 0.004),), 0.875), PLAN),
    conditions={"pass": "first", "lora": "detail 0.8"},
)
KEPT = Kept(
    "a checkpoint", "first", TUNING, {"Fast": replay.Compared(0.2, 0.7), "Paper": replay.Compared(0.05, 1.1)}, 1.0
)


def quick_tune(unet, calls, tolerance, *, methods=None, progress=None, kv_context=None, conditions=None):
    """A tuning that takes no time: the first of `methods`, in more blocks the larger the tolerance."""
    if progress is not None and progress(1, 10, "Trying the methods in every block") is False:
        raise TuningCancelled("cancelled after 1 model calls")
    sites = ordered_sites(unet)

    def plan(number: int, within: float) -> TunedPlan:
        choices = "a" * (number + 1) + "." * (len(sites) - number - 1)
        deviation = Deviation(0.5, 0.9 * within, 0.8 * within if within == tolerance else None)
        return TunedPlan(within, (choices,), (deviation,), 0.9 - 0.1 * number, within == tolerance)

    frontier = tuple(plan(number, each) for number, each in enumerate(sorted({0.005, 0.05, tolerance})))
    return Tuning(
        size=tuple(calls[0][0][0].shape[-2:]),
        candidates=tuple(methods or ({"method": "pool", "sx": 2, "sy": 2},))[:1],
        since=(0.0,),
        plan=next(each for each in frontier if each.tolerance == tolerance),
        structure=structure_of(sites),
        weights=weights_of(unet),
        blocks=tuple(Block(site.name, site.downsample) for site in sites),
        frontier=frontier,
        seconds_full=1.0,
        covers=(min(map(progress_of, calls)), 1.0),
        conditions=conditions or {},
    )


def make_every_gain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which every method is faster than full attention, and a plan by a fifth."""

    def seconds(self, name):
        """The more is left out, the less it takes."""
        return {0: 0.1, **{k: 0.05 - 0.001 * k for of, k in self.ratios if of == self.kinds.get(name)}}

    def call(self, number, text, config=None, original=replay.Replay.call):
        return original(self, number, text, config)[0], 1.0 if config is None else 0.8

    monkeypatch.setattr(probe.Probe, "seconds", seconds)
    monkeypatch.setattr(replay.Replay, "call", call)
    monkeypatch.setattr(probe, "MAX_TIME_TRIED", float("inf"))
    monkeypatch.setattr(tuner, "MIN_SHARE_OF_SAVING", 0.0)
