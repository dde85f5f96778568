"""The file of results: rounds are added to it one by one, by as many runs as it takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from . import plots, report
from .cases import Case
from .methods import METHODS

# A limit that saves less than this share of the time is lost in the noise, and so is what is captured of it.
NOISE = 0.02


class ResumeError(ValueError):
    """The results that are there come from another machine, or from other code."""


class Results:
    """What was measured so far, as JSON, a table and plots.

    Args:
        stem: path of the files without their endings.
        machine: the machine and the state of the code.
        run: this run.
        resume: add to what is in the file.

    Raises:
        ResumeError: resuming what was measured elsewhere.
    """

    def __init__(self, stem: Path, machine: dict[str, Any], run: dict[str, Any], resume: bool = False) -> None:
        self.stem = stem
        self.out: dict[str, Any] = {"machine": machine, "runs": [], "cases": [], "layer": [], "skipped": []}
        if resume and self.file.exists():
            self.out = json.loads(self.file.read_text(encoding="utf-8"))
            for name, value in machine.items():
                if self.out["machine"].get(name) != value:
                    was = self.out["machine"].get(name)
                    raise ResumeError(f"{self.file} was measured with {name} {was}, this is {value}")
        self.out["runs"].append(run)
        stem.parent.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        return self.stem.with_name(self.stem.name + ".json")

    def case(self, case: Case) -> dict[str, Any]:
        """The entry of a case: what was measured of the same U-Net at the same size is one entry."""
        about = {k: list(v) if k == "size" else v for k, v in asdict(case).items() if k not in ("methods", "rounds")}
        for entry in self.out["cases"]:
            if all(entry[name] == value for name, value in about.items()):
                return entry
        entry = {"case": case.name, **about, "results": {}, "rounds": []}
        self.out["cases"].append(entry)
        return entry

    def write(self) -> None:
        """Write JSON and the table."""
        for entry in self.out["cases"]:
            summarise(entry)
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)
        self.stem.with_name(self.stem.name + ".md").write_text(self.table(), encoding="utf-8")

    def draw(self) -> None:
        plots.draw(self.out, self.stem)

    def table(self) -> str:
        return report.markdown(self.out)


def summarise(entry: dict[str, Any]) -> None:
    """Medians, and the medians of each round's own ratios, into the results of a case."""
    results = entry["results"]
    for name, result in results.items():
        rounds = [r for r in entry["rounds"] if name in r]
        result["rounds"] = len(rounds)
        result["seconds"] = median(r[name] for r in rounds) if rounds else None
        both = [(r["sdpa"], r[name]) for r in rounds if "sdpa" in r]
        result["speedup"] = median(base / t for base, t in both) if both else None
        result["added"] = median(t - base for base, t in both) if both else None
        limit = METHODS[name].limit if name in METHODS else ""
        saved = [(r["sdpa"], r[name], r[limit]) for r in rounds if {"sdpa", limit} <= set(r)]
        shares = [(base - t) / (base - least) for base, t, least in saved if base - least > NOISE * base]
        result["captured"] = median(shares) if shares else None
        if limit in results:
            result["bytes_over_limit"] = result["bytes"] - results[limit]["bytes"]
