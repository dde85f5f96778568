"""The file of results, to which one or several runs add their rounds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from . import plots, report
from .cases import Case
from .methods import METHODS

# A limit that saves less than this share of the time is noise, and so would be the captured share of it.
NOISE = 0.02


class ResumeError(ValueError):
    """The existing results come from another machine, or from other code."""


class Results:
    """All that was measured so far, as JSON, a table and plots.

    Args:
        stem: path of the files without their endings.
        machine: the machine and the state of the code.
        run: this run.
        resume: add to the file if there is one.

    Raises:
        ResumeError: the file to resume comes from another machine or other code.
    """

    def __init__(self, stem: Path, machine: dict[str, Any], run: dict[str, Any], resume: bool = False) -> None:
        self.stem = stem
        self.out: dict[str, Any] = {"machine": machine, "runs": [], "cases": [], "layer": [], "skipped": []}
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
        return self.stem.with_name(self.stem.name + ".json")

    def case(self, case: Case) -> dict[str, Any]:
        """The entry of a case, shared by all cases of the same U-Net at the same size."""
        key = {k: list(v) if k == "size" else v for k, v in asdict(case).items() if k not in ("methods", "rounds")}
        for entry in self.out["cases"]:
            if all(entry[name] == value for name, value in key.items()):
                return entry
        entry = {"case": case.name, **key, "results": {}, "rounds": []}
        self.out["cases"].append(entry)
        return entry

    def write(self) -> None:
        """Write the JSON and the table."""
        for entry in self.out["cases"]:
            summarise(entry)
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)
        self.stem.with_name(self.stem.name + ".md").write_text(self.table(), encoding="utf-8")

    def draw(self) -> None:
        """Draw the plots."""
        plots.draw(self.out, self.stem)

    def table(self) -> str:
        """The results as Markdown."""
        return report.markdown(self.out)


def summarise(entry: dict[str, Any]) -> None:
    """Add medians to the results of a case: of the seconds, and of the ratios within each round."""
    results = entry["results"]
    for name, result in results.items():
        rounds = [r for r in entry["rounds"] if name in r]
        result["rounds"] = len(rounds)
        result["seconds"] = median(r[name] for r in rounds) if rounds else None
        pairs = [(r["sdpa"], r[name]) for r in rounds if "sdpa" in r]
        result["speedup"] = median(sdpa / t for sdpa, t in pairs) if pairs else None
        result["added"] = median(t - sdpa for sdpa, t in pairs) if pairs else None
        limit = METHODS[name].limit if name in METHODS else ""
        triples = [(r["sdpa"], r[name], r[limit]) for r in rounds if {"sdpa", limit} <= set(r)]
        shares = [(sdpa - t) / (sdpa - least) for sdpa, t, least in triples if sdpa - least > NOISE * sdpa]
        result["captured"] = median(shares) if shares else None
        if limit in results:
            result["bytes_over_limit"] = result["bytes"] - results[limit]["bytes"]
