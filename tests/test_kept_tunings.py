"""Tunings of a checkpoint, as the panel shows, forgets, exports and imports them: a table and a chart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from blocks import golden_unet
from tuned_models import KEPT

from agentsd import Tuning
from agentsd.app import tuning_chart as chart
from agentsd.app.kept_tunings import PanelTunings, Store
from agentsd.tuning.fingerprint import ordered_sites, structure_of, weights_of
from agentsd.tuning.replay import Compared

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
    names = {"name": "a checkpoint", "shorthash": "6ce0161689"}
    told = {"checkpoint": lambda what="name": names[what], "unet": lambda: UNET}
    return SimpleNamespace(tunings=store, small=small, large=large, cache=kept, **told)


@pytest.fixture
def panel(program):
    return PanelTunings(program)


def test_they_are_shown_the_newest_first_and_forgotten_one_by_one_or_all(program, panel):
    first, hires = "First pass, 512×512", "Hires pass, 1024×768"
    assert panel.titles() == [hires, first]
    assert "lora x" in panel.results()
    assert program.tunings.find("a checkpoint", "img2img", (64, 64)) == program.small, "the first pass's does"
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
    assert panel.forget() == "2 tunings of a checkpoint forgotten."
    assert all(key.startswith("another|") for key in program.cache)


# The table and the chart


def drawn(kept=KEPT):
    return ElementTree.fromstring(chart.chart(kept.tuning, kept.presets))


def test_the_table_shows_what_was_found_and_promises_nothing_where_nothing_changes():
    shown = chart.table([KEPT])
    cells = ("First pass", "512×512", "lora detail 0.8", "400 → 250\u00a0ms", "1.60× measured", "2%", "1.7% measured")
    assert all(f"<td>{cell}</td>" in shown for cell in cells)
    assert chart.row(KEPT)[chart.HEAD.index("Peak memory")] == "–"
    tuning = replace(KEPT.tuning, peak_full=3100 * 2**20, plan=replace(KEPT.tuning.plan, peak=2900 * 2**20))
    assert "<td>3100 → 2900\u00a0MiB</td>" in chart.table([replace(KEPT, tuning=tuning)])
    row = dict(zip(chart.HEAD, chart.row(replace(KEPT, tuning=KEPT.tuning.at(0.001))), strict=True))
    assert (row["Speed"], row["U-Net call"]) == ("nothing is faster within 0.1%", "–")


def test_the_chart_shows_what_was_found():
    place = {kind: [] for kind in ("chosen", "plan", "preset")}
    for dot in drawn().iter("circle"):
        place[dot.get("class").rsplit("-", 1)[1]].append((float(dot.get("cx")), float(dot.get("cy"))))
    (chosen,), (plan,), (fast, paper) = place.values()
    assert plan[0] < chosen[0] < paper[0] < fast[0], "the further right, the less close"
    assert chosen[1] < fast[1] < plan[1] < paper[1], "the higher, the faster"
    assert all(0 <= x <= 500 and 0 <= y <= 250 for x, y in [chosen, plan, fast, paper])
    texts = {text.text: text for text in drawn().iter("text")}
    assert {"Fast", "Paper", "0.5%: 1.14× expected", "2%: 1.60× measured", "speed, without = 1×"} <= texts.keys()


def test_each_label_has_a_line_from_its_dot_and_none_covers_another():
    """As where presets are equally close: letters are about 6 wide and 11 high."""
    near = {name: Compared(0.2, 0.8 - 0.01 * i) for i, name in enumerate(("SDXL", "Balanced", "Fast"))}
    near |= {"Faithful": Compared(0.018, 0.6), "Paper": Compared(0.3, 1.1)}
    svg = drawn(replace(KEPT, presets=near))
    labels = [text for text in svg.iter("text") if text.text in near or ":" in text.text]
    assert len(labels) == 7
    ys = [float(label.get("y")) for label in labels]
    assert all(0 <= a <= b - 11 <= 239 for a, b in pairwise(ys))
    assert all(float(label.get("x")) + 6 * len(label.text) < 500 for label in labels)
    leaders = [line.get("points").split() for line in svg.iter("polyline") if line.get("class").endswith("leader")]
    circles = zip(near, svg.iter("circle"), strict=False)  # those of plans come behind
    dots = {preset: f"{dot.get('cx')},{dot.get('cy')}" for preset, dot in circles}
    for label, (begin, *_, end) in zip(labels, leaders, strict=True):
        assert abs(float(end.split(",")[1]) - float(label.get("y"))) < 6
        assert begin == dots.get(label.text, begin)


def test_each_size_has_its_chart_the_newest_is_unfolded_and_names_are_escaped():
    hires = replace(KEPT, of="hires", tuning=replace(KEPT.tuning, size=(128, 96), notes=("<busy>",)))
    hires = replace(hires, checkpoint="<b>&", presets={"<i>": Compared(0.0, 1.0)})
    shown = chart.html([hires, KEPT])
    assert 'data-pass="hires" data-size="768×1024" open><summary>Hires pass, 768×1024' in shown
    assert 'data-pass="first" data-size="512×512"><summary>' in shown
    assert all(f"&lt;{name}&gt;" in shown and f"<{name}>" not in shown for name in ("busy", "b", "i"))
    assert "Nothing is tuned" in chart.html([])


def test_a_file_of_its_own_and_a_tuning_without_measurements():
    ElementTree.fromstring(chart.standalone(chart.chart(KEPT.tuning, {})))
    assert chart.chart(replace(KEPT.tuning, frontier=()), {}) == ""
