"""Tuning of the tests' models, whose layers are too small for any gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentsd import Tuning
from agentsd.app.kept_tunings import Kept, PresetPoint
from agentsd.tuning import probe, replay, tuner
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
KEPT = Kept("a checkpoint", "first", TUNING, (PresetPoint("Fast", 0.2, 1.4), PresetPoint("Paper", 0.05, 0.9)), 1.0)


def make_every_gain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which every method is faster than full attention, and a plan by a fifth."""

    def seconds(self, name):
        """The more is left out, the less it takes."""
        return {0: 0.1, **{k: 0.05 - 0.001 * k for of, k in self.ratios if of == self.trials[name].kind}}

    def call(self, number, text, config=None, original=replay.Replay.call):
        return original(self, number, text, config)[0], 1.0 if config is None else 0.8

    monkeypatch.setattr(probe.Probe, "seconds", seconds)
    monkeypatch.setattr(replay.Replay, "call", call)
    monkeypatch.setattr(probe, "MAX_TIME_TRIED", float("inf"))
    monkeypatch.setattr(tuner, "MIN_SHARE_OF_SAVING", 0.0)
