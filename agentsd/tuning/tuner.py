"""Tune a model: measure, choose, verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any

import torch

from ..checks import SettingError
from ..clock import WALL, Clock
from ..config import AgentConfig
from ..hosts import Site, weight_of
from ..methods import METHODS, method_named, selectable
from ..patching.call import KVContext
from ..patching.joint import make_patch
from ..patching.patch import alone
from ..schedule import Rule
from ..version import VERSION
from ..words import percent
from .choose import Option, choose, deviation
from .fingerprint import adapters_of, ordered_sites, structure_of, weights_of
from .probe import FULL, Probe
from .record import RecordedCall
from .replay import MAX_ROUNDS, Progress, Replay, TimeRatio, timed_in_turn
from .result import BASE, FULL_LETTER, LETTERS, Candidate, Deviation, TunedPlan, Tuning, tuned_blocks

FRONTIER = (0.005, 0.01, 0.02, 0.05, 0.1)  # tolerances to plan for, beside the one that is asked for
MAX_TIME = 0.95  # full attention = 1, up to which a candidate counts as faster: a smaller gain is noise
MIN_SHARE_OF_SAVING = 0.01  # of all that could be saved, which a block must save, or it keeps full attention
MIN_SAVING_BY_TOLERANCE = 0.03  # share of full attention's time that using up the tolerance must save to be worth it
MAX_GROUPS = 6  # of blocks, for which the effect on the output is measured: one call of the model each
MAX_VERIFICATIONS = 4  # rounds of choosing and running the whole plan
AIM = 0.8  # share of the tolerance that is aimed at: other images deviate a little more, or less, than those recorded
MIN_USED = 0.8  # share of the aim that a plan should use: less means it can be faster
MAX_NOISE = 0.25  # share of the tolerance by which the same call may differ from time to time
REACH = 0.1  # fraction of the diffusion around a single timestep for which a plan is used
MARGIN = 0.02  # fraction that may lie beyond the outermost parts: they are extended to the end
MAX_TIMED = 2  # timesteps at which the plan is timed
MIN_STEP = 0.005  # time that a plan of the frontier must save beside a closer one, full attention = 1


def tune(
    model: Any,
    calls: Iterable[RecordedCall],
    tolerance: float = 0.02,
    *,
    methods: Iterable[str | Candidate] | None = None,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
    clock: Clock = WALL,
    conditions: Mapping[str, str] | None = None,
) -> Tuning:
    """Find the fastest settings of each block that keep the model's output within a tolerance, on this machine.

    docs/library.md says how. A plan that cannot be told to be faster on whole calls is not used; where nothing was
    recorded, full attention stays. The model is left as it was, also by an error or an interrupt.

    Args:
        model: as for `apply_patch`. A patch on it is removed meanwhile.
        calls: calls of its U-Net or transformer, (args, kwargs), at several timesteps and with latents of one size: see
            `agentsd.record_calls`.
        tolerance: upper limit on ‖out − full‖ / ‖full‖ of the model's output, above 0 and at most 1.
        methods: what to try: names of methods, or settings as in `agentsd.Rule`; None for all there are for the model.
        progress: called with (done, total, text) before each call of the model. Tuning stops if it returns False. Not
            the `progress` of `apply_patch` and `record_calls`, which maps timesteps.
        kv_context: as for `agentsd.Patch`.
        clock: measures seconds.
        conditions: what the calls were made under, by name, such as {"lora": "detail 0.8"}; kept in the tuning.

    Raises:
        SettingError: an argument is outside its range.
        TuningCancelled: `progress` returned False.
        UnsupportedModelError: the model has no transformer blocks.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance <= 1:
        raise SettingError(f"tolerance must be a number above 0 and at most 1, got {tolerance!r}")
    replay = Replay(model, calls, progress, kv_context, clock)
    tuner = _Tuner(replay, _candidates(methods, replay), float(tolerance))
    with torch.no_grad(), alone(replay.model):
        return replace(tuner.tuning(), conditions=dict(conditions or {}))


def _candidates(methods: Any, replay: Replay) -> list[Candidate]:
    """List the settings that `methods` of `tune` stands for; None stands for all that the model can have."""
    entries = [method.name for method in selectable()] if methods is None else methods
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
        raise SettingError(f"methods must be a list of names or settings, got {methods!r}")
    found: list[Candidate] = []
    for entry in entries:
        if not isinstance(entry, str):
            found.append(dict(Rule(entry).settings or {}))
        elif entry in METHODS:
            found += [{"method": entry, **settings} for settings in method_named(entry).candidates]
        else:
            raise SettingError(f"methods must be of {', '.join(METHODS)}, got {entry!r}")
    if not 1 <= len(found) <= len(LETTERS):
        raise SettingError(f"methods must name 1 to {len(LETTERS)} settings to try, got {len(found)}")
    possible = []
    for each in found:
        config = AgentConfig(**BASE, rules=(Rule(None), Rule(each)))  # checks names and ranges
        with suppress(*[SettingError] * (methods is None)):
            make_patch(replay.model, config, replay.kv_context)
            possible.append(each)
    return possible


