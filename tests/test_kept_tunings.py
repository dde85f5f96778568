"""Tunings of a checkpoint, as the panel shows, forgets, exports and imports them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from blocks import golden_unet
from tuned_models import KEPT

from agentsd import Tuning
from agentsd.app.kept_tunings import PanelTunings, Store
from agentsd.tuning.fingerprint import ordered_sites, structure_of, weights_of

UNET = golden_unet()
SITES = ordered_sites(UNET)


class Program:
    """A program that shows the panel, with two tunings of a checkpoint."""

    def __init__(self):
        kept = {}
        self.tunings = Store(lambda section: kept)
        plan = replace(KEPT.tuning.plan, choices=("a" * len(SITES),))
        tuning = replace(
            KEPT.tuning,
            since=(0.0,),
            plan=plan,
            frontier=(plan,),
            structure=structure_of(SITES),
            weights=weights_of(UNET),
            conditions={"pass": "hires", "lora": "detail 0.8"},
        )
        self.small = replace(KEPT, tuning=tuning)
        self.large = replace(KEPT, of="hires", tuning=replace(tuning, size=(96, 128)), made=2.0)
        for one in (self.small, self.large, replace(self.small, checkpoint="another")):
            self.tunings.put(one)

    def checkpoint(self):
        return "a checkpoint"

    def checkpoint_hash(self):
        return "6ce0161689"

    def unet(self):
        return UNET


@pytest.fixture
def program():
    return Program()


def test_the_newest_comes_first(program):
    panel = PanelTunings(program)
    assert panel.titles() == ["Hires pass, 1024×768", "First pass, 512×512"]
    assert "lora detail 0.8" in panel.results()


def test_one_is_forgotten_or_all_of_the_checkpoint(program):
    panel = PanelTunings(program)
    assert panel.forget("First pass, 512×512") == "1 tuning of a checkpoint forgotten."
    assert panel.titles() == ["Hires pass, 1024×768"]
    assert "no such tuning" in panel.forget("First pass, 512×512")
    assert panel.titles() == ["Hires pass, 1024×768"]
    panel.forget()
    assert panel.titles() == []
    assert program.tunings.find("another", "first", (64, 64)) is not None


def test_a_file_is_named_by_checkpoint_and_size_and_comes_back(program):
    panel = PanelTunings(program)
    path = Path(panel.export("Hires pass, 1024×768"))
    assert path.name == "6ce0161689-hires-1024x768.tuning.json"
    assert Tuning.load(path) == program.large.tuning, "the library and the command line read it"
    panel.forget()
    assert panel.load(str(path)) == "Imported for a checkpoint: Hires pass, 1024×768."
    assert program.tunings.find("a checkpoint", "hires", (96, 128)).tuning == program.large.tuning
    assert panel.export("gone") is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tuning: replace(tuning, structure="00000000"), "for another model: of 7 blocks"),
        (lambda tuning: replace(tuning, weights="float32:" + "00" * 64), "other weights"),
        (None, "is no tuning, or is damaged"),
    ],
)
def test_what_does_not_fit_is_not_imported_and_says_why(program, tmp_path, damage, said):
    panel, path = PanelTunings(program), tmp_path / "a.json"
    path.write_text("{}") if damage is None else damage(program.small.tuning).save(path)
    before = panel.titles()
    told = panel.load(str(path))
    assert told.startswith("Not imported: ")
    assert said in told
    assert panel.titles() == before


def test_what_is_damaged_in_the_cache_counts_as_absent(program):
    program.tunings._cache()["a checkpoint|first|64x64"] = {"of": "first"}
    assert PanelTunings(program).titles() == ["Hires pass, 1024×768"]
