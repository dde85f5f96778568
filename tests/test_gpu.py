"""The card's benchmark in miniature, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("ldm", reason="needs stable-diffusion-sdkit (requirements/dev-no-deps.txt)")
pytest.importorskip("tomesd", reason="needs tomesd (requirements/dev-no-deps.txt)")

from agentsd.costs import layouts
from agentsd.predict import CARDS, speedup
from benchmarks import gpu, gpu_report, predicted
from benchmarks.cases import DTYPES
from benchmarks.methods import on_largest
from benchmarks.models import LAYOUTS

WORDS = ["--device", "cpu", "--only", "mini", "--sizes", "128", "--dtype", "float32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two runs have written, of one round and of another."""
    out = tmp_path_factory.mktemp("gpu")
    gpu.main([*WORDS, "--rounds", "1", "--out", str(out)])
    gpu.main([*WORDS, "--rounds", "2", "--out", str(out)])
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_every_method_is_timed_in_each_round_and_runs_add_up(results):
    out, _ = results
    (eager,) = [case for case in out["cases"] if case["mode"] == gpu.EAGER]
    assert [set(times) for times in eager["rounds"]] == [set(gpu.FEW) - skipped(out, eager)] * 2
    assert {"sdpa", "grid4", "pool2"} <= set(eager["rounds"][0])
    assert all(seconds > 0 for times in eager["rounds"] for seconds in times.values())
    assert eager["results"]["sdpa"]["speedup"] == 1
    assert eager["results"]["grid4"]["kernels"] > 0


def skipped(out: dict, case: dict) -> set[str]:
    return {s["method"] for s in out["skipped"] if s["case"] == case["case"]}


def test_what_a_cpu_cannot_do_is_said(results):
    out, text = results
    assert any("only CUDA" in s["reason"] for s in out["skipped"])
    assert "only CUDA" in text


def test_sdpa_is_timed_by_class_of_layers(results):
    out, _ = results
    assert [(row["tokens"], row["layers"]) for row in out["attention"]] == [(256, 5), (64, 5), (16, 5), (4, 1)]


def test_it_ends_with_a_short_table(results):
    _, text = results
    short = text[text.index("**In short**") :]
    assert "| grid4 |" in short
    assert short.rstrip().endswith("|")


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    gpu.main([*WORDS, "--minutes", "0", "--out", str(tmp_path)])
    assert [case["rounds"] for case in json.loads((tmp_path / "gpu.json").read_text())["cases"]] in ([], [[]], [[], []])


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({512: 0.9, 1024: 1.1, 2048: 1.5}, "1024²"),
        ({512: 1.1, 1024: 1.0, 2048: 1.5}, "2048²"),
        ({512: 1.2, 1024: 1.3}, "512²"),
        ({512: 0.9}, "–"),
        ({}, "–"),
    ],
)
def test_from_which_size_a_method_pays(ratios, expected):
    assert gpu_report._pays_from(ratios) == expected


class TestThePredictionBeside:
    """What was predicted stands beside what was measured, on a card of known rates."""

    @staticmethod
    def rows(device, layout="sd15", mode="eager"):
        results = {
            name: {"label": on_largest(1)[name].label, "peak": 0, "seconds": 0.01, "speedup": 1.0, "rounds": 1}
            for name in ("sdpa", "grid4", "idle")
        }
        case = {"case": "a case", "layout": layout, "side": 512, "dtype": "float16", "batch": 2, "mode": mode}
        runs = [{"date": "today"}]
        out = {"machine": {"device": device, "torch": "2", "code": "1"}, "runs": runs, "skipped": []}
        text = gpu_report.markdown({**out, "cases": [{**case, "results": results, "rounds": [{}]}]})
        table = [line for line in text.partition("**In short**")[0].splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]

    def test_on_a_known_card(self):
        head, _, *rows = self.rows("NVIDIA GeForce RTX 4090")
        grid = predicted.METHODS["grid agents, 4×4 cells"]
        expected = speedup(CARDS[1], layouts()["SD 1"], grid, 64, 64)
        assert head[-1] == "predicted"
        assert [row[-1] for row in rows] == ["–", f"{expected:.2f}×", "–"]

    @pytest.mark.parametrize(
        ("device", "layout", "mode"), [("cpu", "sd15", "eager"), ("NVIDIA GeForce RTX 4090", "sd15", "graph")]
    )
    def test_nowhere_else(self, device, layout, mode):
        assert {len(row) for row in self.rows(device, layout, mode)} == {6}

    def test_not_for_other_u_nets(self):
        assert {row[-1] for row in self.rows("NVIDIA H200", "mini")[2:]} == {"–"}


def test_the_plan_knows_its_methods_and_begins_with_the_main_table():
    cases = gpu.plan(("sd15", "sdxl"))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.methods) <= set(on_largest(LAYOUTS[case.layout].downsample))
        assert case.dtype in DTYPES
    assert {(case.layout, case.side) for case in cases[:8]} == {
        ("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("sdxl", 2048)
    }  # fmt: skip
    assert {case.side for case in cases if case.layout == "sdxl"} == {1024, 1536, 2048}
    assert {case.mode for case in cases} == {gpu.EAGER, gpu.GRAPH, gpu.COMPILED}


def test_the_core_s_tests_are_those_of_the_core():
    files = gpu.core_tests()
    assert {"tests/test_patch_layers.py", "tests/test_compile.py", "tests/test_corrected.py"} <= set(files)
    assert not [file for file in files if "panel" in file or "cli" in file or "webui" in file]


def test_tiles_are_full_attention_within_tiles():
    method = on_largest(1)["tiles"]
    from benchmarks.models import build, call, make_inputs

    unet = build(LAYOUTS["mini"], torch.device("cpu"), torch.float32)
    given = make_inputs(LAYOUTS["mini"], (128, 128), 1, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        plain = call(unet, given, 500.0)
        with method.install(unet):
            tiled = call(unet, given, 500.0)
    assert tiled.shape == plain.shape
    assert not torch.allclose(tiled, plain, atol=1e-4)
