"""Everything that can be measured on a card, in one command; it also runs on a CPU, slowly.

    python -m benchmarks.gpu                # out/gpu/gpu.md after eight minutes at most
    python -m benchmarks.gpu --minutes 30   # go on where it ended, and add what was missing
    python -m benchmarks.gpu --only sd15    # one part
    python -m benchmarks.gpu --publish      # write what is in --out into docs/measurements.md

U-Nets with random weights; each method on the largest self-attention layers, in interleaved rounds in random order:
called as usual, replayed from a CUDA graph, and compiled. Then the share of self-attention in a call by the profiler,
the closeness of each method in half precision, and the core's tests on the device. What tells most comes first, results
are written after each round, and a later run adds to them. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .bench import DATA, PAGE
from .machine import DTYPES, ROOT, Machine, choose_device, this_run
from .measure import COMPILED, EAGER, GRAPH, RESERVE, TIMESTEP, Bench, Case, sdpa_seconds, self_attention_share
from .methods import methods
from .models import LAYOUTS, call
from .pages import fill
from .results import Results, ResumeError, machine_line, short

MODULE = "benchmarks.gpu"
FEW = ("sdpa", "limit", "grid4", "corrected4", "opened4", "pool2", "tomesd.5")
MAIN = (*FEW, "corrected8", "paper", "merge.5", "tiles")
ALL = (*MAIN, "grid8", "similarity", "idle")
# The tests of other parts than the core say nothing of a device.
OTHERS = ("bench", "cli", "comfy", "fidelity", "gpu", "hosts", "imports", "javascript", "library", "mutation", "panel")
OTHERS += ("playground", "release", "settings", "tune", "webui", "zoo")


def plan(layouts: tuple[str, ...], sides: tuple[int, ...] = (), dtype: str = "", rounds: int = 7) -> list[Case]:
    """The cases, those that tell most first; cases of one U-Net are together where that costs nothing."""

    def case(layout: str, side: int, mode: str, names: tuple[str, ...] = MAIN, **more: Any) -> Case:
        return Case(layout, (side, side), names, mode, **{"dtype": dtype or "float16", "rounds": rounds, **more})

    both = (EAGER, GRAPH)
    if sides:  # a miniature
        return [case(layout, side, mode, FEW) for layout in layouts for side in sides for mode in both]
    first = [case("sd15", side, mode, ALL if side == 512 else MAIN) for side in (512, 1024) for mode in both]
    first += [case("sdxl", side, mode) for side in (1024, 2048) for mode in both]
    first += [case("sd15", side, COMPILED, ("sdpa", "grid4", "corrected4", "opened4")) for side in (512, 1024)]
    rest = [case("sd15", side, mode) for side in (2048, 768, 1536, 640) for mode in both]
    rest += [case("sdxl", 1536, mode) for mode in both]
    rest += [case("sdxl", 1024, COMPILED, ("sdpa", "grid4"))]
    for layout, side in (("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("sdxl", 2048)):
        rest += [case(layout, side, mode, FEW, batch=1) for mode in both]
        rest += [case(layout, side, mode, FEW, dtype="bfloat16") for mode in both]
    return [case for case in (*first, *rest) if case.layout in layouts]


def measure_model(bench: Bench, case: Case) -> None:
    """SDPA by class of layers, and the share of self-attention in an unpatched call, unless they are known."""
    out, machine, side = bench.results.out, bench.machine, case.size[0]
    known = {(row["layout"], row["side"], row["dtype"]) for row in out.setdefault("attention", [])}
    if (case.layout, side, case.dtype) not in known:
        out["attention"] += sdpa_seconds(machine, case.layout, side, case.dtype)
    shares = out.setdefault("shares", {})
    name = f"{LAYOUTS[case.layout].label}, {side}×{side}, {case.dtype}"
    if name not in shares and machine.time_left() > RESERVE:
        inputs = bench.build(case)
        shares[name] = self_attention_share(bench.unet, lambda: call(bench.unet, inputs, TIMESTEP), machine)
    bench.results.write()


def closeness(machine: Machine, results: Results) -> None:
    """How far each method's forward passes of the embedded model are from unpatched ones, in each half precision.

    Relative: ‖patched − unpatched‖ / ‖unpatched‖ of the prediction, both in that dtype.
    """
    from agentsd import embedded

    if results.out.get("closeness"):
        return
    rows = []
    for dtype in DTYPES.values():
        try:
            pipe = embedded.load(device=machine.device, dtype=dtype)
            latents, prompts = pipe.noise([0, 1], 64, 64), [pipe.prompts[0]] * 2
            outputs = {}
            for name, method in methods().items():
                if name not in ("limit", "idle", "naive", "panel"):
                    with torch.no_grad(), method.install(pipe.unet) as check:
                        outputs[name] = pipe.predict(latents, 500, prompts).float().cpu()
                        check()
        except Exception as error:
            machine.skip("the embedded model", str(dtype), f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        plain = outputs["sdpa"]
        for name, output in outputs.items():
            error, finite = float((output - plain).norm() / plain.norm()), bool(output.isfinite().all())
            rows.append({"dtype": str(dtype).removeprefix("torch."), "method": name, "error": error, "finite": finite})
    results.out["closeness"] = rows
    results.write()


def tests(machine: Machine, results: Results) -> None:
    """Run the core's test suite on the device, as far as the time allows."""
    if results.out.get("tests", {}).get("finished") or machine.time_left() < 30:
        return
    log, finished = results.stem.with_name("tests.log"), True
    environment = {"AGENTSD_DEVICE": machine.device.type, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *core_tests()]
    given = {"cwd": ROOT, "stderr": subprocess.STDOUT, "env": {**os.environ, **environment}, "check": False}
    with log.open("w", encoding="utf-8") as out:
        try:
            subprocess.run(command, stdout=out, timeout=machine.time_left() - RESERVE, **given)
        except subprocess.TimeoutExpired:
            finished = False
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    results.out["tests"] = {"finished": finished, "last": lines[-1] if lines else "", "failed": failed[:50]}
    results.write()


