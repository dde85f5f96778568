"""The command line's `tune` and `--tuning`. Nothing is downloaded."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from drawing import SMALL, pixels, read_record
from PIL import Image

import agentsd
from agentsd.cli import main, pictures
from agentsd.cli.models import bare_unet
from agentsd.schedule import Block
from agentsd.tuning.fingerprint import ordered_sites, structure_of
from agentsd.tuning.result import TunedPlan

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def plan(stand_in, every_gain_counts, capsys):
    """A tuning, in a file, and what was said of it."""
    given = ["--prompt", "a rose", *SMALL, "--steps", "4", "--tolerance", "0.5", "--methods", "pool", "corrected"]
    assert main(["tune", *given, "--moments", "2", "--quiet", "--out", "plan.json"]) == 0
    return capsys.readouterr().out


def test_a_tuning_is_written_with_its_chart_and_drawn_with(stand_in, plan, capsys):
    tuning = agentsd.Tuning.load("plan.json")
    assert (tuning.tolerance, len(tuning.plan.deviations)) == (0.5, 2)
    assert {candidate["method"] for candidate in tuning.candidates} == {"pool", "corrected"}
    assert str(tuning) in plan
    assert "--tuning plan.json" in plan
    dots = [dot.get("class") for dot in ElementTree.parse("plan.svg").iter() if dot.tag.endswith("circle")]
    assert dots.count("agent-attention-chosen") == 1
    assert dots.count("agent-attention-preset") == 5  # Fast, Balanced, Faithful, Paper, SDXL
    given = ["a rose", *SMALL, "--tuning", "plan.json"]
    assert main(["generate", *given, "--seed", "3", "--out", "a.png"]) == 0
    assert "error of attention" in capsys.readouterr().out
    with agentsd.patched(stand_in.unet, tuning=tuning):
        expected = stand_in("a rose", seed=3, steps=2, height=16, width=16)[0]
    assert np.array_equal(pixels(Image.open("a.png")), pixels(pictures.enlarged(expected, 256)))
    assert read_record("a.png")["agent_attention"]["tuning"] == tuning.text
    # over its frontier
    assert main(["sweep", *given, "--x", "tolerance=0,0.5", "--out", "swept"]) == 0
    with Path("swept/sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["tolerance"]) for row in rows[1:]] == [0, 0.5]
    assert float(rows[1]["rmse"]) == 0 < float(rows[2]["rmse"])
    assert agentsd.get_patch(stand_in.unet) is None


def test_another_size_is_told(stand_in, plan, capsys):
    main(["generate", "a rose", "--steps", "2", "--size", "32", "--tuning", "plan.json", "--out", "a.png"])
    assert "tuned for a latent of 16×16: this one is larger" in capsys.readouterr().out
    sites = ordered_sites(bare_unet("embedded")[0])
    blocks = tuple(Block(site.name, site.downsample) for site in sites)
    full = TunedPlan(0.02, ("a" * len(sites),))
    pool = {"method": "pool", "sx": 2, "sy": 2}
    agentsd.Tuning((64, 64), (pool,), (0.0,), full, structure_of(sites), blocks=blocks).save("p.json")
    assert main(["info", "--tuning", "p.json", "--layers", "--size", "48", "64", "96"]) == 0
    smaller, same, larger = capsys.readouterr().out.split("pixels, a latent of")[1:]
    assert "2304 tokens are fewer than the 4096 that were tuned for" in smaller
    assert "pooled, cells of 2×2" in same
    assert "tuned for" not in same
    assert "pooled, cells of 2×2 (tuned for 4096 tokens, the deviation was not measured for 9216)" in larger


def test_what_cannot_be_used_is_a_sentence(stand_in, plan, capsys):
    Path("broken.json").write_text(Path("plan.json").read_text(encoding="utf-8")[:200])
    tuning = json.loads(Path("plan.json").read_text(encoding="utf-8"))["tuning"]
    agentsd.Tuning.from_dict({**tuning, "structure": "00000000"}).save("other.json")
    for given, code, said in (
        (["generate", "--tuning", "none.json"], 1, "none.json cannot be read"),
        (["generate", "--tuning", "broken.json"], 1, "damaged"),
        (["generate", "--tuning", "other.json"], 1, "another model"),
        (["generate", "--tuning", "plan.json", "--sx", "2"], 2, "settings of its own, got sx"),
        (["sweep", "--x", "tolerance=0.01"], 2, "needs --tuning"),
    ):
        assert main([*given, *SMALL, "--", "a rose"]) == code
        assert said in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_ctrl_c_writes_nothing(stand_in, monkeypatch):
    from agentsd.tuning.replay import Replay

    calls = []

    def call(self, number, text, config=None, original=Replay.call):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, number, text, config)

    monkeypatch.setattr(Replay, "call", call)
    assert main(["tune", "--prompt", "a rose", *SMALL, "--moments", "2", "--out", "plan.json"]) == 130
    assert not list(Path().iterdir())
    assert agentsd.get_patch(stand_in.unet) is None
