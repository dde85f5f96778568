"""The speed benchmarks: rounds add up over several runs, methods leave no trace, results reach the page."""

from __future__ import annotations

import csv
import json

import pytest
import torch

pytest.importorskip("ldm", reason="needs stable-diffusion-sdkit (requirements/dev-no-deps.txt)")
pytest.importorskip("tomesd", reason="needs tomesd (requirements/dev-no-deps.txt)")

from benchmarks import bench, gpu, measure, pages, results
from benchmarks.machine import DTYPES, Machine
from benchmarks.methods import methods
from benchmarks.models import LAYOUTS, build, call, make_inputs

CPU = torch.device("cpu")
MACHINE = {"device": "cpu", "processor": "a processor", "threads": 1, "torch": "2", "code": "abc"}
RUN = {"date": "2026-01-01T00:00:00+00:00", "revision": "abc"}
SMALL = ["--layouts", "mini", "--sizes", "64", "--methods", "sdpa", "limit"]


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return build(LAYOUTS["mini"], CPU, torch.float32)


@pytest.fixture(scope="module")
def inputs() -> dict:
    return make_inputs(LAYOUTS["mini"], (128, 128), 2, CPU, torch.float32)


def an_entry(**rounds: list[float | None]) -> dict:
    """A case with the seconds of each method, round by round; None where a method was left out."""
    count = max(map(len, rounds.values()))
    seconds = [{name: times[i] for name, times in rounds.items() if times[i] is not None} for i in range(count)]
    costs = {name: {"label": name, "kernels": 1, "peak": 0} for name in rounds}
    about = {"layout": "sd15", "size": [512, 512], "dtype": "bfloat16", "batch": 2, "mode": "eager"}
    return {"case": "a case", **about, "rounds": seconds, "results": costs}


def measured(case: measure.Case, tmp_path, **limits: float) -> tuple[list[dict], list[dict]]:
    machine = Machine(CPU, **limits)
    found = results.Results(tmp_path / "a", MACHINE, RUN)
    with torch.inference_mode():
        measure.Bench(machine, found).measure(case)
    return found.entry(case)["rounds"], machine.skipped


def test_ratios_are_medians_of_the_ratios_within_a_round():
    entry = an_entry(sdpa=[10.0, 20.0, 12.0], limit=[6.0, 12.0, 8.0], grid8=[7.0, 14.0, 8.0], tomesd=[8.0, None, None])
    results.summarise(entry)
    grid, tomesd = entry["results"]["grid8"], entry["results"]["tomesd"]
    assert grid["speedup"] == pytest.approx(10 / 7)
    assert grid["captured"] == pytest.approx(0.75)  # of 0.75, 0.75 and 1
    assert (tomesd["rounds"], tomesd["seconds"], tomesd["captured"]) == (1, 8.0, pytest.approx(0.5))


def test_nothing_is_captured_of_a_limit_within_the_noise():
    entry = an_entry(sdpa=[10.0], limit=[9.9], grid8=[9.8])
    results.summarise(entry)
    assert entry["results"]["grid8"]["captured"] is None


