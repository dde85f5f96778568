"""Tune a model: measure, choose, verify."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from .. import __version__
from ..checks import SettingError
from ..clock import peak_memory
from ..config import AgentConfig
from ..hosts import Site, find_unet, weight_of
from ..methods import METHODS, method_named, selectable
from ..patching.layer import KVContext
from ..schedule import Rule
from .choose import Option, choose, deviation
from .fingerprint import ordered_sites, structure_of, weights_of
from .probe import FULL, Probe, installed, unpatched
from .record import RecordedCall, progress_of
from .replay import Progress, Replay, called_under
from .result import BASE, FULL_LETTER, LETTERS, Candidate, Level, Moment, Point, Tuning

# Tolerances of the frontier, beside the one that is asked for.
FRONTIER = (0.005, 0.01, 0.02, 0.05, 0.1)
# Share of full attention's time up to which a candidate counts as faster: a smaller gain is noise.
_WORTH = 0.95
# Share of all that could be saved which a block must save, or it keeps full attention.
_NOTABLE = 0.01
# Share of full attention's time that using up the tolerance must save: to deviate for less is not worth it.
_WORTHWHILE = 0.03
# Groups of blocks for which the effect on the output is measured: one U-Net call each.
_GROUPS = 6
# Rounds of choosing and running the whole plan.
_ROUNDS = 4
# Share of the tolerance that is aimed at: other images deviate a little more, or less, than those recorded.
_AIM = 0.8
# Share of the aim that a plan should use: less means it can be faster.
_USED = 0.8
# Fraction of the diffusion around a single timestep for which a plan is used.
_REACH = 0.1
# Fraction of the diffusion that may lie beyond the outermost parts: they are extended to the end.
_MARGIN = 0.02
# Calls whose time is measured at the end, with and without, and how often.
_TIMED, _TIMINGS = 2, 2


def tune(
    model: Any,
    calls: Iterable[RecordedCall],
    tolerance: float = 0.02,
    *,
    methods: Iterable[str | Candidate] | None = None,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
) -> Tuning:
    """Find the fastest settings of each block that keep the U-Net's output within a tolerance, on this machine.

    Each recorded call is made once with full attention, while all candidates are tried in all blocks: their errors and
    their seconds. A few more calls tell what such errors do to the output. Then each block gets its settings for each
    part of the diffusion, so that the deviation stays below the tolerance; the whole is run on the recorded calls, and
    tightened until the measured deviation is below the tolerance at every moment. Candidates that are no faster here
    than full attention are never chosen. Where nothing was recorded, full attention stays. The model is left as it
    was, also by an error or an interrupt.

    Args:
        model: as for `apply_patch`. A patch on it is removed meanwhile.
        calls: calls of its U-Net, (args, kwargs), at several timesteps and with latents of one size: see
            `agentsd.record_calls`.
        tolerance: upper limit on ‖out − full‖ / ‖full‖ of the U-Net's output, above 0 and at most 1.
        methods: what to try: names of methods, or settings as in `agentsd.Rule`; None for all methods.
        progress: called with (done, total, text) before each U-Net call. Tuning stops if it returns False.
        kv_context: as for `agentsd.Patch`.

    Raises:
        SettingError: an argument is outside its range.
        TuningCancelled: `progress` returned False.
        UnsupportedModelError: the model has no transformer blocks.
    """
    tolerance = _checked_tolerance(tolerance)
    candidates = checked_candidates(methods)
    tuner = Tuner(Replay(find_unet(model), calls, progress), candidates, kv_context)
    with torch.no_grad(), unpatched(tuner.unet):
        tuner.measure()
        return tuner.tuning(tolerance)


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
        options: options of each block that is tuned.
        scale: ratio of measured to predicted deviation.
        chosen: options chosen for now.
        measured: deviation of each call under `chosen`; None if not run.
        best: options that were measured to keep the tolerance, and their deviation.
    """

    progress: float
    calls: list[int]
    constraints: list[tuple[int, ...]]
    options: list[list[Option]]
    scale: float = 1.0
    chosen: list[Option] | None = None
    measured: float | None = None
    best: tuple[list[Option], float] | None = None

    def choose(self, tolerance: float) -> list[Option]:
        worth = _WORTHWHILE * sum(options[0].seconds for options in self.options)
        return choose(self.options, [tolerance / self.scale] * len(self.constraints), worth)

    def predicted(self, chosen: Sequence[Option]) -> float:
        """Predict the largest deviation of this part's own calls."""
        return self.scale * max(deviation(chosen, k) for k, of in enumerate(self.constraints) if len(of) == 1)


