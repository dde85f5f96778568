"""Whether tunings keep their promise, and whether they are the fastest that do.

On the embedded model, as it is and with its self-attention queries multiplied by 4 and by 8, which sharpens attention:
tuned on two prompts, checked on eight others with other noise, at timesteps that were not tuned on. Fixed settings are
checked on the same calls.

    python -m benchmarks.tuning tune        # tunings: alone on the machine
    python -m benchmarks.tuning check       # what they and fixed settings deviate by: any time
    python -m benchmarks.tuning rounds      # seconds of whole U-Net calls, in turn: alone on the machine
    python -m benchmarks.tuning cost        # of tuning and of observing closeness, on SD 1.5: alone on the machine
    python -m benchmarks.tuning report      # docs/measurements.md and measurements/tuning.csv
    python -m benchmarks.tuning all

All of them resume. A call's time is relative to full attention's: means over three timesteps of medians of rounds in
turn. A tolerance is kept if the mean deviation is at most the tolerance, and the worst at most 1.5 times it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

import agentsd
from agentsd import AgentConfig, Tuning, early, embedded
from agentsd.embedded import EmbeddedPipeline
from agentsd.patching.closeness import EVERY

from . import models
from .fidelity import Case as Noised
from .fidelity import deviations, noised, sharpened
from .machine import DATA, PAGE, Machine, in_turn, parser_for, relative
from .methods import patched
from .results import fill, table, write_csv, write_json

MODULE, CPU = "benchmarks.tuning", torch.device("cpu")
SHARPNESS = (1, 4, 8)
SIZES = ((64, 64), (96, 96))
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
PARTS = ("tune", "check", "rounds", "cost", "report")


class Store:
    """Results as JSON, of which each is computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.data:
            self.data[key] = compute()
            write_json(self.path, self.data)
        return self.data[key]