# The option chosen for each block that may change
Chosen = Sequence[Option]


def _seconds(chosen: Chosen) -> float:
    return sum(option.seconds for option in chosen)


@dataclass
class _Part:
    """A part of the diffusion: around the recorded calls of one timestep."""

    progress: float  # where these calls are
    calls: list[int]  # their numbers, whose constraints are the first of an option's
    options: list[list[Option]]  # of each block that may change, full attention first
    scale: float = 1.0  # ratio of measured to predicted deviation

    def __post_init__(self) -> None:
        self.full: Chosen = [options[0] for options in self.options]
        self.best: Chosen = self.full  # what was measured to keep the tolerance
        self.measured = 0.0  # its deviation

    def choose(self, tolerance: float) -> Chosen:
        limits = [tolerance / self.scale] * len(self.full[0].squares) if self.full else []
        return choose(self.options, limits, MIN_SAVING_BY_TOLERANCE * _seconds(self.full))

    def predicted(self, chosen: Chosen) -> float:
        """Predict the largest deviation of this part's own calls."""
        return self.scale * max(deviation(chosen, k) for k in range(len(self.calls)))

    def verify(self, tolerance: float, run: Callable[[Chosen, list[int]], float]) -> None:
        """Run what is chosen, and choose again until it keeps the tolerance and uses most of it."""
        tried: list[Chosen] = []
        while len(tried) < MAX_VERIFICATIONS:
            chosen = self.choose(tolerance)
            if chosen in tried or _seconds(chosen) >= _seconds(self.best):
                return
            tried.append(chosen)
            predicted, measured = self.predicted(chosen), run(chosen, self.calls)
            if predicted and measured:
                self.scale *= measured / predicted
            if measured <= tolerance:
                self.best, self.measured = chosen, measured
                if measured >= MIN_USED * tolerance:
                    return


