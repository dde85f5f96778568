"""Tunings of a checkpoint, as the panel shows, forgets, exports and imports them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from blocks import golden_unet
from tuned_models import KEPT

from agentsd import Tuning
from agentsd.app.kept_tunings import PanelTunings, Store
from agentsd.tuning.fingerprint import ordered_sites, structure_of, weights_of

UNET = golden_unet()
SITES = ordered_sites(UNET)


@pytest.fixture
def program():
    """A program that shows the panel, with two tunings of a checkpoint and one of another."""
    kept, plan = {}, replace(KEPT.tuning.plan, choices=("a" * len(SITES),))
    made_on = {
        "structure": structure_of(SITES),
        "weights": weights_of(UNET),
        "conditions": {"pass": "hires", "lora": "x"},
    }
    tuning = replace(KEPT.tuning, since=(0.0,), plan=plan, frontier=(plan,), **made_on)
    store, small = Store(lambda section: kept), replace(KEPT, tuning=tuning)
    large = replace(KEPT, of="hires", tuning=replace(tuning, size=(96, 128)), made=2.0)
    for one in (small, large, replace(small, checkpoint="another")):
        store.put(one)
    told = {"checkpoint": lambda: "a checkpoint", "checkpoint_hash": lambda: "6ce0161689", "unet": lambda: UNET}
    return SimpleNamespace(tunings=store, small=small, large=large, cache=kept, **told)


@pytest.fixture
def panel(program):
    return PanelTunings(program)


def test_they_are_shown_the_newest_first_and_forgotten_one_by_one_or_all(program, panel):
    first, hires = "First pass, 512×512", "Hires pass, 1024×768"
    assert panel.titles() == [hires, first]
    assert "lora x" in panel.results()
    assert panel.forget(first) == "1 tuning of a checkpoint forgotten."
    assert "no such tuning" in panel.forget(first)
    assert panel.titles() == [hires]
    panel.forget()
    assert panel.titles() == []
    assert program.tunings.find("another", "first", (64, 64)) is not None


def test_a_file_is_named_by_checkpoint_and_size_and_comes_back(program, panel):
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
def test_what_does_not_fit_is_not_imported_and_says_why(program, panel, tmp_path, damage, said):
    path, before = tmp_path / "a.json", panel.titles()
    path.write_text("{}") if damage is None else damage(program.small.tuning).save(path)
    told = panel.load(str(path))
    assert told.startswith("Not imported: ")
    assert said in told
    assert panel.titles() == before


def test_what_is_damaged_in_the_cache_counts_as_absent(program, panel):
    program.cache["a checkpoint|first|64x64"] = {"of": "first"}
    assert panel.titles() == ["Hires pass, 1024×768"]
