"""What happens in a sampling pass: preview, run, API, playground and ComfyUI's nodes all ask `decide`."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..attention.grid import Grid
from ..checks import SettingError
from ..config import SMALL, AgentConfig
from ..costs import Estimate, Layout, estimate, layouts
from ..hosts.layout import layout_of
from ..methods import LayerPlan
from ..settings import schema, tunings
from ..settings.schema import is_left_out
from ..tuning.result import Tuning, TuningError
from .kept_tunings import Kept
from .timings import Timing, Timings, case_of

USUAL = "SD 1"  # layout while no model is loaded
_EVENLY = tuple(i / 50 for i in range(50))  # in place of the steps of a pass where they are not known


@dataclass(frozen=True)
class Hint:
    """Why something is so, or advice."""

    text: str  # a clause without a full stop
    remedy: tuple[str, ...] = ()  # names of the settings to change, or places in the host's own settings


@dataclass(frozen=True)
class SamplingPass:
    """One sampling pass."""

    latent: tuple[int, int]  # (height, width)
    of: str = tunings.FIRST  # its kind, one of `tunings.PASSES`
    moments: tuple[float, ...] | None = None  # progress of the diffusion, 0–1, at each step; None if not known
    checkpoint: str = ""  # that it is made with, if it is not the loaded one

    @property
    def hires(self) -> bool:
        return self.of == tunings.HIRES

    @property
    def end(self) -> str:
        """Name of the setting for when agents end."""
        return "hires_until" if self.hires else "until"

    def __str__(self) -> str:
        return f"{'Hires ' if self.hires else ''}{Grid(*self.latent).pixels}"


def evenly(steps: int) -> tuple[float, ...]:
    """Return the progress at each of `steps` steps from timestep 999 to 0, as most samplers take them by default."""
    return tuple(1 - 0.999 * (1 - i / max(1, steps - 1)) for i in range(steps))


@dataclass(frozen=True)
class Schedule:
    """Where the steps of a sampler are."""

    progress: Callable[[int], Sequence[float]] = evenly  # at each of so many steps of a whole diffusion
    extra: int = 1  # how many more steps an img2img pass makes than ⌊strength · steps⌋


class Program:
    """What `decide` asks of the program that samples. Its subclasses say what is different there."""

    timings = Timings(defaultdict[str, dict[str, Any]](dict).__getitem__)  # what was measured here

    def unet(self) -> nn.Module | None:
        """Return the U-Net of the current model; None if no model is loaded. Never loads one."""
        return None

    def checkpoint(self, what: str = "name") -> str:
        """Return the "name" or "shorthash" of the current checkpoint; empty if none is loaded or it is not known."""
        return ""

    def obstacle(self, sampling: SamplingPass) -> Hint | None:
        """Say what else acts on the model and keeps a pass from being patched."""
        return None

    def upcasts(self) -> bool:
        """Whether attention is to be computed in 32 bits, whatever the settings are."""
        return False

    def kept(self, sampling: SamplingPass) -> Kept | None:
        """Return the tuning that is kept for the current model and a pass."""
        return None

    def conditions(self) -> Mapping[str, str]:
        """Say under what the images are made, as `Tuning.conditions` does, as far as it is known."""
        return {}

    def even_if_slower(self, values: Mapping[str, Any]) -> bool:
        """Whether a pass with these settings is patched although that was measured to be slower here."""
        return False

    def advice(self, values: Mapping[str, Any]) -> Sequence[Hint]:
        """Give hints about the loaded model, given the settings."""
        return ()

    def with_options(self, texts: Sequence[str]) -> Program:
        """Return the program with options as an image's override settings have them, such as "Upcast: True"."""
        return self

    def schedule(self, sampler: str, scheduler: str) -> Schedule:
        """Return the schedule of a sampler, by the names that the program has for it."""
        return Schedule()

    def other_checkpoint(self) -> str:
        """Return the name of the checkpoint that the options ask for; empty if it is the current one."""
        return ""

    def makes_all_steps(self) -> bool:
        """Whether an img2img pass makes as many steps as were asked for, whatever its strength."""
        return False

    def moments(
        self, of: str, steps: int, hires_steps: int = 0, strength: float = 1.0, schedule: Schedule | None = None
    ) -> tuple[float, ...]:
        """Return the progress at each step of a pass, as the WebUIs make them.

        `hires_steps` is 0 for as many as `steps`; `strength` is the denoising strength of a hires or img2img pass.
        """
        schedule = schedule or Schedule()
        strength = min(strength, 0.999)
        if of == tunings.FIRST:
            return tuple(schedule.progress(steps))
        if of == tunings.IMG2IMG and not self.makes_all_steps():
            total, made = steps, int(strength * steps) + schedule.extra
        else:
            wanted = hires_steps if hires_steps and of == tunings.HIRES else steps
            total, made = int(wanted / strength) if strength > 0 else 0, wanted - 1 + schedule.extra
        return tuple(schedule.progress(total))[-made:] if total > 0 and made > 0 else ()


