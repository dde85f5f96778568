"""The speed benchmarks: rounds add up over several runs, methods leave no trace, results reach the page."""

from __future__ import annotations

import csv
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("tomesd", reason="needs tomesd (requirements/dev-no-deps.txt)")

from benchmarks import bench, gpu, measure, results
from benchmarks.machine import DTYPES, PAGE, Machine
from benchmarks.methods import check, methods
from benchmarks.models import LAYOUTS, build, call, make_inputs

CPU = torch.device("cpu")
MACHINE = {"device": "cpu", "processor": "a processor", "threads": 1, "torch": "2", "code": "abc"}
SMALL = ["--layouts", "mini", "--sizes", "64", "--methods", "sdpa", "limit"]


def an_entry(**rounds: list[float | None]) -> dict:
    """A case with the seconds of each method, round by round; None where a method was left out."""
    count = max(map(len, rounds.values()))
    seconds = [{name: times[i] for name, times in rounds.items() if times[i] is not None} for i in range(count)]
    costs = {name: {"label": name, "kernels": 1, "peak": 0} for name in rounds}
    about = {"layout": "sd15", "size": [512, 512], "dtype": "bfloat16", "batch": 2, "mode": "eager"}
    entry = {"case": "a case", **about, "rounds": seconds, "results": costs}
    results.summarise(entry)
    return entry


def measured(case: measure.Case, tmp_path, **limits: float) -> tuple[list[dict], list[dict]]:
    machine = Machine(CPU, **limits)
    found = results.Results(tmp_path / "a", MACHINE)
    with torch.inference_mode():
        measure.Bench(machine, found).measure(case)
    return found.entry(case)["rounds"], machine.skipped


def test_ratios_are_medians_of_the_ratios_within_a_round():
    seconds = {"sdpa": [10.0, 20.0, 12.0], "limit": [6.0, 12.0, 8.0], "grid8": [7.0, 14.0, 8.0]}
    found = an_entry(**seconds, tomesd=[8.0, None, None])["results"]
    assert found["grid8"]["speedup"] == pytest.approx(10 / 7)
    assert found["grid8"]["captured"] == pytest.approx(0.75)  # of 0.75, 0.75 and 1
    assert (found["tomesd"]["rounds"], found["tomesd"]["captured"]) == (1, pytest.approx(0.5))
    assert an_entry(sdpa=[10.0], limit=[9.9], grid8=[9.8])["results"]["grid8"]["captured"] is None, (
        "a limit within noise"
    )


