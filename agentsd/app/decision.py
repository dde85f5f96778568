"""What happens in a sampling pass: decided here, and nowhere else.

The preview, the run, an API's answer, the playground and the ComfyUI nodes ask `decide`. Imports neither gradio nor a
WebUI.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..attention.grid import Grid
from ..checks import SettingError
from ..config import SMALL, AgentConfig
from ..costs import Estimate, Layout, estimate, layouts
from ..methods import LayerPlan
from ..settings import schema, tunings
from ..tuning.result import TunedPlan, Tuning, TuningError
from .kept_tunings import Kept, config_of, plans
from .timings import Timing, Timings, case_of

if TYPE_CHECKING:
    from torch import nn

# Layout used while no model is loaded
USUAL = "SD 1"
# In place of the steps of a pass where they are not known
_EVENLY = tuple(i / 50 for i in range(50))


@dataclass(frozen=True)
class Hint:
    """Why something is so, or advice.

    Attributes:
        text: a clause without a full stop.
        remedy: names of the settings to change, or places in the host's own settings.
    """

    text: str
    remedy: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingPass:
    """One sampling pass.

    Attributes:
        latent: (height, width) of the latent.
        of: the kind of pass: one of `tunings.PASSES`.
        moments: progress of the diffusion, 0–1, at each step; None if the steps are not known.
        checkpoint: the checkpoint that it is made with, if it is not the loaded one.
    """

    latent: tuple[int, int]
    of: str = tunings.FIRST
    moments: tuple[float, ...] | None = None
    checkpoint: str = ""

    @property
    def hires(self) -> bool:
        return self.of == tunings.HIRES

    @property
    def end(self) -> str:
        """Name of the setting for when agents end in this pass."""
        return "hires_until" if self.hires else "until"

    def __str__(self) -> str:
        return f"{'Hires ' if self.hires else ''}{Grid(*self.latent).pixels}"


def evenly(steps: int) -> tuple[float, ...]:
    """Return the progress at each of `steps` steps from timestep 999 to 0, as most samplers take them by default."""
    return tuple(1 - 0.999 * (1 - i / max(1, steps - 1)) for i in range(steps))


@dataclass(frozen=True)
class Schedule:
    """Where the steps of a sampler are.

    Attributes:
        progress: returns the progress at each step of a whole diffusion, by the number of steps that were asked for.
        extra: how many more steps an img2img pass makes than ⌊strength · steps⌋.
    """

    progress: Callable[[int], Sequence[float]] = evenly
    extra: int = 1


class Program:
    """What `decide` asks of the program that samples. Its subclasses say what is different there.

    Attributes:
        timings: what was measured here.
    """

    timings = Timings({}.setdefault)

    def unet(self) -> nn.Module | None:
        """Return the U-Net of the current model; None if no model is loaded. Never loads one."""
        return None

    def checkpoint(self) -> str:
        """Return the name of the current model."""
        return ""

    def obstacle(self, sampling: SamplingPass) -> Hint | None:
        """Say what else acts on the model and keeps a pass from being patched; None if nothing does."""
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

    def even_if_slower(self) -> bool:
        """Whether a pass is patched although that was measured to be slower here."""
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

        Args:
            of: the kind of pass.
            steps: the steps that were asked for.
            hires_steps: those of the hires pass; 0 for as many.
            strength: denoising strength, 0–1, of a hires or img2img pass.
            schedule: that of its sampler.
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
    """What is done in a pass.

    Attributes:
        sampling: the pass.
        config: the settings to patch with; None if the pass is left alone.
        reason: why it is left alone, or advice on what is done.
        tuning: the tuning that is used, or that says that nothing is faster.
        doubts: what the pass differs in from what the tuning was made on; empty if nothing is known to.
        instead: why other settings apply where a tuning was asked for.
        layers: the distinct plans of the layers that are changed, each with its number of layers.
        calls: number of self-attention calls by action, over the steps of the pass.
        steps: the steps in which something is changed.
        share: share of FLOPs that is left over the pass; 1 if nothing changes.
        least: the share that would be left if attention cost nothing in the layers that are changed.
        timing: what was measured here of passes like it.
        key: under which seconds of this pass are kept; None if they can't be told.
        refused: whether it is left alone although it was wanted: something is in the way, or a setting is wrong.
    """

    sampling: SamplingPass
    config: AgentConfig | None = None
    reason: Hint | None = None
    tuning: Tuning | None = None
    doubts: str = ""
    instead: str = ""
    layers: tuple[tuple[LayerPlan, int], ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    share: float = 1.0
    least: float = 1.0
    timing: Timing | None = None
    key: tuple[str, str] | None = None
    refused: bool = False

    @property
    def patches(self) -> bool:
        """Whether the pass is patched."""
        return self.config is not None

    @property
    def plan(self) -> tunings.PassTuning | None:
        """The tuning that is used, with the pass that it is for."""
        return tunings.PassTuning(self.sampling.of, self.tuning) if self.patches and self.tuning else None


def is_left_out(values: Mapping[str, Any], hires: bool) -> bool:
    """Whether the user has chosen the other pass."""
    return values["passes"] == (schema.FIRST if hires else schema.HIRES)


def decide(values: Mapping[str, Any], sampling: SamplingPass, rows: int, program: Program) -> Decision:
    """Decide what happens in a sampling pass.

    Args:
        values: every setting, in canonical form; whether it is switched on does not count.
        sampling: the pass.
        rows: rows of the U-Net's batch.
        program: the program that samples.
    """
    if is_left_out(values, sampling.hires):
        return Decision(sampling, reason=Hint("this pass is left out", ("passes",)))
    obstacle = program.obstacle(sampling)
    if obstacle is not None:
        return Decision(sampling, reason=obstacle, refused=True)
    try:
        config = _config(tuple(sorted(values.items())), sampling.hires, program.upcasts())
        made = _with_tuning(values, sampling, config, program)
    except (SettingError, TuningError) as error:
        return Decision(sampling, reason=Hint(str(error)), refused=True)
    if made.config is None:
        return made
    unet = program.unet()
    if unet is not None:
        key = case_of(unet, program.checkpoint(), sampling.latent, rows), repr(made.config)
        made = replace(made, key=key, timing=program.timings.find(key))
    made = _planned(made, values, layouts()[USUAL] if unet is None else layout_of_unet(unet))
    if made.config is not None and made.timing and made.timing.slower and not program.even_if_slower():
        where = ("Settings → Agent Attention",)
        return replace(made, config=None, reason=Hint(f"measured to be slower here: {made.timing.words()}", where))
    return made


@lru_cache(maxsize=256)
def _config(values: tuple[tuple[str, Any], ...], hires: bool, upcasts: bool) -> AgentConfig:
    """Make the core's config; once for each distinct set of settings.

    Raises:
        SettingError: settings contradict each other.
    """
    given = dict(values)
    return schema.to_config({**given, "enabled": True, "fp32": given["fp32"] or upcasts}, hires=hires)


def _with_tuning(values: Mapping[str, Any], sampling: SamplingPass, config: AgentConfig, program: Program) -> Decision:
    """Choose between the settings and a tuning.

    Raises:
        TuningError: a tuning was given as text, and is for another model.
    """
    made = Decision(sampling, config)
    if not values["tuning"]:
        return made
    auto, refusal, unet = values["tuning"] == tunings.AUTO, None, program.unet()
    for plan in plans(values, sampling.of, sampling.latent, program.kept(sampling) if auto else None):
        try:
            tuned = None if unet is None else config_of(plan, unet, config.attn_precision)
        except TuningError as error:
            refusal = error
            continue
        slower = _slower(plan.plan)
        if slower is not None:
            return replace(made, config=None, tuning=plan, reason=slower)
        start = sampling.moments[0] if sampling.moments else plan.covers[0]
        doubts = plan.doubts(program.conditions(), start)
        return replace(made, config=tuned or config, tuning=plan, doubts=doubts)
    if refusal is not None and not auto:
        raise refusal
    return replace(made, instead=str(refusal or "not tuned on this checkpoint at this size"))


def _slower(plan: TunedPlan) -> Hint | None:
    """Say why a tuning is of no use; None if it is."""
    if not plan.acts:
        return Hint(f"{plan.gain}, so full attention stays", ("how_close",))
    if plan.timed and plan.speed_up < 1:
        return Hint(f"the tuning is slower than full attention: {plan.gain}", ("tuning",))
    return None


# Layouts read so far: reading one walks over every module of the U-Net.
_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of_unet(unet: nn.Module) -> Layout:
    """Return the layout of a U-Net, reading it only once."""
    from ..hosts.layout import layout_of

    if unet not in _LAYOUTS:
        _LAYOUTS[unet] = layout_of(unet)
    return _LAYOUTS[unet]


# What is done in each part of the diffusion


@dataclass(frozen=True)
class _Part:
    """A part of the diffusion: its cost, the steps in it, and whether the user's own settings apply there."""

    cost: Estimate
    steps: int
    own: bool

    @property
    def acts(self) -> bool:
        return self.cost.layers > 0 or self.cost.flops_left != self.cost.flops


