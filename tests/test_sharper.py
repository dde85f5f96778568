"""Sections that programs write into pages, and the tables of fidelity where attention is sharper."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (requirements/dev.txt)")

from benchmarks import pages, sharper


def row(method: str, deviation: float, size: tuple[int, int] = (64, 64), **more: float) -> dict:
    return {"method": method, "size": list(size), "deviation": [[deviation, 3 * deviation]], **more}


def test_sections_replace_what_was_there():
    page = "a\n<!-- table: written by me -->\nold\n<!-- end of table -->\nb\n"
    assert pages.filled(page, "me", {"table": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="figures"):
        pages.filled(page, "me", {"figures": "new"})
    with pytest.raises(ValueError, match="somebody"):
        pages.filled(page, "somebody", {"table": "new"})


def test_methods_that_every_run_has_are_compared():
    runs = [
        [row("corrected", 0.001 * factor, picture_deviation=0.1 * factor), row("corrected, two levels", 1.0)]
        for factor in sharper.FACTORS
    ]
    runs[0].append(row("pooled", 0.5))
    runs[0].append(row("corrected", 9.0, (96, 96)))
    lines = sharper.sharper(runs).splitlines()
    assert lines[2:] == [
        "| corrected | 0.0020 (0.0030) | 0.0080 (0.0120) | 0.0160 (0.0240) | 0.1000 | 0.4000 | 0.8000 |"
    ]


def test_one_level_stands_beside_two():
    runs = [
        [row("local", 0.01, (96, 128)), row("local, two levels", 0.01 * factor, (96, 128))]
        for factor in sharper.FACTORS
    ]
    lines = sharper.levels(runs).splitlines()
    assert lines[0] == "| latent | tokens, levels 0 and 1 | queries | local | + level 1 |"
    assert lines[3] == "| 128×96 | 12288, 3072 | × 4 | 0.0200 (0.0300) | 0.0800 (0.1200) |"
    assert len(lines) == 5
    assert len(sharper.levels([runs[0], [], runs[2]]).splitlines()) == 4