class Tuner:
    """The state of one tuning. `measure` comes first; `tuning` may be called for several tolerances.

    Args:
        replay: the recorded calls.
        candidates: settings to try in every block.
        kv_context: as for `agentsd.Patch`.
    """

    def __init__(self, replay: Replay, candidates: Sequence[Candidate], kv_context: KVContext | None = None) -> None:
        self.replay, self.unet = replay, replay.unet
        self.candidates, self.kv_context = candidates, kv_context
        self.sites = ordered_sites(self.unet)
        self.base = AgentConfig(**BASE)
        replay.total = len(replay) * (3 + _GROUPS) + 2 * _TIMED * _TIMINGS
        at = [progress_of(call) for call in replay.calls]
        self.timed = None not in at
        # the timesteps, and the numbers of their calls
        self.moments = {p: [i for i, q in enumerate(at) if p == q] for p in sorted(set(at))} if self.timed else {}
        self.moments = self.moments or {0.0: list(range(len(replay)))}

    def measure(self) -> None:
        """Measure what each candidate does to each block, and what that does to the output."""
        self.observe()
        self.blocks = self.tunable()
        self.measure_effects()

    def tuning(self, tolerance: float) -> Tuning:
        """Choose and verify."""
        parts = self.parts()
        if self.blocks:
            self.verify(parts, _AIM * tolerance)
        return self.result(parts, tolerance)

    # Measure

    def observe(self) -> None:
        """Make each call with full attention, and try all candidates in all blocks."""
        self.probe = Probe(self.unet, [AgentConfig(**{**BASE, **c}) for c in self.candidates], self.kv_context)
        with installed(self.probe):
            for number in range(len(self.replay)):
                self.probe.make_room(number + 1)
                self.replay.remember(number, self.replay.call(number, "Trying the methods in every block")[0])

    def tunable(self) -> list[Site]:
        """Return the blocks in which a notable share of the time would be saved."""
        savings = [self._saving(site) for site in self.sites]
        return [site for site, saving in zip(self.sites, savings, strict=True) if saving > _NOTABLE * sum(savings)]

    def useful(self, site: Site) -> dict[int, float]:
        """Return the seconds of each candidate that was always tried in a block, and is faster than full attention."""
        trials, seconds = self.probe.trials[site.name], self.probe.seconds(site.name)
        return {
            k: s
            for k, s in seconds.items()
            if k != FULL
            and s < _WORTH * seconds[FULL]
            and all(math.isfinite(e.get(k, math.nan)) for e in trials.errors)
        }

    def _saving(self, site: Site) -> float:
        useful = self.useful(site)
        return self.probe.seconds(site.name)[FULL] - min(useful.values()) if useful else 0.0

    def measure_effects(self) -> None:
        """Measure what errors in each block do to the U-Net's output: the ratio is the same for all candidates."""
        self.effects: dict[str, list[float]] = {}
        for group in self.groups():
            tried = {site.name: self._typical(site) for site in group}
            rules = [Rule(self.candidates[k - 1], blocks=name) for name, k in tried.items()]
            ratios = []
            for number in range(len(self.replay)):
                error = math.hypot(*(self.probe.trials[name].errors[number][k] for name, k in tried.items()))
                moved = self.deviation(number, rules, "Measuring what each block does to the image")
                ratios.append(moved / error if error else 0.0)
            self.effects.update(dict.fromkeys(tried, ratios))

    def _typical(self, site: Site) -> int:
        """Return the candidate of the middle error."""
        errors = self.probe.trials[site.name].errors
        return sorted(self.useful(site), key=lambda k: fmean(e[k] for e in errors))[len(self.useful(site)) // 2]

    def groups(self) -> list[list[Site]]:
        """Group neighbouring blocks of the same kind; the groups with the most to save are split first."""
        groups: list[list[Site]] = []
        for site in self.blocks:
            if groups and self.probe.trials[groups[-1][-1].name].kind == self.probe.trials[site.name].kind:
                groups[-1].append(site)
            else:
                groups.append([site])
        while len(groups) < _GROUPS and any(len(group) > 1 for group in groups):
            largest = max((g for g in groups if len(g) > 1), key=lambda g: sum(map(self._saving, g)))
            at, middle = groups.index(largest), len(largest) // 2
            groups[at : at + 1] = [largest[:middle], largest[middle:]]
        return groups

    def config(self, rules: Sequence[Rule]) -> AgentConfig:
        return replace(self.base, rules=(Rule(None), *rules))

    def deviation(self, number: int, rules: Sequence[Rule], text: str) -> float:
        """Make a call under rules; return its deviation."""
        out, _ = called_under(self.replay, number, self.config(rules), text, self.kv_context)
        return self.replay.deviation(number, out)

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
        seconds, useful = self.probe.seconds(site.name), self.useful(site)
        errors, effect = self.probe.trials[site.name].errors, self.effects[site.name]
        options = [Option(FULL, seconds[FULL], (0.0,) * len(constraints))]
        for k, spent in useful.items():
            squares = [(effect[i] * error[k]) ** 2 for i, error in enumerate(errors)]
            options.append(Option(k, spent, tuple(fmean(squares[i] for i in of) for of in constraints)))
        return options

    # Verify

    def verify(self, parts: list[_Part], tolerance: float) -> None:
        """Run the whole plan, and choose again until every part keeps the tolerance and uses most of it."""
        for part in parts:
            part.chosen = part.choose(tolerance)
        for round_ in range(_ROUNDS):
            pending = [part for part in parts if part.chosen is not None]
            if not pending:
                break
            for part in pending:
                rules = self.rules(part.chosen)
                part.measured = max(self.deviation(number, rules, "Verifying the plan") for number in part.calls)
            for part in pending:
                part.chosen = self._next(part, tolerance, last=round_ == _ROUNDS - 1)

    def rules(self, chosen: Sequence[Option]) -> list[Rule]:
        return [
            Rule(self.candidates[option.candidate - 1], blocks=site.name)
            for site, option in zip(self.blocks, chosen, strict=True)
            if option.candidate != FULL
        ]

    def _next(self, part: _Part, tolerance: float, last: bool) -> list[Option] | None:
        """Choose what to run next for a part; None if it is settled."""
        kept = part.measured <= tolerance
        if kept and (part.best is None or _seconds(part.chosen) < _seconds(part.best[0])):
            part.best = part.chosen, part.measured
        predicted = part.predicted(part.chosen)
        if predicted and part.measured:
            part.scale *= part.measured / predicted
        if kept and part.measured >= _USED * tolerance:
            return None
        following = part.choose(tolerance)
        if _same(following, part.chosen) and not kept:
            part.scale *= 1.1
            following = part.choose(tolerance)
        settled = part.best is not None and _seconds(following) >= _seconds(part.best[0])
        return None if last or settled else following

    # Result

    def result(self, parts: list[_Part], tolerance: float) -> Tuning:
        full = [options[0] for options in (parts[0].options if self.blocks else [])]
        plans = [part.best or (full, 0.0) for part in parts]
        moments = tuple(
            Moment(part.progress, part.predicted(chosen) if chosen else 0.0, measured)
            for part, (chosen, measured) in zip(parts, plans, strict=True)
        )
        chosen = [plan for plan, _ in plans]
        (without, peak_full), (seconds, peak) = self.time(parts, chosen)
        weight = weight_of(self.unet)
        return Tuning(
            tolerance,
            self.replay.size,
            tuple(self.candidates),
            self.edges(parts)[0],
            self.choices(parts, chosen),
            structure_of(self.sites),
            weights_of(self.unet),
            tuple(Level(site.name, site.downsample) for site in self.sites),
            moments,
            without,
            seconds,
            self.frontier(parts, tolerance, chosen, without, seconds),
            {
                "agentsd": __version__,
                "torch": torch.__version__,
                "device": _device_name(weight.device),
                "dtype": str(weight.dtype).removeprefix("torch."),
            },
            peak_full,
            peak,
        )

    def edges(self, parts: list[_Part]) -> tuple[tuple[float, ...], bool, bool]:
        """Return where parts begin, and whether full attention is in front of the first and behind the last of them.

        A part reaches halfway to its neighbours, and as far on the other side, but no further: beyond it, nothing was
        measured.
        """
        if not self.timed:
            return (0.0,), False, False
        at = [part.progress for part in parts]
        middles = [(a + b) / 2 for a, b in pairwise(at)] or [at[0] + _REACH]
        first, last = 2 * at[0] - middles[0], 2 * at[-1] - (middles[-1] if len(at) > 1 else at[0] - _REACH)
        before, after = first > _MARGIN, last < 1 - _MARGIN
        since = [0.0, *([first] if before else []), *(middles if len(at) > 1 else []), *([last] if after else [])]
        return tuple(round(edge, 4) for edge in since), before, after

    def choices(self, parts: list[_Part], plans: Sequence[Sequence[Option]]) -> tuple[str, ...]:
        """Write the chosen options of each part as letters."""
        _, before, after = self.edges(parts)
        full = FULL_LETTER * len(self.sites)
        return (*[full] * before, *(self._letters(chosen) for chosen in plans), *[full] * after)

    def _letters(self, chosen: Sequence[Option]) -> str:
        by_name = {site.name: option.candidate for site, option in zip(self.blocks, chosen, strict=True)}
        numbers = [by_name.get(site.name, FULL) for site in self.sites]
        return "".join(FULL_LETTER if k == FULL else LETTERS[k - 1] for k in numbers)

    def time(self, parts: list[_Part], plans: list[list[Option]]) -> list[tuple[float, int | None]]:
        """Make whole U-Net calls without and with the plan, in turn: the mean seconds and the peak memory of each."""
        wanted = {len(parts) * (2 * i + 1) // (2 * _TIMED) for i in range(_TIMED)}
        seconds: list[list[float]] = [[], []]
        peaks: list[list[int]] = [[], []]
        for i in sorted(wanted):
            number, configs = parts[i].calls[0], (None, self.config(self.rules(plans[i])))
            rounds = [[self._timed(number, config) for config in configs] for _ in range(_TIMINGS)]
            for which, measured in enumerate(zip(*rounds, strict=True)):
                seconds[which].append(min(taken for taken, _ in measured))  # what else the machine does only adds to it
                peaks[which] += [peak for _, peak in measured if peak is not None]
        return [(fmean(each), max(held, default=None)) for each, held in zip(seconds, peaks, strict=True)]

    def _timed(self, number: int, config: AgentConfig | None) -> tuple[float, int | None]:
        def call() -> float:
            return called_under(self.replay, number, config, "Timing the plan", self.kv_context)[1]

        return peak_memory(call, self.replay.device)

    def frontier(
        self, parts: list[_Part], tolerance: float, chosen: list[list[Option]], without: float, seconds: float
    ) -> tuple[Point, ...]:
        """Plan for several tolerances; for the one asked for, what was chosen."""
        points = []
        for wanted in sorted({*FRONTIER, tolerance}):
            plans = chosen if wanted == tolerance else [part.choose(_AIM * wanted) for part in parts]
            moments = tuple(
                (part.progress, part.predicted(plan) if plan else 0.0) for part, plan in zip(parts, plans, strict=True)
            )
            saved = fmean(
                sum(options[0].seconds - option.seconds for options, option in zip(part.options, plan, strict=True))
                for part, plan in zip(parts, plans, strict=True)
            )
            spent = seconds if wanted == tolerance else max(without - saved, 0.0)
            points.append(Point(wanted, moments, spent, self.choices(parts, plans)))
        return tuple(points)


def _seconds(chosen: Sequence[Option]) -> float:
    return sum(option.seconds for option in chosen)


def _same(a: Sequence[Option], b: Sequence[Option]) -> bool:
    return [option.candidate for option in a] == [option.candidate for option in b]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