@dataclass(frozen=True)
class Decision:
    """What is done in a pass."""

    sampling: SamplingPass
    config: AgentConfig | None = None  # the settings to patch with; None if the pass is left alone
    reason: Hint | None = None  # why it is left alone, or advice on what is done
    tuning: Tuning | None = None  # that is used, or that says that nothing is faster
    doubts: str = ""  # what the pass differs in from what the tuning was made on, as far as it is known
    instead: str = ""  # why other settings apply where a tuning was asked for
    layers: tuple[tuple[LayerPlan, int], ...] = ()  # the distinct plans of the changed layers, with their numbers
    calls: Mapping[str, int] = field(default_factory=dict)  # self-attention calls by action, over the steps
    steps: int = 0  # in which something is changed
    share: float = 1.0  # of the FLOPs that is left over the pass; 1 if nothing changes
    least: float = 1.0  # the share that would be left if attention cost nothing in the changed layers
    timing: Timing | None = None  # what was measured here of passes like it; if it is not patched, it was slower
    key: tuple[str, str] | None = None  # under which seconds of this pass are kept; None if they can't be told
    refused: bool = False  # whether it is left alone although wanted: something is in the way, or a setting is wrong

    @property
    def patches(self) -> bool:
        return self.config is not None


def decide(values: Mapping[str, Any], sampling: SamplingPass, rows: int, program: Program) -> Decision:
    """Decide what happens in a sampling pass of a program.

    Args:
        values: every setting, in canonical form; whether it is switched on does not count.
        rows: rows of the U-Net's batch.
    """
    if is_left_out(values, sampling.hires):
        return Decision(sampling, reason=Hint("this pass is left out", ("passes",)))
    obstacle, unet = program.obstacle(sampling), program.unet()
    if obstacle is not None:
        return Decision(sampling, reason=obstacle, refused=True)
    try:
        config = _config(tuple(sorted(values.items())), sampling.hires, program.upcasts())
        made = Decision(sampling, config)
        made = _with_tuning(made, values, unet, program) if values["tuning"] else made
    except (SettingError, TuningError) as error:
        return Decision(sampling, reason=Hint(str(error)), refused=True)
    if not made.patches:
        return made
    key = None
    if unet is not None:
        key = case_of(unet, program.checkpoint(), sampling.latent, rows), repr(made.config)
        if unet not in _LAYOUTS:
            _LAYOUTS[unet] = layout_of(unet)
    made = _planned(made, values, layouts()[USUAL] if unet is None else _LAYOUTS[unet])
    if not made.patches or key is None:
        return made
    made = replace(made, key=key, timing=program.timings.find(key))
    if made.timing is None or not made.timing.slower or program.even_if_slower(values):
        return made
    why = Hint(f"measured to be slower here: {made.timing.words()}", ("Settings → Agent Attention",))
    return replace(made, config=None, reason=why)


@lru_cache(maxsize=256)
def _config(values: tuple[tuple[str, Any], ...], hires: bool, upcasts: bool) -> AgentConfig:
    """Make the core's config; once for each distinct set of settings. Raises as `schema.to_config` does."""
    given = dict(values)
    return schema.to_config({**given, "enabled": True, "fp32": given["fp32"] or upcasts}, hires=hires)


def _tunings(values: Mapping[str, Any], sampling: SamplingPass, program: Program) -> list[Tuning]:
    """List the tunings that the settings name for a pass; none if the other settings apply."""
    if values["tuning"] != tunings.AUTO:
        return tunings.matching(tunings.read(values["tuning"]), sampling.of, sampling.latent)
    kept, how_close = program.kept(sampling), values["how_close"]
    if kept is None:
        return []
    return [kept.tuning.at(schema.fraction_of(how_close)) if how_close else kept.tuning]


def _with_tuning(made: Decision, values: Mapping[str, Any], unet: nn.Module | None, program: Program) -> Decision:
    """Choose between the settings and a tuning; raises TuningError where one was given as text, for another model."""
    sampling, refusal = made.sampling, None
    for tuning in _tunings(values, sampling, program):
        try:
            fp32 = made.config.attn_precision
            config = made.config if unet is None else replace(tuning.config_for(unet), attn_precision=fp32)
        except TuningError as error:
            refusal = error
            continue
        plan = tuning.plan
        if not plan.acts:
            reason = Hint(f"{plan.gain}, so full attention stays", ("how_close",))
            return replace(made, config=None, tuning=tuning, reason=reason)
        if plan.timed and plan.speed_up < 1:
            reason = Hint(f"the tuning is slower than full attention: {plan.gain}", ("tuning",))
            return replace(made, config=None, tuning=tuning, reason=reason)
        start = sampling.moments[0] if sampling.moments else tuning.covers[0]
        return replace(made, config=config, tuning=tuning, doubts=tuning.doubts(program.conditions(), start))
    if refusal is not None and values["tuning"] != tunings.AUTO:
        raise refusal
    return replace(made, instead=str(refusal or "not tuned on this checkpoint at this size"))


