"""Tune a model: measure, choose, verify."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from ..checks import SettingError
from ..clock import WALL, Clock
from ..config import AgentConfig
from ..hosts import Site, find_unet, weight_of
from ..methods import METHODS, method_named, selectable
from ..patching.call import KVContext
from ..schedule import Rule
from ..version import VERSION
from ..words import percent
from .choose import Option, choose, deviation
from .fingerprint import adapters_of, ordered_sites, structure_of, weights_of
from .probe import FULL, Probe, installed, unpatched
from .record import RecordedCall
from .replay import MAX_ROUNDS, Progress, Replay, TimeRatio, timed_in_turn
from .result import BASE, FULL_LETTER, LETTERS, Candidate, Deviation, TunedBlock, TunedPlan, Tuning

# Tolerances of the frontier, beside the one that is asked for.
FRONTIER = (0.005, 0.01, 0.02, 0.05, 0.1)
# Time, full attention = 1, up to which a candidate counts as faster: a smaller gain is noise.
MAX_TIME = 0.95
# Share of all that could be saved which a block must save, or it keeps full attention.
MIN_SHARE_OF_SAVING = 0.01
# Share of full attention's time that using up the tolerance must save: to deviate for less is not worth it.
MIN_SAVING_BY_TOLERANCE = 0.03
# Groups of blocks for which the effect on the output is measured: one U-Net call each.
MAX_GROUPS = 6
# Rounds of choosing and running the whole plan.
MAX_VERIFICATIONS = 4
# Share of the tolerance that is aimed at: other images deviate a little more, or less, than those recorded.
AIM = 0.8
# Share of the aim that a plan should use: less means it can be faster.
MIN_USED = 0.8
# Share of the tolerance by which the same call may differ from time to time.
MAX_NOISE = 0.25
# Fraction of the diffusion around a single timestep for which a plan is used.
REACH = 0.1
# Fraction of the diffusion that may lie beyond the outermost parts: they are extended to the end.
MARGIN = 0.02
# Timesteps at which the plan is timed
MAX_TIMED = 2
# Time that a plan of the frontier must save beside a closer one, full attention = 1
MIN_STEP = 0.005


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
    """Find the fastest settings of each block that keep the U-Net's output within a tolerance, on this machine.

    Each recorded call is made once with full attention, while all candidates are tried in all blocks: their errors and
    their seconds. A few more calls tell what such errors do to the output. Then each block gets its settings for each
    part of the diffusion, so that the deviation stays below the tolerance; the whole is run on the recorded calls, and
    tightened until the measured deviation is below the tolerance at every moment. At last whole calls are timed without
    and with it in turn: a plan that cannot be told to be faster is not used. Where nothing was recorded, full attention
    stays. The model is left as it was, also by an error or an interrupt.

    Args:
        model: as for `apply_patch`. A patch on it is removed meanwhile.
        calls: calls of its U-Net, (args, kwargs), at several timesteps and with latents of one size: see
            `agentsd.record_calls`.
        tolerance: upper limit on ‖out − full‖ / ‖full‖ of the U-Net's output, above 0 and at most 1.
        methods: what to try: names of methods, or settings as in `agentsd.Rule`; None for all methods.
        progress: called with (done, total, text) before each U-Net call. Tuning stops if it returns False.
        kv_context: as for `agentsd.Patch`.
        clock: measures seconds.
        conditions: what the calls were made under, by name, such as {"lora": "detail 0.8"}; kept in the tuning.

    Raises:
        SettingError: an argument is outside its range.
        TuningCancelled: `progress` returned False.
        UnsupportedModelError: the model has no transformer blocks.
    """
    tolerance = _checked_tolerance(tolerance)
    candidates = checked_candidates(methods)
    tuner = Tuner(Replay(find_unet(model), calls, progress, kv_context, clock), candidates)
    with torch.no_grad(), unpatched(tuner.unet):
        tuner.measure()
        return replace(tuner.tuning(tolerance), conditions=dict(conditions or {}))


def _checked_tolerance(tolerance: Any) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance <= 1:
        raise SettingError(f"tolerance must be a number above 0 and at most 1, got {tolerance!r}")
    return float(tolerance)


def checked_candidates(methods: Any = None) -> list[Candidate]:
    """List the settings that `methods` of `tune` stands for."""
    entries = [method.name for method in selectable()] if methods is None else methods
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
        raise SettingError(f"methods must be a list of names or settings, got {methods!r}")
    found: list[Candidate] = []
    for entry in entries:
        if isinstance(entry, str):
            if entry not in METHODS:
                raise SettingError(f"methods must be of {', '.join(METHODS)}, got {entry!r}")
            found += [{"method": entry, **settings} for settings in method_named(entry).candidates]
        else:
            found.append(dict(Rule(entry).settings or {}))
    if not 1 <= len(found) <= len(LETTERS):
        raise SettingError(f"methods must name 1 to {len(LETTERS)} settings to try, got {len(found)}")
    AgentConfig(**BASE, rules=tuple(map(Rule, found)))  # checks names and ranges
    return found


@dataclass
class _Part:
    """A part of the diffusion: around the recorded calls of one timestep.

    Attributes:
        progress: where these calls are.
        calls: their numbers.
        constraints: numbers of calls whose squared deviations are averaged: those of this part, and halfway to its
            neighbours.
        options: options of each block that may change.
        scale: ratio of measured to predicted deviation.
        chosen: options chosen for now; None once they are settled.
        measured: deviation of the calls under `chosen`.
        best: options that were measured to keep the tolerance, and their deviation.
    """

    progress: float
    calls: list[int]
    constraints: list[tuple[int, ...]]
    options: list[list[Option]]
    scale: float = 1.0
    chosen: list[Option] | None = None
    measured: float = 0.0
    best: tuple[list[Option], float] | None = None

    def choose(self, tolerance: float) -> list[Option]:
        worth = MIN_SAVING_BY_TOLERANCE * sum(options[0].seconds for options in self.options)
        return choose(self.options, [tolerance / self.scale] * len(self.constraints), worth)

    def predicted(self, chosen: Sequence[Option]) -> float:
        """Predict the largest deviation of this part's own calls."""
        own = [k for k, of in enumerate(self.constraints) if len(of) == 1]
        return self.scale * max(deviation(chosen, k) for k in own)

    def settle(self, tolerance: float, last: bool) -> None:
        """Choose what to run next, given what was measured."""
        kept, chosen = self.measured <= tolerance, self.chosen
        if kept and (self.best is None or _seconds(chosen) < _seconds(self.best[0])):
            self.best = chosen, self.measured
        predicted = self.predicted(chosen)
        if predicted and self.measured:
            self.scale *= self.measured / predicted
        self.chosen = None
        if last or (kept and self.measured >= MIN_USED * tolerance):
            return
        following = self.choose(tolerance)
        if following == chosen and not kept:
            self.scale *= 1.1
            following = self.choose(tolerance)
        if self.best is None or _seconds(following) < _seconds(self.best[0]):
            self.chosen = following


