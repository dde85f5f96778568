"""Files of results, to which one or several runs add their rounds, their tables, and sections of pages."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

# Differences below this share are noise. So is a limit that saves less, and the captured share of it.
NOISE = 0.02


def fill(page: Path, by: str, sections: Mapping[str, str]) -> None:
    """Write each section into the page, which marks its place; `by` is the program that writes it."""
    page.write_text(filled(page.read_text(encoding="utf-8"), by, sections), encoding="utf-8")


def filled(page: str, by: str, sections: Mapping[str, str]) -> str:
    """The page with each section between its two comments."""
    for name, text in sections.items():
        begin, end = f"<!-- {name}: written by {by} -->", f"<!-- end of {name} -->"
        if not page.count(begin) == page.count(end) == 1:
            raise ValueError(f"the page must hold {begin} and {end} once")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


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
        write_csv(self.path, self.fields, self.rows)

    def drop(self, wanted: Callable[[str], bool]) -> None:
        """Drop the methods that are to be measured anew."""
        self.rows = [row for row in self.rows if not wanted(row["method"])]
        write_csv(self.path, self.fields, self.rows)


def write_csv(file: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(file, lines.getvalue())


def write_json(file: Path, data: Any) -> None:
    _write(file, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    """Write a file that is whole at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(file)


class ResumeError(ValueError):
    """The existing results come from another machine, or from other code."""


class Results:
    """All that was measured so far, as JSON and as tables, in the files of a stem, to which a run may add."""

    def __init__(self, stem: Path, machine: dict[str, Any], resume: bool = False) -> None:
        self.stem, self.file = stem, stem.with_suffix(".json")
        self.out: dict[str, Any] = {"machine": machine, "dates": [], "cases": [], "skipped": []}
        if resume and self.file.exists():
            self.out = json.loads(self.file.read_text(encoding="utf-8"))
            for name, value in machine.items():
                before = self.out["machine"].get(name)
                if before != value:
                    raise ResumeError(f"{self.file} was measured with {name} {before}, this is {value}")
        self.out["dates"].append(date.today().isoformat())

    def entry(self, case: Any) -> dict[str, Any]:
        """The entry of a case; cases that differ in methods or rounds alone share one."""
        new = {"case": case.name, **vars(case), "results": {}, "rounds": []}
        if all(entry["case"] != case.name for entry in self.out["cases"]):
            self.out["cases"].append(new)
        return next(entry for entry in self.out["cases"] if entry["case"] == case.name)

    def write(self) -> None:
        """Write the JSON and the tables."""
        for entry in self.out["cases"]:
            summarise(entry)
        write_json(self.file, self.out)
        self.stem.with_suffix(".md").write_text(markdown(self.out), encoding="utf-8")


def published(file: Path, csv_file: Path) -> dict[str, Any]:
    """Read the results of a run, and write a line for each case and method into the documentation's folder."""
    out, rows = json.loads(file.read_text(encoding="utf-8")), []
    about = out["machine"]
    head = ("layout", "width", "height", "dtype", "batch", "mode", "method", "seconds", "speedup", "captured")
    head += ("kernels", "peak", "rounds", "processor", "threads", "torch", "code", "date")
    for case in out["cases"]:
        place = {**case, "height": case["size"][0], "width": case["size"][1], "date": out["dates"][-1]}
        place["processor"] = about["processor"] if about["device"] == "cpu" else about["device"]
        for result in measured(case).values():
            figures = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in result.items()}
            rows.append({**about, **place, **figures, "method": result["label"]})
    write_csv(csv_file, head, rows)
    return out


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


def in_words(about: Mapping[str, Any]) -> str:
    """What `Machine.describe` tells, as text."""
    where = about["device"] if about["device"] != "cpu" else f"{about['processor']}, {about['threads']} threads"
    return f"{where}; PyTorch {about['torch']}; code {about['code']}"


def machine_line(out: dict[str, Any]) -> str:
    """The machine, the code and the dates in one sentence."""
    return f"{in_words(out['machine'])}; {' to '.join(dict.fromkeys((out['dates'][0], out['dates'][-1])))}."