# What is done in each part of the diffusion

# Layouts read so far: reading one walks over every module of the U-Net.
_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()
_cost = lru_cache(maxsize=1024)(estimate)


def _least(cost: Estimate) -> float:
    """Compute the share of FLOPs left if products of queries, keys and values cost nothing in changed layers."""
    return 1 - sum(4 * level.count * level.plan.tokens**2 * level.channels for level in cost.changed) / cost.flops


def _planned(made: Decision, values: Mapping[str, Any], layout: Layout) -> Decision:
    """Add what the config comes to in a U-Net. Where it comes to nothing, the pass is left alone."""
    sampling, config, tuned = made.sampling, made.config, made.tuning is not None
    if not layout.blocks or (tuned and layout.name == USUAL):
        return made  # nothing is known of the model, and a plan is for a certain one
    known, moments = sampling.moments is not None, _EVENLY if sampling.moments is None else sampling.moments
    first, edges = min(moments, default=1.0), [since for since, _ in config.parts()]
    steps = Counter(edges[bisect_right(edges, moment) - 1] for moment in moments)  # by the part that they are in
    costs = {since: _cost(layout, config, *sampling.latent, since) for since, until in config.parts() if until > first}
    begin, end = (0.0, 1.0) if tuned else (values["since"], values[sampling.end])
    own = next((cost for since, cost in costs.items() if begin <= since < end), None)  # of the user's own settings
    acting = {since: cost for since, cost in costs.items() if cost.changed or cost.share != 1}
    if not acting:
        done = f"{fraction(first)} of the diffusion is done when this pass begins"
        late = Hint(f"{done}, and agents end at {fraction(end)}", (sampling.end,))
        return replace(made, config=None, reason=late if own is None else last_veto(level.plan for level in own.levels))
    since = next(filter(steps.__getitem__, acting), next(iter(acting)))
    calls: Counter[str] = Counter()
    shown, total = acting[since], steps.total()
    for at, cost in costs.items():
        for level in cost.levels:
            calls[level.plan.action] += steps[at] * level.count

    def mean(left: Callable[[Estimate], float]) -> float:
        return sum(steps[at] * left(cost) for at, cost in costs.items()) / total if total else 1.0

    share = mean(attrgetter("share"))
    changing = sum(steps[at] for at in acting)
    return replace(
        made,
        reason=None if tuned else _advice(shown, shown if begin <= since < end else own, changing, share, sampling.end),
        layers=tuple((level.plan, level.count) for level in shown.changed),
        calls={action: n for action, n in calls.items() if n and known},
        steps=changing if known else 0,
        share=share,
        least=min(share, mean(_least)),
    )


# Vetoes before a method is asked, from the least telling: every usual setting leaves layers further down alone
_VETOES = ("max_downsample", "rules", "min_tokens", "merge_attn")


def last_veto(plans: Iterable[LayerPlan]) -> Hint:
    """Name the last veto of untouched layers: those that it stopped came closest to being changed."""

    def rank(plan: LayerPlan) -> int:
        return next((i for i, name in enumerate(_VETOES) if name in plan.remedy[:1]), len(_VETOES))

    plan = max(plans, key=rank)
    if plan.remedy == ("min_tokens",) and plan.tokens < SMALL:
        return Hint(f"nothing is to be gained from layers of {plan.tokens} tokens")
    return Hint(plan.reason, plan.remedy)


def _advice(shown: Estimate, own: Estimate | None, steps: int, share: float, end: str) -> Hint | None:
    """Give advice on what is done in a part of the diffusion; `own` is what the user's own settings come to."""
    if own is None:
        return Hint("agents end before this pass begins, so only what comes afterwards is done", (end,))
    if not steps:
        return Hint("no step lies between From and Until", ("since", end))
    changed = [level.plan for level in shown.changed]
    if shown is not own or not changed:
        veto = last_veto(level.plan for level in own.levels)
        return replace(veto, text=f"{'self-attention is left alone' if shown is own else 'no agents'}: {veto.text}")
    if all(plan.shortfall for plan in changed):
        return Hint(f"no agents: {changed[0].shortfall}", changed[0].remedy)
    if share > 1:
        return Hint("this costs more than it saves", ("agent_ratio",))
    tokens = max(plan.tokens for plan in changed)
    return Hint(f"nothing is gained from layers of {tokens} tokens", ("min_tokens",)) if tokens < SMALL else None


def fraction(value: float) -> str:
    """Format a fraction of the diffusion as the sliders show it, such as "0.6"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