def test_rounds_of_two_runs_add_up_and_reach_the_page(tmp_path, monkeypatch):
    bench.main([*SMALL, "--rounds", "1", "--out", str(tmp_path / "out")])
    first = json.loads((tmp_path / "out/bench.json").read_text())
    bench.main([*SMALL, "--rounds", "3", "--resume", f"--out={tmp_path / 'out'}"])
    text = (tmp_path / "out/bench.json").read_text()
    both = json.loads(text)
    (case,) = both["cases"]
    assert case["rounds"][0] == first["cases"][0]["rounds"][0]
    assert [len(times) for times in case["rounds"]] == [2, 2, 2]
    assert (tmp_path / "out/bench.md").read_text().count("| 3 |\n") == 2
    with (tmp_path / "out/bench.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["width"], row["rounds"]) for row in csv.DictReader(file)] == [("64", "3")] * 2
    # no path of the machine is published
    assert str(tmp_path) not in text
    assert [run["arguments"][-1] for run in both["runs"]] == ["out", "--out=out"]


@pytest.mark.parametrize("name", ["threads", "code", "torch"])
def test_what_was_measured_elsewhere_is_not_resumed(tmp_path, name):
    results.Results(tmp_path / "bench", MACHINE, RUN).write()
    with pytest.raises(results.ResumeError, match=name):
        results.Results(tmp_path / "bench", {**MACHINE, name: "other"}, RUN, resume=True)


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    rounds, _ = measured(measure.Case("mini", (64, 64), ("sdpa",), dtype="float32"), tmp_path, deadline=0.0)
    assert rounds == []


def test_a_method_that_stands_down_is_no_result(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("agentsd.attention.agent.agent_attention", failing)
    case = measure.Case("mini", (64, 64), ("sdpa", "grid4"), dtype="float32", rounds=1)
    rounds, skipped = measured(case, tmp_path)
    assert [list(times) for times in rounds] == [["sdpa"]]
    assert "no such kernel" in skipped[0]["reason"]


@pytest.mark.parametrize("name", methods())
def test_methods_change_the_u_net_and_leave_no_trace(unet, inputs, name):
    with torch.inference_mode():
        before = call(unet, inputs, 500.0)
        with methods()[name].install(unet) as check:
            within = call(unet, inputs, 500.0)
            check()
        after = call(unet, inputs, 500.0)
    assert torch.equal(before, after)
    # the panel's defaults leave layers as small as these alone
    assert torch.allclose(before, within, atol=1e-4) == (name in ("sdpa", "idle", "naive", "panel"))


def test_all_cases_know_their_methods():
    for case in [*(case for cases in bench.PRESETS.values() for case in cases), *gpu.plan(("sd15", "sdxl"))]:
        assert set(case.methods) <= set(methods())
        assert case.layout in LAYOUTS
        assert case.dtype in DTYPES
    planned = gpu.plan(("sd15", "sdxl"))
    assert len({case.name for case in planned}) == len(planned)
    assert {case.size[0] for case in planned if case.layout == "sdxl"} == {1024, 1536, 2048}
    assert {case.mode for case in planned} == {measure.EAGER, measure.GRAPH, measure.COMPILED}


def test_sizes_are_written_width_first(capsys):
    options = bench.make_parser().parse_args(["--sizes", "128x64", "192"])
    cases = bench.choose_cases(options)
    assert [case.size for case in cases] == [(64, 128), (192, 192)]
    assert "128×64" in cases[0].name
    with pytest.raises(SystemExit):
        bench.main(["--sizes", "500"])
    assert "multiples of 64" in capsys.readouterr().err


def test_sections_replace_what_was_there():
    page = "a\n<!-- table: written by me -->\nold\n<!-- end of table -->\nb\n"
    assert pages.filled(page, "me", {"table": "new"}) == page.replace("old", "new")
    for by, name in (("me", "figures"), ("somebody", "table")):
        with pytest.raises(ValueError, match=by):
            pages.filled(page, by, {name: "new"})


def test_the_page_of_figures_has_a_place_for_each_program(tmp_path, monkeypatch):
    page, front = tmp_path / "measurements.md", tmp_path / "README.md"
    for copy, original in ((page, bench.PAGE), (front, bench.FRONT)):
        copy.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(bench, "FRONT", front)
    for module in (bench, gpu):
        monkeypatch.setattr(module, "PAGE", page)
        monkeypatch.setattr(module, "DATA", tmp_path)
    (tmp_path / "any.csv").write_text("a\n")
    entry = an_entry(sdpa=[10.0], limit=[5.0], **{"tomesd.4": [8.0]})
    results.summarise(entry)
    out = {"machine": MACHINE, "runs": [RUN], "cases": [entry], "skipped": []}
    bench.publish(out, tmp_path / "any.csv")
    gpu.publish({**out, "shares": {"SDXL": {"layers": 0.3, "sdpa": 0.2}}}, tmp_path / "any.csv")
    text = page.read_text(encoding="utf-8")
    assert "| limit | 5 | 2.00× |" in text
    assert "SDXL: 30.0% (SDPA 20.0%)" in text
    assert "| limit | 2.00× |" in front.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What two runs of the card's benchmark have written, of one round and of another: a miniature, on the CPU."""
    out = tmp_path_factory.mktemp("gpu")
    words = ["--device", "cpu", "--only", "mini", "--sizes", "128", "--dtype", "float32", "--out", str(out)]
    for rounds in ("1", "2"):
        gpu.main([*words, "--rounds", rounds])
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


class TestCard:
    def test_every_method_is_timed_in_each_round_and_runs_add_up(self, ran):
        (eager,) = [case for case in ran[0]["cases"] if case["mode"] == measure.EAGER]
        assert [set(times) for times in eager["rounds"]] == [set(gpu.FEW)] * 2
        assert all(seconds > 0 for times in eager["rounds"] for seconds in times.values())
        assert eager["results"]["sdpa"]["speedup"] == 1
        assert eager["results"]["grid4"]["kernels"] > eager["results"]["limit"]["kernels"] > 0

    def test_what_a_cpu_cannot_do_is_said(self, ran):
        assert any("only CUDA" in s["reason"] for s in ran[0]["skipped"])
        assert "only CUDA" in ran[1]

    def test_attention_is_told_by_class_of_layers_and_as_a_share(self, ran):
        rows = [(row["tokens"], row["layers"]) for row in ran[0]["attention"]]
        assert rows == [(256, 5), (64, 5), (16, 5), (4, 1)]
        ((_, share),) = ran[0]["shares"].items()
        assert 0 < share["sdpa"] < share["layers"] < 1

    def test_it_ends_with_a_short_table(self, ran):
        short = ran[1][ran[1].index("**In short**") :]
        assert "| grid4 |" in short
        assert short.rstrip().endswith("|")

    @pytest.mark.parametrize(
        ("ratios", "expected"),
        [({512: 0.9, 1024: 1.1, 2048: 1.5}, "1024²"), ({512: 1.1, 1024: 1.0, 2048: 1.5}, "2048²"), ({}, "–")],
    )
    def test_from_which_size_a_method_pays(self, ratios, expected):
        assert results.pays_from(ratios) == expected

    def test_the_core_s_tests_are_those_of_the_core(self):
        files = gpu.core_tests()
        assert {"tests/test_compile.py", "tests/test_corrected.py"} <= set(files)
        assert not [file for file in files if "panel" in file or "cli" in file or "webui" in file]