@lru_cache(maxsize=1024)
def _cost(layout: Layout, config: AgentConfig, latent: tuple[int, int], progress: float) -> Estimate:
    return estimate(layout, config, *latent, progress)


def _planned(made: Decision, values: Mapping[str, Any], layout: Layout) -> Decision:
    """Add what the config comes to in a U-Net. Where it comes to nothing, the pass is left alone."""
    sampling, config = made.sampling, made.config
    if not layout.blocks or (made.tuning is not None and layout.name == USUAL):
        return made  # nothing is known of the model, and a plan is for a certain one
    moments = _EVENLY if sampling.moments is None else sampling.moments
    edges = [since for since, _ in config.parts()]
    counts = Counter(edges[bisect_right(edges, moment) - 1] for moment in moments)
    first = min(moments, default=1.0)
    parts = [
        _Part(
            _cost(layout, config, sampling.latent, since),
            counts[since],
            made.tuning is not None or values["since"] <= since < values[sampling.end],
        )
        for since, until in config.parts()
        if until > first
    ]
    acting = next((part for part in parts if part.acts and part.steps), None)
    acting = acting or next((part for part in parts if part.acts), None)
    if acting is None:
        return replace(made, config=None, reason=_why_nothing(parts, first, values, sampling))
    calls: Counter[str] = Counter()
    for part in parts:
        for level in part.cost.levels:
            calls[level.plan.action] += part.steps * level.count
    total = max(1, sum(part.steps for part in parts))
    steps = sum(part.steps for part in parts if part.acts)
    share = sum(part.steps * part.cost.share for part in parts) / total if counts else 1.0
    least = sum(part.steps * _least(part.cost) for part in parts) / total if counts else 1.0
    counted = {} if sampling.moments is None else {action: n for action, n in calls.items() if n}
    return replace(
        made,
        reason=_advice(acting, parts, steps, share, values, sampling) if made.tuning is None else None,
        layers=tuple((level.plan, level.count) for level in acting.cost.changed),
        calls=counted,
        steps=0 if sampling.moments is None else steps,
        share=share,
        least=min(share, least),
    )


