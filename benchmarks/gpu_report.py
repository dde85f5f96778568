"""The results of the card's benchmark as Markdown, ending with a short table."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from agentsd.costs import layouts
from agentsd.predict import NOISE, Device, device_named, speedup

from .predicted import METHODS

# Names of the cost model's layouts, by those of the benchmark's
COUNTED = {"sd15": "SD 1", "sdxl": "SDXL"}


def summarise(entry: dict[str, Any]) -> None:
    """Add medians to the results of a case: of the seconds, and of the ratios to SDPA within each round."""
    for name, result in entry["results"].items():
        rounds = [r for r in entry["rounds"] if name in r]
        result["rounds"] = len(rounds)
        result["seconds"] = median(r[name] for r in rounds) if rounds else None
        ratios = [r["sdpa"] / r[name] for r in rounds if "sdpa" in r]
        result["speedup"] = median(ratios) if ratios else None


def markdown(out: dict[str, Any]) -> str:
    """All tables."""
    machine, runs = out["machine"], out["runs"]
    cases = [case for case in out["cases"] if case["rounds"]]
    lines = [
        f"{machine['device']}; PyTorch {machine['torch']}; code {machine['code']}; {runs[0]['date']} to "
        f"{runs[-1]['date']}. U-Nets with random weights; medians of interleaved rounds.",
        "",
    ]
    for case in cases:
        lines += _case(case, device_named(machine["device"]))
    lines += [*_attention(out.get("attention", [])), *_closeness(out.get("closeness", []))]
    lines += [*_tests(out.get("tests")), *_skipped(out["skipped"]), *_short(cases)]
    return "\n".join(lines)


def _measured(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: r for name, r in case["results"].items() if r.get("rounds")}


def _case(case: dict[str, Any], device: Device | None) -> list[str]:
    """A case's table; on a card of known rates, what was predicted for its usual calls stands beside."""
    predicted = device is not None and case["mode"] == "eager"
    lines = [f"**{case['case']}**", "", "| method | ms | speed-up | peak beyond SDPA, MiB | kernels | rounds |"]
    lines += ["|---|---|---|---|---|---|"]
    if predicted:
        lines[-2:] = [lines[-2] + " predicted |", lines[-1] + "---|"]
    base = case["results"].get("sdpa", {})
    for result in _measured(case).values():
        peak = f"{(result['peak'] - base['peak']) / 2**20:+.0f}" if base.get("peak") else "–"
        cells = (
            result["label"],
            f"{1e3 * result['seconds']:.4g}",
            _times(result["speedup"]),
            peak,
            str(result.get("kernels", "–")),
            str(result["rounds"]),
            *([_predicted(case, device, result["label"])] if predicted else []),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _predicted(case: dict[str, Any], device: Device, label: str) -> str:
    name, config, side = COUNTED.get(case["layout"]), METHODS.get(label), case["side"] // 8
    if name is None or config is None:
        return "–"
    return _times(speedup(device, layouts()[name], config, side, side, rows=case["batch"]))


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _attention(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["**SDPA by class of layers**, batch 2", "", "| U-Net, side, dtype | layers | heads × width | tokens |"]
    lines[-1] += " ms a layer | ms in all | TFLOP/s |"
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['layout']}, {row['side']}, {row['dtype']} | {row['layers']} at level {row['downsample']} | "
            f"{row['heads']} × {row['width']} | {row['tokens']} | {1e3 * row['seconds']:.3g} | "
            f"{1e3 * row['seconds'] * row['layers']:.3g} | {row['flops'] / row['seconds'] / 1e12:.3g} |"
        )
    return [*lines, ""]


def _closeness(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = ["**Closeness on the embedded model**: relative error of the prediction at timestep 500", ""]
    lines += ["| method | " + " | ".join(dtypes) + " |", "|---" * (1 + len(dtypes)) + "|"]
    errors = {(row["method"], row["dtype"]): f"{row['error']:.3g}" if row["finite"] else "not finite" for row in rows}
    for name in dict.fromkeys(row["method"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(errors.get((name, dtype), "–") for dtype in dtypes) + " |")
    return [*lines, ""]


def _tests(outcome: dict[str, Any] | None) -> list[str]:
    if outcome is None:
        return []
    state = "" if outcome["finished"] else " (stopped by --minutes)"
    return [f"**The core's tests on this device**{state}: {outcome['last']}", "", *outcome["failed"], ""]


def _skipped(skipped: list[dict[str, str]]) -> list[str]:
    lines = [f"- {s['method']} at {s['case']}: {s['reason']}" for s in skipped]
    return ["Skipped:", "", *lines, ""] if lines else []


def _short(cases: list[dict[str, Any]]) -> list[str]:
    """Speed-up by size in each way of calling, from which size a method pays, and where it is slower."""
    groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for case in cases:
        groups[case["layout"], case["dtype"], f"batch {case['batch']}", case["mode"]][case["side"]] = _measured(case)
    lines = ["**In short**: speed-up over SDPA", ""]
    for key, by_side in groups.items():
        sides = sorted(by_side)
        lines += ["| " + ", ".join(key) + " | " + " | ".join(f"{s}²" for s in sides) + " | pays from | slower at |"]
        lines += ["|---" * (3 + len(sides)) + "|"]
        names = dict.fromkeys(name for methods in by_side.values() for name in methods if name != "sdpa")
        for name in names:
            ratios = {side: by_side[side].get(name, {}).get("speedup") for side in sides}
            known = {side: ratio for side, ratio in ratios.items() if ratio is not None}
            slower = ", ".join(f"{side}²" for side, ratio in known.items() if ratio < 1 - NOISE) or "nowhere"
            cells = " | ".join(_times(ratios[side]) for side in sides)
            lines.append(f"| {name} | {cells} | {_pays_from(known)} | {slower} |")
        lines.append("")
    return lines


def _pays_from(ratios: dict[int, float]) -> str:
    """The smallest side at and above which a method is faster."""
    best = "–"
    for side in sorted(ratios, reverse=True):
        if ratios[side] <= 1 + NOISE:
            break
        best = f"{side}²"
    return best