class _Tuner:
    """The state of one tuning."""

    def __init__(self, replay: Replay, candidates: Sequence[Candidate], tolerance: float) -> None:
        self.replay, self.model, self.candidates, self.tolerance = replay, replay.model, candidates, tolerance
        self.sites = ordered_sites(self.model)
        self.probe = Probe([AgentConfig(**{**BASE, **each}) for each in candidates], replay.clock)
        replay.total = len(replay) * (1 + MAX_GROUPS + MAX_VERIFICATIONS) + 1 + 2 * MAX_ROUNDS
        # the recorded timesteps, and the numbers of their calls
        self.moments: dict[float, list[int]] = {}
        known = None not in replay.moments
        for number, progress in enumerate(replay.moments if known else [0.0] * len(replay)):
            self.moments.setdefault(progress, []).append(number)
        # where parts begin; full attention is in front of the first and behind the last of them where they don't reach
        # the ends. A part reaches halfway to its neighbours, and as far on the other side: beyond, nothing was measured
        at = list(self.moments)
        middles = [(a + b) / 2 for a, b in pairwise(at)]
        first = at[0] - (middles[0] - at[0] if middles else REACH)
        last = at[-1] + (at[-1] - middles[-1] if middles else REACH)
        self.before, self.after = known and first > MARGIN, known and last < 1 - MARGIN
        edges = [0.0, *[first] * self.before, *middles, *[last] * self.after]
        self.since = tuple(round(edge, 4) for edge in edges)

    def tuning(self) -> Tuning:
        """Measure, choose, verify and time."""
        notes = self.observe()
        self.measure_effects()
        self.parts = self.divide()
        if self.can_tell(self.tolerance):
            for part in self.parts:
                part.verify(AIM * self.tolerance, self.verify)
        else:
            what = f"the same model call differs by {percent(self.noise)} from time to time"
            why = "as beside a cache of steps or random merging"
            notes.append(f"not tuned within {percent(self.tolerance)}: {what}, {why}")
        tried, chosen = self.time(), [part.best for part in self.parts]
        wanted = self.plan(chosen, self.tolerance, [part.measured for part in self.parts])
        untold = wanted.acts and tried.low <= 1 <= tried.high
        if wanted.acts and tried.high < 1:
            plan = replace(wanted, time=tried.ratio, timed=True, peak=tried.peaks[1])
            frontier = self.frontier(plan, (1 - tried.ratio) / self.saved(chosen))
        else:  # nothing is faster, or nobody can tell
            full = self.plan([part.full for part in self.parts], self.tolerance, [0.0] * len(self.parts))
            plan = replace(full, time=1.0, peak=tried.peaks[0], untold=untold)
            frontier = (plan,) if wanted.acts else self.frontier(plan, 1 / self.seconds)
        if untold:
            notes.append("it cannot be told whether the plan is faster: the machine is busy, or the gain is too small")
        weight, (height, width), patch = weight_of(self.model), self.replay.size, self.sites[0].patch
        return Tuning(
            size=(height * patch, width * patch),
            candidates=tuple(self.candidates),
            since=self.since,
            plan=plan,
            structure=structure_of(self.sites),
            weights=weights_of(self.model),
            adapters=adapters_of(self.model),
            blocks=tuned_blocks(self.sites),
            frontier=frontier,
            seconds_full=tried.seconds or self.seconds,
            peak_full=tried.peaks[0],
            covers=(self.since[1] if self.before else 0.0, self.since[-1] if self.after else 1.0),
            notes=tuple(notes),
            versions={
                "agentsd": VERSION,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
                "dtype": str(weight.dtype).removeprefix("torch."),
            },
        )

    # Measure

    def observe(self) -> list[str]:
        """Make each call with full attention, trying all candidates in all blocks; return notes."""
        replay, probe = self.replay, self.probe
        self.noise = 0.0  # by how much the same call differs from time to time
        patch = make_patch(self.model, probe.candidates[1], replay.kv_context, probe)
        with alone(self.model, patch), probe.watching(self.sites):
            for probe.number in range(len(replay)):
                self.noise = max(self.noise, replay.remember(probe.number, "Trying the methods in every block"))
        again, self.seconds = replay.call(0, "Making a call again")
        self.noise = max(self.noise, replay.deviation(0, again))
        self.times = {site.name: self.useful(site.name) for site in self.sites}
        skipped = sum(0 < len(probe.errors[site.name]) < len(replay) for site in self.sites)
        said = f"{skipped} of {len(self.sites)} blocks did not run in every recorded call"
        return [*patch.notes, *[said] * (skipped > 0)]

    def can_tell(self, tolerance: float) -> bool:
        """Whether a tolerance is well above what can't be seen."""
        return self.noise <= MAX_NOISE * tolerance

    def useful(self, name: str) -> dict[int, float]:
        """Return the seconds of full attention in a block, and of candidates that were always tried and are faster."""
        errors, seconds = self.probe.errors[name], self.probe.seconds(name)
        calls = [errors.get(number, {}) for number in range(len(self.replay))]
        always = [k for k in seconds if all(math.isfinite(tried.get(k, math.nan)) for tried in calls)]
        return {FULL: seconds[FULL]} | {k: seconds[k] for k in always if seconds[k] <= MAX_TIME * seconds[FULL]}

    def saving(self, site: Site) -> float:
        times = self.times[site.name].values()
        return max(times) - min(times)

    def measure_effects(self) -> None:
        """Measure what an error in a block does to the output, where a notable share of the time would be saved."""
        least = MIN_SHARE_OF_SAVING * sum(map(self.saving, self.sites))
        self.blocks = [site for site in self.sites if self.saving(site) > least]
        self.effects: dict[str, list[float]] = {}
        for group in self.groups():
            tried, calls = {site.name: self.typical(site.name) for site in group}, range(len(self.replay))
            moved = self.deviations(tried, calls, "Measuring what each block does to the image")
            errors = [math.hypot(*(self.probe.errors[name][i][k] for name, k in tried.items())) for i in calls]
            ratios = [a / b if b else 0.0 for a, b in zip(moved, errors, strict=True)]
            self.effects.update(dict.fromkeys(tried, ratios))

    def typical(self, name: str) -> int:
        """Return the candidate of the middle error."""
        errors, useful = self.probe.errors[name].values(), self.times[name].keys() - {FULL}
        return sorted(useful, key=lambda k: fmean(e[k] for e in errors))[len(useful) // 2]

    def groups(self) -> list[list[Site]]:
        """Group neighbouring blocks of the same kind; the groups with the most to save are split first."""
        # a transformer's second attentions stand between the others
        blocks = sorted(self.blocks, key=lambda site: site.name.endswith("attn2"))
        groups = [list(run) for _, run in groupby(blocks, lambda site: self.probe.kinds.get(site.name))]
        while len(groups) < MAX_GROUPS and any(len(group) > 1 for group in groups):
            largest = max((g for g in groups if len(g) > 1), key=lambda g: sum(map(self.saving, g)))
            at, middle = groups.index(largest), len(largest) // 2
            groups[at : at + 1] = [largest[:middle], largest[middle:]]
        return groups

    def config(self, numbers: Mapping[str, int]) -> AgentConfig:
        """Make the config of the candidates chosen for some blocks, by name and number."""
        rules = (Rule(self.candidates[k - 1], blocks=name) for name, k in numbers.items() if k != FULL)
        return AgentConfig(**BASE, rules=(Rule(None), *rules))

    def deviations(self, numbers: Mapping[str, int], calls: Iterable[int], text: str) -> list[float]:
        """Make calls with candidates, by the block's name; return their deviations."""
        config = self.config(numbers)
        return [self.replay.deviation(i, self.replay.call(i, text, config)[0]) for i in calls]

    # Choose and verify

    def divide(self) -> list[_Part]:
        """A part of the diffusion for each recorded timestep."""
        parts, numbers = [], list(self.moments.values())
        for i, (progress, calls) in enumerate(self.moments.items()):
            others = [j for k in (i - 1, i + 1) if 0 <= k < len(numbers) for j in numbers[k]]
            # a part reaches halfway to its neighbours; what is between two timesteps is taken to lie between them
            constraints = [*((i,) for i in calls), *((i, j) for j in others for i in calls)]
            parts.append(_Part(progress, calls, [self.options(site.name, constraints) for site in self.blocks]))
        return parts

    def options(self, name: str, constraints: list[tuple[int, ...]]) -> list[Option]:
        """The options of a block, full attention first; squares are averaged over the calls of a constraint."""
        errors, effects, options = self.probe.errors[name], self.effects[name], []
        for k, seconds in self.times[name].items():
            squares = [(effect * errors[i].get(k, 0.0)) ** 2 for i, effect in enumerate(effects)]
            options.append(Option(k, seconds, tuple(fmean(squares[i] for i in of) for of in constraints)))
        return options

    def numbers(self, chosen: Chosen) -> dict[str, int]:
        return {site.name: option.candidate for site, option in zip(self.blocks, chosen, strict=True)}

    def verify(self, chosen: Chosen, calls: list[int]) -> float:
        """Run a plan; return its largest deviation."""
        return max(self.deviations(self.numbers(chosen), calls, "Verifying the plan"))

    def plan(self, chosen: Sequence[Chosen], tolerance: float, measured: Sequence[float | None]) -> TunedPlan:
        """Write the chosen options of each part, without their time."""
        letters, deviations, full = [], [], FULL_LETTER * len(self.sites)
        for part, options, value in zip(self.parts, chosen, measured, strict=True):
            numbers = self.numbers(options)
            letters.append("".join((FULL_LETTER + LETTERS)[numbers.get(site.name, FULL)] for site in self.sites))
            deviations.append(Deviation(part.progress, part.predicted(options) if options else 0.0, value))
        return TunedPlan(tolerance, (*[full] * self.before, *letters, *[full] * self.after), tuple(deviations))

    def time(self) -> TimeRatio:
        """Time whole calls without and with the plan, in turn."""
        wanted = sorted({len(self.parts) * (2 * i + 1) // (2 * MAX_TIMED) for i in range(MAX_TIMED)})
        numbers = {part.calls[0]: self.numbers(part.best) for part in (self.parts[i] for i in wanted)}
        acting = {call: self.config(each) for call, each in numbers.items() if any(each.values())}
        return timed_in_turn(self.replay, acting, "Timing the plan") if acting else TimeRatio(1.0, 1.0, 1.0)

    def saved(self, chosen: Sequence[Chosen]) -> float:
        """Return the seconds that the chosen options save in a model call, by the times of their blocks."""
        return fmean(_seconds(part.full) - _seconds(each) for part, each in zip(self.parts, chosen, strict=True))

    def frontier(self, plan: TunedPlan, scale: float) -> tuple[TunedPlan, ...]:
        """Plan for several tolerances, beside the plan of the one that was asked for.

        Their times are expected: `scale` times the seconds that their blocks save, which those of the timed plan have
        saved in whole calls. Each is faster than all that are closer, and none that is closer promises more than the
        timed one.
        """
        points, best = [], 1.0
        for tolerance in sorted({*FRONTIER, plan.tolerance}):
            if tolerance == plan.tolerance:
                points.append(plan)
                best = min(best, plan.time)
            elif self.can_tell(tolerance):
                chosen = [part.choose(AIM * tolerance) for part in self.parts]
                time = max(1 - scale * self.saved(chosen), MIN_STEP)
                if tolerance < plan.tolerance:
                    time = max(time, plan.time + MIN_STEP)
                point = self.plan(chosen, tolerance, [None] * len(self.parts))
                if point.acts and point.choices != plan.choices and time <= best - MIN_STEP:
                    points.append(replace(point, time=time))
                    best = time
        return tuple(points)