def _least(cost: Estimate) -> float:
    """Share of FLOPs left if the products of queries, keys and values cost nothing in the layers that are changed."""
    return 1 - sum(4 * level.count * level.plan.tokens**2 * level.channels for level in cost.changed) / cost.flops


def _why_nothing(parts: Sequence[_Part], first: float, values: Mapping[str, Any], sampling: SamplingPass) -> Hint:
    own = next((part for part in parts if part.own), None)
    if own is not None:
        return last_veto(level.plan for level in own.cost.levels)
    done = f"{fraction(first)} of the diffusion is done when this pass begins"
    return Hint(f"{done}, and agents end at {fraction(values[sampling.end])}", (sampling.end,))


# Settings that veto a layer before its method is asked, from the least telling: layers further down are left alone by
# every usual setting
_VETOES = ("max_downsample", "rules", "min_tokens", "merge_attn")


def last_veto(plans_made: Iterable[LayerPlan]) -> Hint:
    """Name the last veto of untouched layers: those that it stopped came closest to being changed."""

    def rank(plan: LayerPlan) -> int:
        remedy = plan.remedy[:1]
        return _VETOES.index(remedy[0]) if remedy and remedy[0] in _VETOES else len(_VETOES)

    plan = max(plans_made, key=rank)
    if plan.remedy == ("min_tokens",) and plan.tokens < SMALL:
        return Hint(f"nothing is to be gained from layers of {plan.tokens} tokens")
    return Hint(plan.reason, plan.remedy)


def _advice(
    acting: _Part, parts: Sequence[_Part], steps: int, share: float, values: Mapping[str, Any], sampling: SamplingPass
) -> Hint | None:
    """Give advice on a part of the diffusion in which something is changed."""
    own = next((part for part in parts if part.own), None)
    if own is None:
        return Hint("agents end before this pass begins, so only what comes afterwards is done", (sampling.end,))
    if not steps:
        return Hint("no step lies between From and Until", ("since", sampling.end))
    if not acting.own:
        hint = last_veto(level.plan for level in own.cost.levels)
        return Hint(f"no agents: {hint.text}", hint.remedy)
    changed = acting.cost.changed
    if not changed:  # tokens are merged elsewhere
        hint = last_veto(level.plan for level in own.cost.levels)
        return Hint(f"self-attention is left alone: {hint.text}", hint.remedy)
    if all(level.plan.shortfall for level in changed):
        return Hint(f"no agents: {changed[0].plan.shortfall}", changed[0].plan.remedy)
    if share > 1:
        return Hint("this costs more than it saves", ("agent_ratio",))
    tokens = max(level.plan.tokens for level in changed)
    return Hint(f"nothing is gained from layers of {tokens} tokens", ("min_tokens",)) if tokens < SMALL else None


def fraction(value: float) -> str:
    """Format a fraction of the diffusion as the sliders show it, such as "0.6"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
