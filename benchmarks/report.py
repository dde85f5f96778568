"""The results of the speed benchmark as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(out: dict[str, Any]) -> str:
    """A table for each case, and a list of what was skipped."""
    return "\n".join(
        [
            *_machine(out["machine"], out["runs"]),
            *_cases(out["cases"]),
            *_layer(out["layer"]),
            *_skipped(out["skipped"]),
        ]
    )


def _machine(machine: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    threads = f"{machine['threads']} threads" if machine["device"] == "cpu" else ""
    facts = [machine["processor"] if machine["device"] == "cpu" else machine["device"], threads]
    revisions = ", ".join(dict.fromkeys(run["revision"] for run in runs))
    facts += [f"PyTorch {machine['torch']}", f"revision {revisions}"]
    facts += [" to ".join(dict.fromkeys((runs[0]["date"], runs[-1]["date"])))]
    return ["; ".join(filter(None, facts)) + ".", ""]


def _cases(cases: list[dict[str, Any]]) -> list[str]:
    lines = []
    for case in cases:
        measured = [result for result in case["results"].values() if result["rounds"]]
        if measured:
            lines += [f"**{case['case']}** (medians of interleaved rounds)", ""]
            lines += [
                "| method | s per forward | speed-up | captured | TFLOP | beyond the limit, MiB | rounds |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [*map(_row, measured), ""]
    return lines


def _row(result: dict[str, Any]) -> str:
    seconds = f"{result['seconds']:.3g}"
    if result["seconds"] < 0.1 and result["added"]:  # so short that milliseconds matter
        seconds = f"{result['seconds']:.4f} ({1e3 * result['added']:+.2f} ms)"
    digits = 3 if result["speedup"] is not None and 0 < abs(result["speedup"] - 1) < 0.02 else 2
    speedup = "–" if result["speedup"] is None else f"{result['speedup']:.{digits}f}×"
    captured = "–" if result["captured"] is None else f"{100 * result['captured']:.1f}%"
    extra = "–" if "bytes_over_limit" not in result else f"{result['bytes_over_limit'] / 2**20:.0f}"
    flops = f"{result['flops'] / 1e12:.3g}"
    cells = (result["label"], seconds, speedup, captured, flops, extra, str(result["rounds"]))
    return "| " + " | ".join(cells) + " |"


def _layer(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    tokens = sorted({row["tokens"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["tokens"]): _cell(row) for row in rows}
    lines = ["**One self-attention layer** (8 heads of 40, batch 2, projections included), milliseconds (captured)", ""]
    lines += ["| tokens | " + " | ".join(map(str, tokens)) + " |", "|---" * (len(tokens) + 1) + "|"]
    lines += ["| " + " | ".join([label, *(cells.get((label, n), "–") for n in tokens)]) + " |" for label in labels]
    return [*lines, ""]


def _cell(row: dict[str, Any]) -> str:
    seconds = f"{float(format(1e3 * row['seconds'], '.3g')):g}"  # three digits, no exponent
    plain = row["label"] in ("SDPA", "limit") or "captured" not in row
    return seconds if plain else f"{seconds} ({100 * row['captured']:.1f}%)"


def _skipped(skipped: list[dict[str, str]]) -> list[str]:
    lines = [f"- {s['method']} at {s['case']}: {s['reason']}" for s in skipped]
    return ["Skipped:", "", *lines, ""] if lines else []
