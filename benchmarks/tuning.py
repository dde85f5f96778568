"""Whether tunings keep their promise, and whether they are the fastest that do.

On the embedded model, as it is and with its self-attention queries multiplied by 4 and by 8, which sharpens attention:
tuned on two prompts, checked on eight others with other noise, at timesteps that were not tuned on. Fixed settings are
checked on the same calls.

    python -m benchmarks.tuning times       # seconds of the candidates, which the tunings need: alone on the machine
    python -m benchmarks.tuning check       # tunings and deviations: any time
    python -m benchmarks.tuning rounds      # seconds of whole U-Net calls, in turn: alone on the machine
    python -m benchmarks.tuning cost        # of tuning and of observing closeness, on SD 1.5: alone on the machine
    python -m benchmarks.tuning report      # docs/measurements.md and measurements/tuning.csv
    python -m benchmarks.tuning all

All of them resume. A call's time is relative to full attention's: means over three timesteps of medians of rounds in
turn. A tolerance is kept if the mean deviation is at most the tolerance, and the worst at most 1.5 times it.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

import agentsd
from agentsd import AgentConfig, Tuning, early, embedded
from agentsd.embedded import EmbeddedPipeline
from agentsd.patching.closeness import EVERY
from agentsd.tuning.record import RecordedCall, progress_of
from agentsd.tuning.replay import Replay
from agentsd.tuning.tuner import Tuner, checked_candidates

from . import models
from .fidelity import covering, sharpened
from .machine import ROOT
from .methods import patched
from .pages import fill
from .results import table, write_json

SHARPNESS = (1, 4, 8)
SIZES = ((64, 64), (96, 96))
PAGE, DATA = ROOT / "docs/measurements.md", ROOT / "docs/measurements/tuning.csv"
HEAD = ("model", "tolerance", "mean", "worst", "kept", "picture", "time", "fastest fixed settings", "their time")
TOLERANCES = (0.005, 0.01, 0.03, 0.08)
TUNED_ON = ("red apple", "panda")
CHECKED_ON = ("avocado", "rose", "frog", "rainbow", "castle", "carrot", "cactus", "top hat")
# Guidance 1 evaluates the prompt alone, which takes half the time.
STEPS, PICTURES, GUIDANCE = 20, 2, 1.0
# Timesteps checked on; none of them is tuned on.
CHECKED = (920, 670, 420, 80)
# Timesteps tuned on, by size.
MOMENTS = {(64, 64): 5, (96, 96): 4}
ROUNDS, CLOSENESS_ROUNDS = 5, 6
# Share of the time up to which two settings are as fast as each other.
AS_FAST = 0.03
CALLS = "calls' time of tuning, for each recorded one"


# Settings that stay the same, whatever the model: the presets, and what a user might choose by hand.
CORRECTED = AgentConfig(ratio=0.0, agent_source="grid", method="corrected")
FIXED: Mapping[str, AgentConfig] = {
    "grid agents 4×4 until .6": replace(CORRECTED, method="agent", stages=early(0.6)),
    "preset Balanced: corrected 4×4": CORRECTED,
    "preset Fast: corrected 8×8": replace(CORRECTED, agent_ratio=0.98),
    "corrected 4×4, levels 0 and 1": replace(CORRECTED, max_downsample=2),
    "preset Faithful: corrected 4×4, 14 % exact": replace(CORRECTED, exact_ratio=0.14),
    "K/V 2×2": AgentConfig(method="pool", ratio=0.0, sx=2, sy=2),
}


@dataclass(frozen=True)
class Case:
    """One model at one size."""

    sharpness: int
    size: tuple[int, int]

    @property
    def name(self) -> str:
        return f"queries × {self.sharpness}, {self.size[1]}×{self.size[0]}"


CASES = [Case(s, size) for size in SIZES for s in SHARPNESS]
STEPS_OF_ALL = ("times", "check", "rounds", "cost", "report")


class Enough(Exception):
    """As much was computed as was asked for."""


class Store:
    """Results as JSON: each is computed once, and at most `left` of them in this run."""

    def __init__(self, path: Path, left: int = -1) -> None:
        self.path, self.left = path, left
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.data:
            if self.left == 0:
                raise Enough
            self.left -= 1
            self.data[key] = compute()
            write_json(self.path, self.data)
        return self.data[key]


class Bench:
    """The embedded model and the results."""

    def __init__(self, store: Store, cases: Sequence[Case]) -> None:
        self.store, self.cases = store, cases

    @cached_property
    def pipe(self) -> EmbeddedPipeline:
        return embedded.load()

    def sample(self, prompt: str, seed: int, size: tuple[int, int], steps: int) -> torch.Tensor:
        return self.pipe.sample(prompt, seed=seed, steps=steps, guidance=GUIDANCE, height=size[0], width=size[1])

    def calls(self, case: Case, prompts: Sequence[str], steps: int, moments: int) -> list[RecordedCall]:
        calls = []
        for seed, prompt in enumerate(prompts):
            with agentsd.record_calls(self.pipe.unet, moments) as recorded:
                self.sample(prompt, seed, case.size, steps)
            calls += recorded
        return calls

    def noised(self, case: Case, i: int, t: int) -> RecordedCall:
        """A call on the training picture of a prompt, noised to a timestep."""
        pipe, prompt, at = self.pipe, CHECKED_ON[i], torch.tensor(t)
        clean = covering(pipe.latents_of(pipe.pictures[[pipe.prompts.index(prompt)]]), *case.size)
        noise = pipe.noise([1000 * i + t], *case.size)
        return (pipe.scheduler.add_noise(clean, noise, at[None]), at, pipe.encode([prompt])), {}

    # Seconds of the candidates

    def times(self) -> None:
        for size in tqdm(SIZES, desc="times"):
            self.store.get(f"times {size[1]}×{size[0]}", lambda size=size: self._times(Case(1, size)))

    def _times(self, case: Case) -> list[list[Any]]:
        replay = Replay(self.pipe.unet, self.calls(case, TUNED_ON[:1], 4, 4))
        tuner = Tuner(replay, checked_candidates())
        with torch.no_grad():
            tuner.observe()
        full, ratios = tuner.probe.full, tuner.probe.ratios
        times = [[list(kind[0]), 0, median(seconds)] for kind, seconds in full.items()]
        return times + [[list(kind[0]), k, median(full[kind]) * median(each)] for (kind, k), each in ratios.items()]

    # Tunings, and what they deviate by

    def check(self) -> None:
        for case in (bar := tqdm(self.cases, desc="check")):
            bar.set_postfix_str(case.name)
            with sharpened(self.pipe.unet, case.sharpness):
                self._check(case)

    def _check(self, case: Case) -> None:
        tunings = self.store.get(f"tunings {case.name}", lambda: self._tune(case))
        configs = self._configs(tunings)
        for i in range(len(CHECKED_ON)):
            self.store.get(f"deviations {case.name}, {i}", lambda i=i: self._deviations(case, configs, i))
        if case.size == SIZES[0]:
            for i in range(PICTURES):
                self.store.get(f"pictures {case.name}, {i}", lambda i=i: self._pictures(case, configs, i))

    def _configs(self, tunings: Mapping[str, Any]) -> dict[str, AgentConfig]:
        """Fixed settings and tunings by name."""
        made = {f"tuned {t}": Tuning.from_dict(data).config_for(self.pipe.unet) for t, data in tunings.items()}
        return {**FIXED, **made}

    def _tune(self, case: Case) -> dict[str, Any]:
        start = time.perf_counter()
        replay = Replay(self.pipe.unet, self.calls(case, TUNED_ON, STEPS, MOMENTS[case.size]))
        tuner = Tuner(replay, checked_candidates())
        with torch.no_grad():
            tuner.observe()
            by_size = {(tuple(size), k): s for size, k, s in self.store.data[f"times {case.size[1]}×{case.size[0]}"]}
            kinds = {trials.kind for trials in tuner.probe.trials.values()} - {None}  # nothing was tried there
            tuner.probe.ratios.clear()
            for kind in kinds:
                full = by_size[kind[0], 0]
                tuner.probe.full[kind] = [full]
                mine = {k: s for (size, k), s in by_size.items() if size == kind[0] and k}
                tuner.probe.ratios.update({(kind, k): [s / full] for k, s in mine.items()})
            tuner.measure_effects()
            found = {str(t): tuner.tuning(t).to_dict() for t in TOLERANCES}
        tqdm.write(f"{case.name}: tuned in {time.perf_counter() - start:.0f} s, {replay.done} calls")
        return found

    def _deviations(self, case: Case, configs: Mapping[str, AgentConfig], i: int) -> dict[str, Any]:
        """(progress, deviation) of each call of one picture, for each config."""
        found: dict[str, list[Any]] = {name: [] for name in configs}
        replay = Replay(self.pipe.unet, [self.noised(case, i, t) for t in CHECKED])
        with torch.no_grad():
            for number, call in enumerate(replay.calls):
                replay.remember(number, "")
                deviations: dict[AgentConfig, float] = {}  # tunings to several tolerances may be the same
                for name, config in configs.items():
                    if config not in deviations:
                        deviations[config] = replay.deviation(number, replay.call(number, "", config)[0])
                    found[name].append([round(progress_of(call), 4), deviations[config]])
        return found

    def _pictures(self, case: Case, configs: Mapping[str, AgentConfig], i: int) -> dict[str, float]:
        """Deviation of the final latents, ‖out − full‖ / ‖full‖."""
        prompt, found = CHECKED_ON[i], {}
        full = self.sample(prompt, 100 + i, case.size, STEPS)
        for name, config in configs.items():
            if name in FIXED and not name.startswith("preset"):
                continue
            with patched(config)(self.pipe.unet):
                out = self.sample(prompt, 100 + i, case.size, STEPS)
            found[name] = ((out - full).norm() / full.norm()).item()
        return found

    # Seconds of whole calls

    def rounds(self) -> None:
        for case in (bar := tqdm(self.cases, desc="rounds")):
            bar.set_postfix_str(case.name)
            tunings = self.store.data.get(f"tunings {case.name}")
            if tunings is None:
                continue
            with sharpened(self.pipe.unet, case.sharpness):
                self.store.get(f"seconds {case.name}", lambda case=case, tunings=tunings: self._rounds(case, tunings))

    def _rounds(self, case: Case, tunings: Mapping[str, Any]) -> dict[str, list[float]]:
        """Seconds relative to full attention: means over three moments of medians over rounds."""
        configs = self._configs(tunings)
        wanted = [n for n in configs if n.startswith("tuned") or self.keeps(case, n, max(TOLERANCES))]
        replay = Replay(self.pipe.unet, [self.noised(case, 0, t) for t in (CHECKED[0], CHECKED[2], CHECKED[3])])
        ratios: dict[str, list[list[float]]] = {name: [[] for _ in range(len(replay))] for name in wanted}
        with torch.no_grad():
            for round_ in range(ROUNDS + 1):
                for number in range(len(replay)):
                    full = replay.call(number, "")[1]
                    for name in wanted:
                        seconds = replay.call(number, "", configs[name])[1]
                        if round_:  # the first is a warm-up
                            ratios[name][number].append(seconds / full)
        return {name: [median(of) for of in each] for name, each in ratios.items()}

    def cost(self) -> None:
        """Time of tuning SD 1.5's U-Net at 512×512, and of observing closeness there."""
        self.store.get("cost", _cost)

    # What was found

    def deviations(self, case: Case, name: str) -> list[float]:
        entries = (self.store.data.get(f"deviations {case.name}, {i}", {}) for i in range(len(CHECKED_ON)))
        return [d for entry in entries for _, d in entry.get(name, ())]

    def keeps(self, case: Case, name: str, tolerance: float) -> bool:
        """Whether the mean deviation is within the tolerance, and the worst within 1.5 times it."""
        found = self.deviations(case, name)
        return fmean(found) <= tolerance and max(found) <= 1.5 * tolerance

    def report(self, data: Path, page: Path) -> None:
        """Write a line for each case and tolerance, and the section "tuning" of the page."""
        done = [case for case in CASES if self.deviations(case, f"tuned {TOLERANCES[0]}")]
        rows = [self._row(case, t) for case in done for t in TOLERANCES]
        with data.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
        text = "\n".join([self._verdict(done), "", *table(HEAD, rows)])
        fill(page, "benchmarks.tuning", {"tuning": text})

    def _verdict(self, cases: Sequence[Case]) -> str:
        """Count the tunings that keep their tolerance, and those that fixed settings beat; say what tuning costs."""
        tunings = [(case, t) for case in cases for t in TOLERANCES]
        kept = [pair for pair in tunings if self.keeps(pair[0], f"tuned {pair[1]}", pair[1])]
        timed = [(case, t, self._seconds(case)) for case, t in tunings if self._seconds(case)]
        beaten = [case for case, t, s in timed if self._rival(case, t)[1] < (1 - AS_FAST) * s[f"tuned {t}"]]
        text = (
            f"Of {len(tunings)} tunings, {len(kept)} keep their tolerance on what they were not tuned on. Of "
            f"{len(timed)} that were timed, fixed settings that keep the same tolerance beat {len(beaten)}."
        )
        if cost := self.store.data.get("cost"):
            text += (
                f"\nTuning SD 1.5's U-Net (random weights, 512×512, bfloat16) took the time of {cost[CALLS]:.1f} U-Net "
                f"calls for each recorded call. Observing closeness there costs {cost['observing closeness']:+.2%}."
            )
        return text

    def _seconds(self, case: Case) -> dict[str, float]:
        return {name: fmean(each) for name, each in self.store.data.get(f"seconds {case.name}", {}).items()}

    def _rival(self, case: Case, t: float) -> tuple[str, float]:
        """Return the fastest fixed settings that keep a tolerance, and their time."""
        seconds = self._seconds(case)
        times = {name: seconds[name] for name in FIXED if name in seconds and self.keeps(case, name, t)}
        return min(times.items(), key=lambda item: item[1], default=("none", 1.0))

    def _row(self, case: Case, t: float) -> tuple[str, ...]:
        name = f"tuned {t}"
        found, kept = self.deviations(case, name), "yes" if self.keeps(case, name, t) else "**no**"
        times = ("", "", "")
        if seconds := self._seconds(case):
            rival, time_of = self._rival(case, t)
            times = (f"{seconds[name]:.2f}", rival, f"{time_of:.2f}")
        entries = (self.store.data.get(f"pictures {case.name}, {i}", {}) for i in range(PICTURES))
        latents = [entry[name] for entry in entries if name in entry]
        figures = (f"{fmean(found):.4f}", f"{max(found):.4f}", kept, f"{fmean(latents):.4f}" if latents else "")
        return (case.name, str(t), *figures, *times)