def markdown(out: dict[str, Any]) -> str:
    """All tables: a table for each case, what else was measured, what was skipped, and the methods by size."""
    cases = [case for case in out["cases"] if case["rounds"]]
    lines = [machine_line(out), "U-Nets with random weights; medians of interleaved rounds.", ""]
    for case in cases:
        lines += [f"**{case['case']}**", "", *_case(case), ""]
    known = (out.get(name) or {} for name in ("shares", "attention", "closeness"))
    for section in (show(found) for show, found in zip((_shares, _attention, _closeness), known, strict=True)):
        lines += [*section, ""] if len(section) > 2 else []
    if out["skipped"]:
        lines += ["Skipped:", "", *(f"- {s['method']} at {s['case']}: {s['reason']}" for s in out["skipped"]), ""]
    return "\n".join([*lines, *by_size(cases)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, numbers to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def times(ratio: float | None) -> str:
    """A speed-up as text: three decimals where it is next to 1."""
    return "–" if ratio is None else f"{ratio:.{3 if 0 < abs(ratio - 1) < NOISE else 2}f}×"


def _case(case: dict[str, Any]) -> list[str]:
    base, rows = case["results"].get("sdpa", {}), []
    for name, result in measured(case).items():
        peak = f"{(result['peak'] - base['peak']) / 2**20:+.0f}" if base.get("peak") else "–"
        captured = "–" if result["captured"] is None or name == "limit" else f"{result['captured']:.0%}"
        counts = (peak, str(result["kernels"] or "–"), str(result["rounds"]))
        rows.append((result["label"], f"{1e3 * result['seconds']:.4g}", times(result["speedup"]), captured, *counts))
    return table(("method", "ms", "speed-up", "of the limit", "peak beyond SDPA, MiB", "kernels", "rounds"), rows)


def _attention(found: list[dict[str, Any]]) -> list[str]:
    counts, rows = ("layers", "tokens", "heads", "width"), []
    for r in found:
        figures = f"{1e3 * r['seconds']:.4g}", f"{r['flops'] / r['seconds'] / 1e12:.3g}"
        rows.append((f"{r['layout']}, {r['side']}², {r['dtype']}", *(str(r[name]) for name in counts), *figures))
    return table(("SDPA of one layer, batch 2", *counts, "ms", "TFLOP/s"), rows)


def _shares(shares: dict[str, dict[str, float]]) -> list[str]:
    rows = [(name, f"{s['layers']:.1%}", f"{s['sdpa']:.1%}") for name, s in shares.items()]
    return table(("share of a U-Net call, by the profiler", "self-attention layers", "SDPA in them"), rows)


def _closeness(found: list[dict[str, Any]]) -> list[str]:
    by_method: dict[str, dict[str, str]] = defaultdict(dict)
    for row in found:
        by_method[row["method"]][row["dtype"]] = f"{row['error']:.2g}" if row["finite"] else "**not finite**"
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    rows = [(name, *(of.get(dtype, "–") for dtype in dtypes)) for name, of in by_method.items()]
    return table(("deviation of the embedded model's prediction", *dtypes), rows)


def by_size(cases: Iterable[dict[str, Any]]) -> list[str]:
    """A table for each U-Net, dtype, batch and way of calling: seconds and speed-up of each method by size."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[f"{case['layout']}, {case['dtype']}, batch {case['batch']}, {case['mode']}"].append(case)
    lines = []
    for name, group in groups.items():
        group.sort(key=lambda case: case["size"])
        sizes = [f"{case['size'][1]}×{case['size'][0]}" for case in group]
        labels = {key: result["label"] for case in group for key, result in measured(case).items()}
        rows = []
        for key, label in labels.items():
            found = [measured(case).get(key) for case in group]
            cells = [(f"{r['seconds']:.3g}", times(r["speedup"])) if r else ("–", "–") for r in found]
            rows.append([label, *(text for pair in cells for text in pair)])
        head = [name, *(text for size in sizes for text in (f"{size}, s", "speed-up"))]
        lines += [*table(head, rows), ""]
    return lines
