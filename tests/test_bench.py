"""The benchmark: rounds add up over several runs, costs are counted, and methods leave no trace."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ldm", reason="needs stable-diffusion-sdkit (requirements/dev-no-deps.txt)")
pytest.importorskip("matplotlib", reason="needs matplotlib (requirements/dev.txt)")

from benchmarks import bench, measure, meter, report, results
from benchmarks.cases import PRESETS, Case
from benchmarks.machine import Machine
from benchmarks.methods import METHODS
from benchmarks.models import LAYOUTS, build, call, make_inputs

CPU = torch.device("cpu")
MACHINE = {"device": "cpu", "processor": "a processor", "threads": 1, "torch": "2", "code": "abc"}
RUN = {"date": "2026-01-01T00:00:00+00:00", "revision": "abc"}


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return build(LAYOUTS["mini"], CPU, torch.float32)


@pytest.fixture(scope="module")
def inputs() -> dict:
    return make_inputs(LAYOUTS["mini"], (128, 128), 2, CPU, torch.float32)


def a_bar() -> SimpleNamespace:
    return SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)


def run(case: Case, entry: dict, unet: torch.nn.Module, methods: dict | None = None, **limits: float) -> Machine:
    machine = Machine(CPU, flops_per_second=1e12, **limits)
    measure.Run(case, entry, unet, machine, methods or METHODS, lambda: None, a_bar()).measure()
    return machine


def an_entry(**rounds: list[float]) -> dict:
    """A case with the seconds of each method, round by round; None where a method was left out."""
    count = max(map(len, rounds.values()))
    seconds = [{name: times[i] for name, times in rounds.items() if times[i] is not None} for i in range(count)]
    costs = {name: {"label": name, "flops": 1, "bytes": 10 if name == "limit" else 30} for name in rounds}
    return {"case": "a case", "rounds": seconds, "results": costs}


def test_channels_last_weights_are_the_same_weights(unet, inputs):
    last = build(LAYOUTS["mini"], CPU, torch.float32, channels_last=True)
    convolution = next(module for module in last.modules() if isinstance(module, torch.nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(call(last, inputs, 500.0), call(unet, inputs, 500.0), rtol=1e-3, atol=1e-3)


def test_ratios_are_medians_of_the_ratios_within_a_round():
    entry = an_entry(
        sdpa=[10.0, 20.0, 12.0], limit=[6.0, 12.0, 8.0], grid8=[7.0, 14.0, 8.0], **{"tomesd.4": [8.0, None, None]}
    )
    results.summarise(entry)
    grid, tomesd = entry["results"]["grid8"], entry["results"]["tomesd.4"]
    assert grid["speedup"] == pytest.approx(10 / 7)
    assert grid["captured"] == pytest.approx(0.75)  # of 0.75, 0.75 and 1
    assert grid["added"] == -4.0
    assert grid["bytes_over_limit"] == 20
    assert (tomesd["rounds"], tomesd["seconds"], tomesd["captured"]) == (1, 8.0, None)


def test_nothing_is_captured_of_a_limit_within_the_noise():
    entry = an_entry(sdpa=[10.0], limit=[9.9], grid8=[9.8])
    results.summarise(entry)
    assert entry["results"]["grid8"]["captured"] is None


def test_the_table_states_the_rounds():
    entry = an_entry(sdpa=[10.0, 20.0], limit=[6.0, 12.0], grid8=[7.0, None])
    results.summarise(entry)
    text = report.markdown({"machine": MACHINE, "runs": [RUN], "cases": [entry], "layer": [], "skipped": []})
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["| sdpa"].endswith("| 2 |")
    assert rows["| grid8"].endswith("| 1 |")


def test_rounds_of_two_runs_add_up(tmp_path):
    words = ["--layouts", "mini", "--sizes", "64", "--methods", "sdpa", "limit", "--no-plots", "--out", str(tmp_path)]
    bench.main([*words, "--rounds", "1"])
    first = json.loads((tmp_path / "bench.json").read_text())
    bench.main([*words, "--rounds", "3", "--resume"])
    both = json.loads((tmp_path / "bench.json").read_text())
    assert len(both["cases"]) == 1
    assert len(both["runs"]) == 2
    assert both["cases"][0]["rounds"][0] == first["cases"][0]["rounds"][0]
    assert [len(times) for times in both["cases"][0]["rounds"]] == [2, 2, 2]
    assert (tmp_path / "bench.md").read_text().count("| 3 |\n") == 2


@pytest.mark.parametrize("name", ["threads", "code", "torch"])
def test_what_was_measured_elsewhere_is_not_resumed(tmp_path, name):
    results.Results(tmp_path / "bench", MACHINE, RUN).write()
    with pytest.raises(results.ResumeError, match=name):
        results.Results(tmp_path / "bench", {**MACHINE, name: "other"}, RUN, resume=True)


def test_a_round_that_would_end_too_late_is_not_begun(unet):
    entry = {"results": {}, "rounds": []}
    machine = run(Case("mini", (64, 64), ("sdpa",), dtype="float32"), entry, unet, deadline=0.0)
    assert entry["rounds"] == []
    assert "--minutes" in machine.skipped[0]["reason"]


def test_a_method_that_stands_down_is_no_result(unet, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("agentsd.attention.agent.agent_attention", failing)
    entry = {"results": {}, "rounds": []}
    machine = run(Case("mini", (64, 64), ("sdpa", "grid4"), dtype="float32", rounds=1), entry, unet)
    assert [list(times) for times in entry["rounds"]] == [["sdpa"]]
    assert "no such kernel" in machine.skipped[0]["reason"]


@pytest.mark.parametrize("name", ["sdpa", "limit", "grid4", "corrected4", "pool2"])
def test_costs_are_counted_without_computing(unet, inputs, name, monkeypatch):
    case = Case("mini", (128, 128), (name,), dtype="float32")
    measuring = measure.Run(case, {"results": {}, "rounds": []}, unet, Machine(CPU), METHODS, lambda: None, a_bar())
    calls = []
    monkeypatch.setattr(measure, "call", lambda *arguments: calls.append(arguments) or call(*arguments))
    with torch.inference_mode():
        counted = measuring._count(METHODS[name])
        with METHODS[name].install(unet):
            truth = meter.count(lambda: call(unet, inputs, 500.0))
    assert len(calls) == 1  # a second one would have computed it
    assert counted == truth


@pytest.mark.parametrize("name", METHODS)
def test_methods_change_the_u_net_and_leave_no_trace(unet, inputs, name):
    with torch.inference_mode():
        before = call(unet, inputs, 500.0)
        with METHODS[name].install(unet) as check:
            within = call(unet, inputs, 500.0)
            check()
        after = call(unet, inputs, 500.0)
    assert torch.equal(before, after)
    # the panel's defaults leave layers as small as these alone
    assert torch.allclose(before, within, atol=1e-4) == (name in ("sdpa", "idle", "naive", "panel"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_methods(name):
    for case in PRESETS[name]():
        assert set(case.methods) <= set(METHODS)
        assert case.layout in LAYOUTS
        limits = {METHODS[method].limit for method in case.methods} - {""}
        assert name == "never-slower" or limits & set(case.methods) or limits == set()


def test_results_name_no_path_of_the_machine(tmp_path):
    out = tmp_path / "results"
    words = ["--layouts", "mini", "--sizes", "64", "--methods", "sdpa", "--rounds", "1", "--no-plots"]
    bench.main([*words, f"--out={out}"])
    bench.main([*words, "--out", str(out), "--resume"])
    text = (out / "bench.json").read_text()
    assert str(tmp_path) not in text
    runs = json.loads(text)["runs"]
    assert runs[0]["arguments"] == ["python", "-m", "benchmarks.bench", *words, "--out=results"]
    assert runs[1]["arguments"] == ["python", "-m", "benchmarks.bench", *words, "--out", "results", "--resume"]


def test_sizes_are_written_width_first():
    options = bench.parse(bench.make_parser(), ["--sizes", "128x64", "192"])
    cases = bench.choose_cases(options)
    assert [case.size for case in cases] == [(64, 128), (192, 192)]
    assert "128×64" in cases[0].name


def test_a_size_that_is_no_multiple_of_64_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sizes", "500"])
    assert "multiples of 64" in capsys.readouterr().err