def _cost() -> dict[str, float]:
    layout, device, dtype = models.LAYOUTS["sd15"], torch.device("cpu"), torch.bfloat16
    unet = models.build(layout, device, dtype)
    inputs = models.make_inputs(layout, (512, 512), 1, device, dtype)
    kwargs = {name: value for name, value in inputs.items() if name != "x"}
    calls = [((inputs["x"], torch.full((1,), t)), kwargs) for t in (950.0, 770.0, 590.0, 410.0, 230.0, 50.0)]
    replay = Replay(unet, calls)
    with torch.no_grad():
        full = median([replay.call(i % 2, "")[1] for i in range(3)])
        start = time.perf_counter()
        tuning = agentsd.tune(unet, calls, 0.1)
        tuned = time.perf_counter() - start
        patch = agentsd.patch_unet(unet, CORRECTED)
        off, on = [], []
        for _ in range(CLOSENESS_ROUNDS):
            patch.observe_closeness = False
            off.append(replay.call(0, "")[1])
            patch.observe_closeness = True  # the first call after this is observed
            on.append(replay.call(0, "")[1])
        patch.remove()
    extra = median(a / b for a, b in zip(on, off, strict=True)) - 1
    return {
        "seconds of a call": full,
        CALLS: tuned / len(calls) / full,
        "blocks changed": sum(c != "." for c in tuning.choices[0]),
        "an observed call": extra,
        "observing closeness": extra / EVERY,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*STEPS_OF_ALL, "all"))
    out = Path("out/tuning.json")
    parser.add_argument("--out", type=Path, default=out, help=f"file to go on with ({out})")
    parser.add_argument("--side", type=int, choices=[size[0] for size in SIZES], help="only latents of this side")
    parser.add_argument("--most", type=int, default=-1, help="stop after as many measurements")
    args = parser.parse_args(arguments)
    cases = [case for case in CASES if args.side in (None, case.size[0])]
    bench = Bench(Store(args.out, args.most), cases)
    wanted = STEPS_OF_ALL if args.what == "all" else (args.what,)
    with suppress(Enough):
        for step in wanted:
            if step == "report":
                bench.report(DATA, PAGE)
            else:
                getattr(bench, step)()


if __name__ == "__main__":
    main()
