"""What the benchmark of tunings concludes from what it has measured."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("diffusers", reason="needs diffusers")

from benchmarks.tuning import CASES, FIXED, TOLERANCES, Bench, Store


def measured(path, deviation_of, seconds_of) -> Bench:
    """Results of one case, of two pictures: means are 1.5 times what is given, the worst twice."""
    store, name = Store(path / "tuning.json"), CASES[0].name
    names = [*FIXED, *(f"tuned {t}" for t in TOLERANCES)]
    for i in range(2):
        store.get(f"deviations {name}, {i}", lambda i=i: {n: [deviation_of(n) * (1 + i)] for n in names})
    store.get(f"seconds {name}", lambda: {n: [seconds_of(n)] for n in names})
    return Bench(Store(store.path))


def reported(bench: Bench, folder) -> tuple[str, list[dict[str, str]]]:
    """The page, and the rows of the CSV file."""
    page = folder / "page.md"
    page.write_text("<!-- tuning: written by benchmarks.tuning -->\n<!-- end of tuning -->\n")
    bench.report(folder / "tuning.csv", page)
    rows = list(csv.DictReader((folder / "tuning.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(row["tolerance"]) for row in rows] == list(TOLERANCES)
    return page.read_text(encoding="utf-8"), rows


def test_a_tolerance_is_kept_by_the_mean_and_by_the_worst(tmp_path):
    bench = measured(tmp_path, lambda name: 0.0066 if name == "tuned 0.01" else 0.004, lambda name: 0.5)
    assert bench.keeps(CASES[0], "tuned 0.01", 0.01)
    assert not bench.keeps(CASES[0], "tuned 0.005", 0.005)  # mean .006
    assert not bench.keeps(CASES[0], "tuned 0.01", 0.008)  # worst .0132 > .012
    text, rows = reported(bench, tmp_path)
    assert "Of 4 tunings, 3 keep their tolerance" in text
    assert "Of 4 that were timed, fixed settings that keep the same tolerance beat 0." in text
    assert [rows[0][name] for name in ("mean", "worst", "kept")] == ["0.0060", "0.0080", "no"]


def test_fixed_settings_beat_a_tuning_only_if_they_keep_its_tolerance(tmp_path):
    fast = next(iter(FIXED))
    bench = measured(tmp_path, lambda name: 0.01 if name == fast else 0.001, lambda name: 0.3 if name == fast else 0.5)
    text, rows = reported(bench, tmp_path)
    assert "beat 2." in text  # at .03 and .08
    assert [row["fastest fixed settings"] == fast for row in rows] == [False, False, True, True]
    assert "| queries × 1 | 0.50/0.50 | 0.50/0.50 | 0.50/0.30 | 0.50/0.30 |" in text