def test_rounds_of_two_runs_add_up_and_reach_the_page(tmp_path, monkeypatch):
    for module in (bench, gpu):
        monkeypatch.setattr(module, "DATA", tmp_path)
        monkeypatch.setattr(module, "PAGE", tmp_path / "measurements.md")
    monkeypatch.setattr(bench, "FRONT", tmp_path / "README.md")
    for copy, original in ((bench.PAGE, PAGE), (bench.FRONT, PAGE.parents[1] / "README.md")):
        copy.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    file = tmp_path / "bench.json"
    bench.main([*SMALL, "--rounds", "1", "--out", str(tmp_path)])
    first = json.loads(file.read_text())
    bench.main([*SMALL, "--rounds", "3", "--resume", f"--out={tmp_path}"])
    both = json.loads(file.read_text())
    (case,) = both["cases"]
    assert case["rounds"][0] == first["cases"][0]["rounds"][0]
    assert [len(times) for times in case["rounds"]] == [2, 2, 2]
    assert (tmp_path / "bench.md").read_text().count("| 3 |\n") == 2
    both["cases"] = [an_entry(sdpa=[10.0], limit=[5.0], **{"tomesd.4": [8.0]})]
    for name in ("bench", "gpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(both))
    bench.main(["--publish", "--out", str(tmp_path)])
    gpu.main(["--publish", "--out", str(tmp_path)])
    assert bench.PAGE.read_text(encoding="utf-8").count("| limit | 5 | 2.00× |") == 2
    assert "| limit: nothing between the projections | 2.00× |" in bench.FRONT.read_text(encoding="utf-8")
    with (tmp_path / "speed.csv").open(encoding="utf-8", newline="") as lines:
        assert [(row["width"], row["speedup"]) for row in csv.DictReader(lines)] == [
            ("512", "1"),
            ("512", "2"),
            ("512", "1.25"),
        ]


@pytest.mark.parametrize("name", ["threads", "code", "torch"])
def test_what_was_measured_elsewhere_is_not_resumed(tmp_path, name):
    results.Results(tmp_path / "bench", MACHINE).write()
    with pytest.raises(results.ResumeError, match=name):
        results.Results(tmp_path / "bench", {**MACHINE, name: "other"}, resume=True)


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


def test_methods_change_the_u_net_and_leave_no_trace():
    unet = build(LAYOUTS["mini"], CPU, torch.float32)
    inputs = make_inputs(LAYOUTS["mini"], (128, 128), 2, CPU, torch.float32)
    with torch.inference_mode():
        before = call(unet, inputs, 500.0)
        for name, method in methods().items():
            with method.install(unet):
                within = call(unet, inputs, 500.0)
                check(unet)
            assert torch.equal(before, call(unet, inputs, 500.0)), name
            # the panel's defaults leave layers as small as these alone
            assert torch.allclose(before, within, atol=1e-4) == (name in ("sdpa", "idle", "panel")), name


def test_all_cases_know_their_methods():
    planned = gpu.plan(("sd15", "sdxl"))
    for case in [*(case for cases in bench.PRESETS.values() for case in cases), *planned]:
        assert set(case.methods) <= set(methods())
        assert (case.layout in LAYOUTS, case.dtype in DTYPES) == (True, True)
    assert len({case.name for case in planned}) == len(planned)
    assert {case.size[0] for case in planned if case.layout == "sdxl"} == {1024, 1536, 2048}
    assert {case.mode for case in planned} == {measure.EAGER, measure.GRAPH, measure.COMPILED}


def test_sizes_are_written_width_first(capsys):
    cases = bench.choose_cases(bench.parser_of_bench().parse_args(["--sizes", "128x64", "192"]))
    assert [case.size for case in cases] == [(64, 128), (192, 192)]
    assert "128×64" in cases[0].name
    with pytest.raises(SystemExit):
        bench.main(["--sizes", "500"])
    assert "multiples of 64" in capsys.readouterr().err


def test_sections_replace_what_was_there():
    page = "a\n<!-- table: written by me -->\nold\n<!-- end of table -->\nb\n"
    assert results.filled(page, "me", {"table": "new"}) == page.replace("old", "new")
    for by, name in (("me", "figures"), ("somebody", "table")):
        with pytest.raises(ValueError, match=by):
            results.filled(page, by, {name: "new"})


def test_a_miniature_of_the_card_s_benchmark_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--only", "mini", "--sizes", "128", "--dtype", "float32", "--out", str(tmp_path)]
    for rounds in ("1", "2"):
        gpu.main([*words, "--rounds", rounds])
    found, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    (eager,) = [case for case in found["cases"] if case["mode"] == measure.EAGER]
    assert [set(times) for times in eager["rounds"]] == [set(gpu.FEW)] * 2
    assert all(seconds > 0 for times in eager["rounds"] for seconds in times.values())
    assert "only CUDA" in found["skipped"][0]["reason"]
    assert "only CUDA" in text
    rows = [(row["tokens"], row["layers"]) for row in found["attention"]]
    assert rows == [(256, 5), (64, 5), (16, 5), (4, 1)]
    (share,) = found["shares"].values()
    assert 0 < share["sdpa"] < share["layers"] < 1
    assert f"| {share['layers']:.1%} |" in text
    assert "| mini, float32, batch 2, eager | 128×128, s | speed-up |" in text