def core_tests() -> list[str]:
    """The tests of the core."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if not f.stem.split("_", 1)[1].startswith(OTHERS)]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.publish:
        publish(json.loads((options.out / "gpu.json").read_text(encoding="utf-8")), options.out / "gpu.csv")
        return 0
    machine = Machine(choose_device(options.device), deadline=time.monotonic() + 60 * options.minutes)
    run = this_run(MODULE, sys.argv[1:] if argv is None else argv, [options.out])
    try:
        results = Results(options.out / "gpu", machine.describe(), run, resume=not options.fresh)
    except ResumeError as error:
        parser.error(f"{error}; --fresh begins anew")
    machine.skipped = results.out["skipped"]
    sides = tuple(options.sizes or ())
    cases = plan(tuple(options.only or ("sd15", "sdxl")), sides, options.dtype or "", options.rounds)
    bench = Bench(machine, results)
    with torch.no_grad():
        for i, case in enumerate(tqdm(cases, unit="case")):
            bench.measure(case)
            if case.mode == EAGER and case.batch == 2:
                measure_model(bench, replace(case, mode=EAGER))
            if i == 3 and not sides:  # after the first four, which are the main table
                closeness(machine, results)
    if not sides:
        bench.unet = None
        tests(machine, results)
    results.write()
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    return 0


def publish(out: dict[str, Any], data: Path) -> None:
    """Write the CSV and the section "gpu" of the page: the short table of every case, and the shares."""
    DATA.mkdir(exist_ok=True)
    (DATA / "gpu.csv").write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    shares = [f"{name}: {s['layers']:.1%} (SDPA {s['sdpa']:.1%})" for name, s in out.get("shares", {}).items()]
    text = [machine_line(out), "", *short([case for case in out["cases"] if case["rounds"]])]
    if shares:
        text += ["Self-attention's share of an unpatched U-Net call, by the profiler: " + "; ".join(shares) + "."]
    fill(PAGE, MODULE, {"gpu": "\n".join(text).rstrip()})


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="end after this many minutes (default 8)")
    add("--only", nargs="+", choices=sorted(LAYOUTS), metavar="UNET", help="U-Nets to measure (default sd15 sdxl)")
    add("--sizes", nargs="+", type=int, metavar="SIDE", help="only these sides in pixels, few methods, no tests")
    add("--dtype", choices=sorted(DTYPES), help="dtype of all U-Nets")
    add("--rounds", type=int, default=7, help="rounds of each case (default 7)")
    add("--device", default="auto", help="a device, or auto for the first of CUDA, MPS and CPU (default auto)")
    add("--fresh", action="store_true", help="begin anew instead of adding to earlier results")
    add("--publish", action="store_true", help="measure nothing; write the results into docs/")
    add("--out", type=Path, default=Path("out/gpu"), help="folder for the results (default out/gpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