class Bench:
    """The embedded model and the results."""

    def __init__(self, store: Store, cases: Sequence[Case] = CASES) -> None:
        self.store, self.cases = store, cases

    @cached_property
    def pipe(self) -> EmbeddedPipeline:
        return embedded.load()

    def sample(self, prompt: str, seed: int, size: tuple[int, int]) -> torch.Tensor:
        return self.pipe.sample(prompt, seed=seed, steps=STEPS, guidance=GUIDANCE, height=size[0], width=size[1])

    def noised(self, case: Case, i: int) -> Iterator[Noised]:
        """The training picture of a prompt, noised to each timestep that is checked on."""
        index = [self.pipe.prompts.index(CHECKED_ON[i])]
        for t in CHECKED:
            yield noised(self.pipe, index, case.size, t, torch.Generator().manual_seed(1000 * i + t))

    def configs(self, case: Case) -> dict[str, AgentConfig]:
        """Fixed settings, and the tunings that there are, by name."""
        found = {f"tuned {t}": self.store.data.get(f"tuning {case.name}, {t}") for t in TOLERANCES}
        tunings = {name: Tuning.from_dict(data) for name, data in found.items() if data}
        return {**FIXED, **{name: tuning.config_for(self.pipe.unet) for name, tuning in tunings.items()}}

    def run(self, part: str) -> None:
        """Compute what is missing of a part, with the model made as sharp as each case has it."""
        for case in (bar := tqdm(self.cases, desc=part)):
            bar.set_postfix_str(case.name)
            with sharpened(self.pipe.unet, case.sharpness):
                for key, compute in self._jobs(part, case):
                    self.store.get(key, compute)

    def _jobs(self, part: str, case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
        if part == "tune":
            yield from ((f"tuning {case.name}, {t}", partial(self._tune, case, t)) for t in TOLERANCES)
        elif part == "rounds":
            yield f"seconds {case.name}", partial(self._rounds, case)
        else:
            configs = self.configs(case)
            for i in range(len(CHECKED_ON)):
                yield f"deviations {case.name}, {i}", partial(self._deviations, case, configs, i)
                if case.size == SIZES[0] and i < PICTURES:
                    yield f"pictures {case.name}, {i}", partial(self._pictures, case, configs, i)

    def _tune(self, case: Case, tolerance: float) -> dict[str, Any]:
        calls = []
        for seed, prompt in enumerate(TUNED_ON):
            with agentsd.record_calls(self.pipe.unet, MOMENTS[case.size]) as recorded:
                self.sample(prompt, seed, case.size)
            calls += recorded
        return agentsd.tune(self.pipe.unet, calls, tolerance).to_dict()

    def _deviations(self, case: Case, configs: Mapping[str, AgentConfig], i: int) -> dict[str, list[float]]:
        """The deviation of each call of one picture, for each config."""
        calls = list(self.noised(case, i))
        found = {config: deviations(self.pipe, patched(config), calls) for config in dict.fromkeys(configs.values())}
        return {name: torch.cat(found[config]).tolist() for name, config in configs.items()}

    def _pictures(self, case: Case, configs: Mapping[str, AgentConfig], i: int) -> dict[str, float]:
        """Deviation of the final latents, ‖out − full‖ / ‖full‖."""
        prompt, found = CHECKED_ON[i], {}
        full = self.sample(prompt, 100 + i, case.size)
        for name, config in configs.items():
            if name in FIXED and not name.startswith("preset"):
                continue
            with patched(config)(self.pipe.unet):
                out = self.sample(prompt, 100 + i, case.size)
            found[name] = ((out - full).norm() / full.norm()).item()
        return found

    def _rounds(self, case: Case) -> dict[str, list[float]]:
        """Seconds relative to full attention: medians over rounds at each of three moments."""
        configs = self.configs(case)
        wanted = [n for n in configs if n.startswith("tuned") or self.keeps(case, n, max(TOLERANCES))]
        calls = [call for call in self.noised(case, 0) if call.t != CHECKED[1]]
        ratios: dict[str, list[list[float]]] = {name: [[] for _ in calls] for name in wanted}
        for _ in range(ROUNDS):
            for number, call in enumerate(calls):
                full = self._seconds_of(call, None)
                for name in wanted:
                    ratios[name][number].append(self._seconds_of(call, configs[name]) / full)
        return {name: [median(of) for of in each] for name, each in ratios.items()}

    def _seconds_of(self, call: Noised, config: AgentConfig | None) -> float:
        with nullcontext() if config is None else patched(config)(self.pipe.unet):
            call.forward(self.pipe)  # a first call plans, and is not timed
            return Machine(CPU).seconds(lambda: call.forward(self.pipe))

    # What was found

    def deviations(self, case: Case, name: str) -> list[float]:
        entries = (self.store.data.get(f"deviations {case.name}, {i}", {}) for i in range(len(CHECKED_ON)))
        return [d for entry in entries for d in entry.get(name, ())]

    def keeps(self, case: Case, name: str, tolerance: float) -> bool:
        """Whether the mean deviation is within the tolerance, and the worst within 1.5 times it."""
        found = self.deviations(case, name)
        return fmean(found) <= tolerance and max(found) <= 1.5 * tolerance

    def report(self, data: Path, page: Path) -> None:
        """Write a line for each case and tolerance, and the section "tuning" of the page."""
        done = [case for case in CASES if self.deviations(case, f"tuned {TOLERANCES[0]}")]
        rows = [self._row(case, t) for case in done for t in TOLERANCES]
        texts = [{name: _text(name, row.get(name, "")) for name in HEAD} for row in rows]
        write_csv(data, HEAD, texts)
        by_case = {
            (row["model"], row["tolerance"]): f"{row['time']:.2f}/{row[HEAD[-1]]:.2f}" for row in rows if "time" in row
        }
        columns = [(size, str(t)) for size in SIZES for t in TOLERANCES]
        short = [
            [f"queries × {s}", *(by_case.get((Case(s, size).name, t), "") for size, t in columns)] for s in SHARPNESS
        ]
        head = ["tuned/fixed", *(f"{size[1]}×{size[0]}: {t}" for size, t in columns)]
        fill(page, MODULE, {"tuning": "\n".join([self._verdict(rows), "", *table(head, short)])})

    def _row(self, case: Case, t: float) -> dict[str, Any]:
        name, found = f"tuned {t}", self.deviations(case, f"tuned {t}")
        entries = (self.store.data.get(f"pictures {case.name}, {i}", {}) for i in range(PICTURES))
        latents = [entry[name] for entry in entries if name in entry]
        row = {"model": case.name, "tolerance": str(t), "mean": fmean(found), "worst": max(found)}
        row |= {"kept": self.keeps(case, name, t), **({"picture": fmean(latents)} if latents else {})}
        if seconds := {n: fmean(each) for n, each in self.store.data.get(f"seconds {case.name}", {}).items()}:
            times = {each: seconds[each] for each in FIXED if each in seconds and self.keeps(case, each, t)}
            rival = min(times, key=times.__getitem__, default="none")
            row |= {"time": seconds[name], HEAD[-2]: rival, HEAD[-1]: times.get(rival, 1.0)}
        return row

    def _verdict(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Count the tunings that keep their tolerance, and those that fixed settings beat; say what tuning costs."""
        kept, timed = sum(row["kept"] for row in rows), [row for row in rows if "time" in row]
        beaten = sum(row[HEAD[-1]] < (1 - AS_FAST) * row["time"] for row in timed)
        text = (
            f"Of {len(rows)} tunings, {kept} keep their tolerance on what they were not tuned on. Of "
            f"{len(timed)} that were timed, fixed settings that keep the same tolerance beat {beaten}."
        )
        if cost := self.store.data.get("cost"):
            text += (
                f"\nTuning SD 1.5's U-Net (random weights, 512×512, bfloat16) took the time of {cost[CALLS]:.1f} U-Net "
                f"calls for each recorded call. Observing closeness there costs {cost['observing closeness']:+.2%}."
            )
        return text


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if "time" in name else f"{value:.4f}"
    return {True: "yes", False: "no"}.get(value, value)


def _cost() -> dict[str, float]:
    """Time of tuning SD 1.5's U-Net at 512×512, and of observing closeness there."""
    unet = models.build(models.LAYOUTS["sd15"], CPU, torch.bfloat16)
    inputs = models.make_inputs(models.LAYOUTS["sd15"], (512, 512), 1, CPU, torch.bfloat16)
    calls = [((), {**inputs, "timestep": torch.full((1,), t)}) for t in (950.0, 770.0, 590.0, 410.0, 230.0, 50.0)]
    machine = Machine(CPU)

    def call(observe: bool | None = None) -> None:
        if observe is not None:
            patch.observe_closeness = observe  # the first call after this is observed
        models.call(unet, inputs, 950.0)

    with torch.no_grad():
        full = median(in_turn({"": call}, 3, machine)[""])
        tuned = machine.seconds(lambda: agentsd.tune(unet, calls, 0.1))
        patch = agentsd.patch_unet(unet, CORRECTED)
        taken = in_turn({on: partial(call, on) for on in (False, True)}, CLOSENESS_ROUNDS, machine)
        patch.remove()
    return {CALLS: tuned / len(calls) / full, "observing closeness": (relative(taken, False)[True] - 1) / EVERY}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = parser_for(MODULE, __doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--out", type=Path, default=Path("out/tuning.json"), help="file to go on with (%(default)s)")
    parser.add_argument("--side", type=int, choices=[size[0] for size in SIZES], help="only latents of this side")
    args = parser.parse_args(arguments)
    bench = Bench(Store(args.out), [case for case in CASES if args.side in (None, case.size[0])])
    for part in PARTS if args.part == "all" else (args.part,):
        if part == "report":
            bench.report(DATA / "tuning.csv", PAGE)
        elif part == "cost":
            bench.store.get("cost", _cost)
        else:
            bench.run(part)


if __name__ == "__main__":
    main()
