"""The file of results, to which one or several runs add their rounds, and its tables."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Differences below this share are noise. So is a limit that saves less, and the captured share of it.
NOISE = 0.02


class Rows:
    """A CSV file of measured methods that is written anew whenever rows are added."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, fields
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [dict.fromkeys(fields, "") | row for row in csv.DictReader(file)]

    def missing(self, key: Mapping[str, Any], methods: Iterable[str]) -> list[str]:
        """The methods that have no row with the values of `key`."""
        done = {row["method"] for row in self.rows if all(row[name] == str(value) for name, value in key.items())}
        return [method for method in methods if method not in done]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows += [dict.fromkeys(self.fields, "") | {k: str(v) for k, v in row.items()} for row in rows]
        self._write()

    def drop(self, wanted: Callable[[str], bool]) -> None:
        """Drop the methods that are to be measured anew."""
        self.rows = [row for row in self.rows if not wanted(row["method"])]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


def write_json(file: Path, data: Any) -> None:
    """Write a file that is whole at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


class ResumeError(ValueError):
    """The existing results come from another machine, or from other code."""


class Results:
    """All that was measured so far, as JSON and as tables, in the files of a stem, to which a run may add."""

    def __init__(self, stem: Path, machine: dict[str, Any], run: dict[str, Any], resume: bool = False) -> None:
        self.stem = stem
        self.out: dict[str, Any] = {"machine": machine, "runs": [], "cases": [], "skipped": []}
        if resume and self.file.exists():
            self.out = json.loads(self.file.read_text(encoding="utf-8"))
            for name, value in machine.items():
                before = self.out["machine"].get(name)
                if before != value:
                    raise ResumeError(f"{self.file} was measured with {name} {before}, this is {value}")
        self.out["runs"].append(run)
        stem.parent.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        return self.stem.with_suffix(".json")

    def entry(self, case: Any) -> dict[str, Any]:
        """The entry of a case; cases that differ in methods or rounds alone share one."""
        for entry in self.out["cases"]:
            if entry["case"] == case.name:
                return entry
        self.out["cases"].append({"case": case.name, **vars(case), "results": {}, "rounds": []})
        return self.out["cases"][-1]

    def write(self) -> None:
        """Write the JSON, the CSV and the tables."""
        for entry in self.out["cases"]:
            summarise(entry)
        write_json(self.file, self.out)
        self.write_csv(self.stem.with_suffix(".csv"))
        self.stem.with_suffix(".md").write_text(markdown(self.out), encoding="utf-8")

    def write_csv(self, file: Path) -> None:
        """Write a line for each case and method."""
        about = self.out["machine"]
        head = ("layout", "width", "height", "dtype", "batch", "mode", "method", "seconds", "speedup", "captured")
        head += ("kernels", "peak", "rounds", "processor", "threads", "torch", "code", "date")
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, head, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            for case in self.out["cases"]:
                place = {
                    **case,
                    "height": case["size"][0],
                    "width": case["size"][1],
                    "date": self.out["runs"][-1]["date"],
                }
                place["processor"] = about["processor"] if about["device"] == "cpu" else about["device"]
                for result in measured(case).values():
                    figures = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in result.items()}
                    writer.writerow({**about, **place, **figures, "method": result["label"]})


def summarise(entry: dict[str, Any]) -> None:
    """Add medians to the results of a case: of the seconds, and of the ratios within each round."""
    for name, result in entry["results"].items():
        rounds = [r for r in entry["rounds"] if name in r]
        result["rounds"] = len(rounds)
        result["seconds"] = median(r[name] for r in rounds) if rounds else None
        pairs = [(r["sdpa"], r[name]) for r in rounds if "sdpa" in r]
        result["speedup"] = median(sdpa / t for sdpa, t in pairs) if pairs else None
        triples = [(r["sdpa"], r[name], r["limit"]) for r in rounds if {"sdpa", "limit"} <= set(r) and name != "sdpa"]
        shares = [(sdpa - t) / (sdpa - least) for sdpa, t, least in triples if sdpa - least > NOISE * sdpa]
        result["captured"] = median(shares) if shares else None


def measured(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of a case that have rounds."""
    return {name: result for name, result in case["results"].items() if result.get("rounds")}


def machine_line(out: dict[str, Any]) -> str:
    """The machine, the code and the dates in one sentence."""
    machine, runs = out["machine"], out["runs"]
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['threads']} threads"
    dates = " to ".join(dict.fromkeys((runs[0]["date"][:10], runs[-1]["date"][:10])))
    return f"{where}; PyTorch {machine['torch']}; code {machine['code']}; {dates}."