class Tuner:
    """The state of one tuning. `measure` comes first; `tuning` may be called for several tolerances.

    Args:
        replay: the recorded calls.
        candidates: settings to try in every block.

    Attributes:
        noise: by how much the same call differs from time to time.
        notes: what could not be seen.
    """

    def __init__(self, replay: Replay, candidates: Sequence[Candidate]) -> None:
        self.replay, self.unet, self.candidates = replay, replay.unet, candidates
        self.sites, self.base = ordered_sites(self.unet), AgentConfig(**BASE)
        replay.total = len(replay) * (1 + MAX_GROUPS + MAX_VERIFICATIONS) + 1 + 2 * MAX_ROUNDS
        self.has_timesteps = None not in replay.moments
        at = replay.moments if self.has_timesteps else [0.0] * len(replay)
        # the recorded timesteps, and the numbers of their calls
        self.moments = {p: [i for i, q in enumerate(at) if p == q] for p in sorted(set(at))}
        self.noise, self.notes = 0.0, []

    def measure(self) -> None:
        """Measure what each candidate does to each block, and what that does to the output."""
        self.observe()
        self.blocks = self.tunable()
        self.measure_effects()

    def tuning(self, tolerance: float) -> Tuning:
        """Choose, verify and time."""
        parts = self.parts()
        if self.blocks and self.noise <= MAX_NOISE * tolerance:
            self.verify(parts, AIM * tolerance)
        return self.result(parts, tolerance)

    # Measure

    def observe(self) -> None:
        """Make each call with full attention, and try all candidates in all blocks."""
        configs, differs = [AgentConfig(**{**BASE, **candidate}) for candidate in self.candidates], 0.0
        self.probe = Probe(self.unet, configs, self.replay.kv_context, self.replay.clock)
        with installed(self.probe):
            for number in range(len(self.replay)):
                self.probe.make_room()
                differs = max(differs, self.replay.remember(number, "Trying the methods in every block"))
        again, self.seconds = self.replay.call(0, "Making a call again")
        self.noise = max(differs, self.replay.deviation(0, again))
        self.notes = list(self.probe.notes)
        trials = [self.probe.trials[site.name] for site in self.sites]
        skipped = sum(len(each.errors) < len(self.replay) or not all(each.errors) for each in trials if each.kind)
        if skipped:
            self.notes.append(f"{skipped} of {len(trials)} blocks did not run in every recorded call")

    def tunable(self) -> list[Site]:
        """Return the blocks in which a notable share of the time would be saved."""
        savings = [self._saving(site) for site in self.sites]
        least = MIN_SHARE_OF_SAVING * sum(savings)
        return [site for site, saving in zip(self.sites, savings, strict=True) if saving > least]

    def useful(self, site: Site) -> dict[int, float]:
        """Return the seconds of each candidate that was always tried in a block, and is faster than full attention."""
        errors, seconds = self.probe.trials[site.name].errors, self.probe.seconds(site.name)
        return {
            k: s
            for k, s in seconds.items()
            if k != FULL
            and s <= MAX_TIME * seconds[FULL]
            and all(math.isfinite(each.get(k, math.nan)) for each in errors)
        }

    def _saving(self, site: Site) -> float:
        useful = self.useful(site)
        return self.probe.seconds(site.name)[FULL] - min(useful.values()) if useful else 0.0

    def measure_effects(self) -> None:
        """Measure what errors in each block do to the U-Net's output: the ratio is the same for all candidates."""
        self.effects: dict[str, list[float]] = {}
        for group in self.groups():
            tried = {site.name: self._typical(site) for site in group}
            config, ratios = self.config([Rule(self.candidates[k - 1], blocks=name) for name, k in tried.items()]), []
            for number in range(len(self.replay)):
                error = math.hypot(*(self.probe.trials[name].errors[number][k] for name, k in tried.items()))
                moved = self.deviation(number, config, "Measuring what each block does to the image")
                ratios.append(moved / error if error else 0.0)
            self.effects.update(dict.fromkeys(tried, ratios))

    def _typical(self, site: Site) -> int:
        """Return the candidate of the middle error."""
        errors, useful = self.probe.trials[site.name].errors, self.useful(site)
        return sorted(useful, key=lambda k: fmean(e[k] for e in errors))[len(useful) // 2]

    def groups(self) -> list[list[Site]]:
        """Group neighbouring blocks of the same kind; the groups with the most to save are split first."""
        groups: list[list[Site]] = []
        for site in self.blocks:
            if groups and self.probe.trials[groups[-1][-1].name].kind == self.probe.trials[site.name].kind:
                groups[-1].append(site)
            else:
                groups.append([site])
        while len(groups) < MAX_GROUPS and any(len(group) > 1 for group in groups):
            largest = max((g for g in groups if len(g) > 1), key=lambda g: sum(map(self._saving, g)))
            at, middle = groups.index(largest), len(largest) // 2
            groups[at : at + 1] = [largest[:middle], largest[middle:]]
        return groups

    def config(self, rules: Sequence[Rule]) -> AgentConfig:
        return replace(self.base, rules=(Rule(None), *rules))

    def deviation(self, number: int, config: AgentConfig, text: str) -> float:
        """Make a call under a config; return its deviation."""
        return self.replay.deviation(number, self.replay.call(number, text, config)[0])

    # Choose

    def parts(self) -> list[_Part]:
        """A part of the diffusion for each recorded timestep."""
        numbers = list(self.moments.values())
        return [
            self._part(progress, numbers[i], [numbers[j] for j in (i - 1, i + 1) if 0 <= j < len(numbers)])
            for i, progress in enumerate(self.moments)
        ]

    def _part(self, progress: float, calls: list[int], neighbours: list[list[int]]) -> _Part:
        constraints = [(i,) for i in calls]
        # a part reaches halfway to its neighbours; what is between two timesteps is taken to lie between them
        constraints += [(i, j) for others in neighbours for i in calls for j in others]
        return _Part(progress, calls, constraints, [self._options(site, constraints) for site in self.blocks])

    def _options(self, site: Site, constraints: list[tuple[int, ...]]) -> list[Option]:
        errors, effect = self.probe.trials[site.name].errors, self.effects[site.name]
        options = [Option(FULL, self.probe.seconds(site.name)[FULL], (0.0,) * len(constraints))]
        for k, spent in self.useful(site).items():
            squares = [(effect[i] * error[k]) ** 2 for i, error in enumerate(errors)]
            options.append(Option(k, spent, tuple(fmean(squares[i] for i in of) for of in constraints)))
        return options

    # Verify

    def verify(self, parts: list[_Part], tolerance: float) -> None:
        """Run the whole plan, and choose again until every part keeps the tolerance and uses most of it."""
        for part in parts:
            part.chosen = part.choose(tolerance)
        for round_ in range(MAX_VERIFICATIONS):
            pending = [part for part in parts if part.chosen is not None]
            for part in pending:
                config = self.config(self.rules(part.chosen))
                part.measured = max(self.deviation(number, config, "Verifying the plan") for number in part.calls)
            for part in pending:
                part.settle(tolerance, last=round_ == MAX_VERIFICATIONS - 1)

    def rules(self, chosen: Sequence[Option]) -> list[Rule]:
        return [
            Rule(self.candidates[option.candidate - 1], blocks=site.name)
            for site, option in zip(self.blocks, chosen, strict=True)
            if option.candidate != FULL
        ]

    # Result

    def result(self, parts: list[_Part], tolerance: float) -> Tuning:
        kept = [part.best or (self._full(part), 0.0) for part in parts]
        chosen = [options for options, _ in kept]
        ratio = self.time(parts, chosen)
        wanted = self.plan(parts, chosen, tolerance, [measured for _, measured in kept])
        plan = replace(wanted, time=ratio.ratio, timed=True, peak=ratio.peaks[1])
        if not wanted.acts or ratio.high >= 1:  # nothing is faster, or nobody can tell
            full = self.plan(parts, list(map(self._full, parts)), tolerance, [0.0] * len(parts))
            plan = replace(full, time=1.0, peak=ratio.peaks[0])
        trusted = plan.acts or not wanted.acts
        since, before, after = self.edges()
        weight = weight_of(self.unet)
        return Tuning(
            size=self.replay.size,
            candidates=tuple(self.candidates),
            since=since,
            plan=plan,
            structure=structure_of(self.sites),
            weights=weights_of(self.unet),
            adapters=adapters_of(self.unet),
            blocks=tuple(TunedBlock(site.name, site.downsample) for site in self.sites),
            frontier=self.frontier(parts, plan, self._saved(parts, chosen)) if trusted else (plan,),
            seconds_full=ratio.seconds or self.seconds,
            peak_full=ratio.peaks[0],
            covers=(since[1] if before else 0.0, since[-1] if after else 1.0),
            notes=(*self.notes, *self._doubts(tolerance, wanted, ratio)),
            versions={
                "agentsd": VERSION,
                "torch": torch.__version__,
                "device": _device_name(weight.device),
                "dtype": str(weight.dtype).removeprefix("torch."),
            },
        )

    def _doubts(self, tolerance: float, plan: TunedPlan, ratio: TimeRatio) -> list[str]:
        """Say why nothing is changed although something might be gained."""
        if self.noise > MAX_NOISE * tolerance:
            return [
                f"not tuned within {percent(tolerance)}: the same U-Net call differs by {percent(self.noise)} from "
                "time to time, as beside a cache of steps or random merging"
            ]
        if plan.acts and not ratio.told:
            return ["it cannot be told whether the plan is faster: the machine is busy, or the gain is too small"]
        return []

    def _full(self, part: _Part) -> list[Option]:
        return [options[0] for options in part.options]

    def plan(
        self, parts: list[_Part], chosen: Sequence[Sequence[Option]], tolerance: float, measured: Sequence[float | None]
    ) -> TunedPlan:
        """Write the chosen options of each part, without their time."""
        deviations = (
            Deviation(part.progress, part.predicted(options) if options else 0.0, value)
            for part, options, value in zip(parts, chosen, measured, strict=True)
        )
        _, before, after = self.edges()
        full = FULL_LETTER * len(self.sites)
        choices = (*[full] * before, *map(self._letters, chosen), *[full] * after)
        return TunedPlan(tolerance, choices, tuple(deviations))

    def _letters(self, chosen: Sequence[Option]) -> str:
        by_name = {site.name: option.candidate for site, option in zip(self.blocks, chosen, strict=True)}
        numbers = [by_name.get(site.name, FULL) for site in self.sites]
        return "".join(FULL_LETTER if k == FULL else LETTERS[k - 1] for k in numbers)

    def edges(self) -> tuple[tuple[float, ...], bool, bool]:
        """Return where parts begin, and whether full attention is in front of the first and behind the last of them.

        A part reaches halfway to its neighbours, and as far on the other side, but no further: beyond it, nothing was
        measured.
        """
        if not self.has_timesteps:
            return (0.0,), False, False
        at = list(self.moments)
        middles = [(a + b) / 2 for a, b in pairwise(at)] or [at[0] + REACH]
        first, last = 2 * at[0] - middles[0], 2 * at[-1] - (middles[-1] if len(at) > 1 else at[0] - REACH)
        before, after = first > MARGIN, last < 1 - MARGIN
        since = [0.0, *([first] if before else []), *(middles if len(at) > 1 else []), *([last] if after else [])]
        return tuple(round(edge, 4) for edge in since), before, after

    def time(self, parts: list[_Part], chosen: Sequence[Sequence[Option]]) -> TimeRatio:
        """Time whole U-Net calls without and with the plan, in turn."""
        wanted = {len(parts) * (2 * i + 1) // (2 * MAX_TIMED) for i in range(MAX_TIMED)}
        acting = {parts[i].calls[0]: self.config(rules) for i in sorted(wanted) if (rules := self.rules(chosen[i]))}
        return timed_in_turn(self.replay, acting, "Timing the plan") if acting else TimeRatio(1.0, 1.0, 1.0)

    def frontier(self, parts: list[_Part], plan: TunedPlan, saved: float) -> tuple[TunedPlan, ...]:
        """Plan for several tolerances, beside the plan that was timed, whose blocks save `saved` seconds.

        Their times are expected: what their blocks save, in proportion to what those of the timed plan have saved in
        whole calls. Each is faster than all that are closer, and none that is closer promises more than the timed one.
        """
        scale = (1 - plan.time) / saved if plan.timed else 1 / self.seconds
        points, best = [], 1.0
        for tolerance in sorted({*FRONTIER, plan.tolerance}):
            if tolerance == plan.tolerance:
                points.append(plan)
                best = min(best, plan.time)
            elif self.blocks and self.noise <= MAX_NOISE * tolerance:
                chosen = [part.choose(AIM * tolerance) for part in parts]
                time = max(1 - scale * self._saved(parts, chosen), MIN_STEP)
                if tolerance < plan.tolerance:
                    time = max(time, plan.time + MIN_STEP)
                point = self.plan(parts, chosen, tolerance, [None] * len(parts))
                if point.acts and point.choices != plan.choices and time <= best - MIN_STEP:
                    points.append(replace(point, time=time))
                    best = time
        return tuple(points)

    def _saved(self, parts: list[_Part], chosen: Sequence[Sequence[Option]]) -> float:
        """Return the seconds that the chosen options save in a U-Net call, by the times of their blocks."""
        saved = (_seconds(self._full(part)) - _seconds(options) for part, options in zip(parts, chosen, strict=True))
        return fmean(saved)


def _seconds(chosen: Sequence[Option]) -> float:
    return sum(option.seconds for option in chosen)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