def markdown(out: dict[str, Any]) -> str:
    """All tables: a table for each case, what else was measured, what was skipped, and a short table."""
    cases = [case for case in out["cases"] if case["rounds"]]
    lines = [machine_line(out), "U-Nets with random weights; medians of interleaved rounds.", ""]
    for case in cases:
        lines += [f"**{case['case']}**", "", *_case(case), ""]
    lines += [*_attention(out.get("attention", [])), *_shares(out.get("shares", {}))]
    lines += [*_closeness(out.get("closeness", [])), *_tests(out.get("tests"))]
    if out["skipped"]:
        lines += ["Skipped:", "", *(f"- {s['method']} at {s['case']}: {s['reason']}" for s in out["skipped"]), ""]
    return "\n".join([*lines, *short(cases)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, numbers to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def _case(case: dict[str, Any]) -> list[str]:
    base, rows = case["results"].get("sdpa", {}), []
    for name, result in measured(case).items():
        peak = f"{(result['peak'] - base['peak']) / 2**20:+.0f}" if base.get("peak") else "–"
        captured = "–" if result["captured"] is None or name == "limit" else f"{result['captured']:.0%}"
        seconds = f"{1e3 * result['seconds']:.4g}"
        rows.append((result["label"], seconds, times(result["speedup"]), captured, peak, str(result["kernels"])))
        rows[-1] += (str(result["rounds"]),)
    return table(("method", "ms", "speed-up", "of the limit", "peak beyond SDPA, MiB", "kernels", "rounds"), rows)


def times(ratio: float | None) -> str:
    """A speed-up as text: three decimals where it is next to 1."""
    return "–" if ratio is None else f"{ratio:.{3 if 0 < abs(ratio - 1) < NOISE else 2}f}×"


def _attention(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            f"{r['layout']}, {r['side']}², {r['dtype']}",
            *(str(r[name]) for name in ("layers", "tokens", "heads", "width")),
            f"{1e3 * r['seconds']:.4g}",
            f"{r['flops'] / r['seconds'] / 1e12:.3g}",
        )
        for r in rows
    ]
    head = ("SDPA of one layer, batch 2", "layers", "tokens", "heads", "width", "ms", "TFLOP/s")
    return [*table(head, cells), ""]


def _shares(shares: dict[str, dict[str, float]]) -> list[str]:
    rows = [(name, f"{s['layers']:.1%}", f"{s['sdpa']:.1%}") for name, s in shares.items()]
    head = ("share of a U-Net call, by the profiler", "self-attention layers", "SDPA in them")
    return [*table(head, rows), ""] if rows else []


def _closeness(rows: list[dict[str, Any]]) -> list[str]:
    by_method: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][row["dtype"]] = f"{row['error']:.2g}" if row["finite"] else "**not finite**"
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells = [(name, *(found.get(dtype, "–") for dtype in dtypes)) for name, found in by_method.items()]
    return [*table(("deviation of the embedded model's prediction", *dtypes), cells), ""] if rows else []


def _tests(outcome: dict[str, Any] | None) -> list[str]:
    if not outcome:
        return []
    state = "" if outcome["finished"] else " (stopped by --minutes)"
    return [f"**The core's tests on this device**{state}: {outcome['last']}", "", *outcome["failed"], ""]


def short(cases: list[dict[str, Any]]) -> list[str]:
    """Speed-up by size in each way of calling, from which size a method pays, and where it is slower."""
    groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for case in cases:
        side = round((case["size"][0] * case["size"][1]) ** 0.5)
        groups[case["layout"], case["dtype"], f"batch {case['batch']}", case["mode"]][side] = measured(case)
    lines = ["**In short**: speed-up over SDPA", ""]
    for key, by_side in groups.items():
        sides, rows = sorted(by_side), []
        names = dict.fromkeys(name for found in by_side.values() for name in found if name != "sdpa")
        for name in names:
            ratios = {side: by_side[side].get(name, {}).get("speedup") for side in sides}
            known = {side: ratio for side, ratio in ratios.items() if ratio is not None}
            slower = ", ".join(f"{side}²" for side, ratio in known.items() if ratio < 1 - NOISE) or "nowhere"
            rows.append((name, *(times(ratios[side]) for side in sides), pays_from(known), slower))
        lines += [*table((", ".join(key), *(f"{s}²" for s in sides), "pays from", "slower at"), rows), ""]
    return lines


def pays_from(ratios: dict[int, float]) -> str:
    """The smallest side at and above which a method is faster."""
    best = "–"
    for side in sorted(ratios, reverse=True):
        if ratios[side] <= 1 + NOISE:
            break
        best = f"{side}²"
    return best
