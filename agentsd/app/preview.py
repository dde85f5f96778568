"""The preview: what the settings will do at the current size, in a sentence for each sampling pass.

The page's script reads the controls and asks; all wording is here. Imports neither gradio nor a WebUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..attention.grid import Grid
from ..checks import SettingError
from ..config import SMALL, AgentConfig
from ..costs import Estimate, Layout, LevelEstimate, estimate, layouts, share_of_run
from ..settings import tunings
from ..settings.idle import idle
from ..settings.presets import CUSTOM, PRESETS, preset_of
from ..settings.schema import BY_NAME, DEFAULTS, SETTINGS, check, labelled
from ..tuning.result import Tuning, TuningError
from ..words import percent
from .host import Hint, PanelHost
from .kept_tunings import plans

if TYPE_CHECKING:
    from torch import nn

# Layout used while no model is loaded
USUAL = "SD 1"

# Layouts read so far: reading one walks over every module of the U-Net.
_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


@dataclass(frozen=True)
class SamplingPass:
    """One sampling pass of the image that the page would generate now.

    Attributes:
        width: width of the image in pixels.
        height: height of the image in pixels.
        start: progress at which the pass begins, 0–1.
        hires: whether it is the hires pass.
    """

    width: int
    height: int
    start: float = 0.0
    hires: bool = False

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width) of the latent."""
        return Grid.of_pixels(self.height, self.width)

    @property
    def end(self) -> str:
        """Name of the setting for when agents end in this pass."""
        return "hires_until" if self.hires else "until"

    def __str__(self) -> str:
        return f"{'Hires ' if self.hires else ''}{self.width}×{self.height}"


def hires_size(width: int, height: int, scale: float, resize_x: int, resize_y: int) -> tuple[int, int]:
    """Compute the (width, height) of the hires pass from the WebUI's sliders, as the WebUI does."""
    if not resize_x and not resize_y:
        return int(width * scale), int(height * scale)
    if not resize_y:
        return resize_x, resize_x * height // width
    if not resize_x:
        return resize_y * width // height, resize_y
    return resize_x, resize_y


# Help of the panel's controls that are no settings, by the name in their element id
_HELP = {
    "preset": "Settings by intention. Changing one of them makes it Custom.",
    "tune_next": "Make the next image without Agent Attention, and find the fastest settings that stay as close to it "
    "as said on the left, for this checkpoint and size.",
    "record": "Keep which tokens were merged and where the agents sat for each image, until the next one.",
    "map_moment": "Which call of the U-Net: one for every 0.05 of the diffusion, first pass, then hires pass.",
    "map_layer": "Which of the changed layers, in the order of the U-Net.",
}


def page_data() -> dict[str, Any]:
    """Collect what the page's script needs to know about the settings, in JSON types."""
    rows = [
        {"name": row.name, "kind": row.kind, "low": row.low, "high": row.high, "choices": list(row.choices)}
        for row in SETTINGS
    ]
    return {
        "rows": rows,
        "defaults": dict(DEFAULTS),
        "presets": {name: dict(values) for name, values in PRESETS.items()},
        "custom": CUSTOM,
        "help": {**{row.name: row.tooltip for row in SETTINGS}, **_HELP},
        "min_tokens_label": BY_NAME["min_tokens"].label,
    }


# What a line tells, by which the page marks it
ACTS, SLOWER, NOTHING, WRONG, NOTE = "acts", "slower", "nothing", "wrong", "note"


@dataclass(frozen=True)
class Line:
    """One line of the preview.

    Attributes:
        text: what happens.
        hint: advice; where nothing happens, the reason and its remedy.
        state: ACTS if anything is changed, SLOWER if that costs time, NOTHING, WRONG for a bad value, or NOTE.
        gain: the expected gain in time; empty where nothing is changed.
    """

    text: str
    hint: Hint | None = None
    state: str = NOTE
    gain: str = ""

    def to_dict(self) -> dict[str, str]:
        """Convert the line to full sentences for the page."""
        text = " ".join(f"{part}." for part in (self.text, self.gain) if part)
        return {"text": text, "hint": "" if self.hint is None else sentence(self.hint), "state": self.state}


def preview(
    values: Mapping[str, Any],
    passes: Sequence[SamplingPass],
    host: PanelHost,
    *,
    img2img: bool = False,
) -> dict[str, Any]:
    """Make the preview of the settings.

    Args:
        values: settings by name; missing ones and None give the default.
        passes: the sampling passes that the page would make.
        host: the program that shows the panel.
        img2img: whether it is the img2img tab.

    Returns:
        {"lines": [{"text", "hint", "state"}, …], "preset": name, "model": whether one is loaded, "idle": why controls
        have no effect, by setting}.
    """
    unet = host.unet()
    try:
        checked = check({**values, "enabled": True})
    except SettingError as error:
        return _answer([Line("", Hint(labelled(str(error))), WRONG)], CUSTOM, unet, {})
    layout = layouts()[USUAL] if unet is None else layout_of_unet(unet)
    if checked["tune"]:
        return _answer([_order_to_tune(checked["tune"])], preset_of(checked), unet, {})
    lines = _chosen([_line(checked, sampling, layout, host, img2img) for sampling in passes], checked)
    lines = [*_not_tuned(checked, passes, host, img2img), *lines]
    if unet is None:
        lines.append(Line(f"No model is loaded yet: figures are those of {USUAL}"))
    else:
        lines += [Line("", hint) for hint in host.advice(checked)]
    return _answer(lines, preset_of(checked), unet, idle(checked))


def _answer(lines: Sequence[Line], preset: str, unet: nn.Module | None, idle: Mapping[str, str]) -> dict[str, Any]:
    return {"lines": [line.to_dict() for line in lines], "preset": preset, "model": unet is not None, "idle": idle}


def layout_of_unet(unet: nn.Module) -> Layout:
    """Return the layout of a U-Net, reading it only once."""
    from ..hosts.layout import layout_of

    if unet not in _LAYOUTS:
        _LAYOUTS[unet] = layout_of(unet)
    return _LAYOUTS[unet]


def sentence(hint: Hint) -> str:
    """Word a hint, naming the controls to change by their labels."""
    if not hint.text:
        return ""
    labels = [f"“{BY_NAME[name].label if name in BY_NAME else name}”" for name in hint.remedy]
    change = f" Change {' or '.join(labels)}." if labels else ""
    return f"{hint.text[0].upper()}{hint.text[1:]}.{change}"


def _chosen(lines: list[Line], values: Mapping[str, Any]) -> list[Line]:
    """Drop the lines of passes that the user excluded, unless no other pass remains."""
    left_out = [line for line in lines if line.hint is not None and line.hint.remedy == ("passes",)]
    if len(left_out) < len(lines) or not lines:
        return [line for line in lines if line not in left_out]
    only_hires = "only the hires pass is chosen, and there is none"
    hint = Hint(only_hires, ("passes",)) if values["passes"] == "hires" else lines[0].hint
    return [Line(lines[0].text, hint, NOTHING)]


def _line(
    values: Mapping[str, Any],
    sampling: SamplingPass,
    layout: Layout,
    host: PanelHost,
    img2img: bool,
) -> Line:
    def nothing(text: str, *remedy: str) -> Line:
        return Line(f"{sampling}: nothing happens", Hint(text, remedy), NOTHING)

    obstacle = host.obstacle(sampling.hires, img2img)
    if obstacle is not None:
        return nothing(obstacle.text, *obstacle.remedy)
    if values["since"] >= values[sampling.end]:
        return nothing(
            f"agents begin at {fraction(values['since'])} and end at {fraction(values[sampling.end])}",
            "since",
            sampling.end,
        )
    config = host.config(values, sampling.hires)
    if config is None:
        return nothing("this pass is left out", "passes")
    plan = _plan(values, sampling, host, img2img)
    if plan is not None:
        return _tuned_line(sampling, plan)
    parts = _parts(config, values, sampling, layout)
    acting = next((part for part in parts if part.acts), None)
    own = next((part for part in parts if part.own), None)
    if acting is None and own is not None:
        hint = _why_nothing(own.cost)
        return nothing(hint.text, *hint.remedy)
    if acting is None:
        begins = f"{fraction(sampling.start)} of the diffusion is done when this pass begins"
        return nothing(f"{begins}, and agents end at {fraction(values[sampling.end])}", sampling.end)
    gain, state = _by_flops(share_of_run(layout, config, *sampling.latent, sampling.start))
    return _acting_line(f"{sampling}: {_describe(acting.cost)}", _advice(acting, own, sampling), state, gain)


def _acting_line(text: str, advice: Hint | None, state: str, gain: str) -> Line:
    """Make the line of a pass in which something is changed. Small layers gain nothing."""
    if advice is not None and advice.remedy == ("min_tokens",) and state == ACTS:
        gain, state = _speed(1.0), NOTHING
    return Line(text, advice, state, gain)


def _order_to_tune(tolerance: float) -> Line:
    text = f"The next image is made without Agent Attention, and tuned on: to within {percent(tolerance)}"
    return Line(text, Hint("that takes as long as some dozens of steps; Skip ends it"))


def _plan(values: Mapping[str, Any], sampling: SamplingPass, host: PanelHost, img2img: bool) -> Tuning | None:
    """Return the tuning that a pass would use; None where the other settings apply."""
    if not values["tuning"]:
        return None
    of = tunings.HIRES if sampling.hires else tunings.IMG2IMG if img2img else tunings.FIRST
    unet = host.unet()
    for plan in plans(values, of, sampling.latent, host.kept(of, sampling.latent)):
        with suppress(TuningError):
            if unet is not None:
                plan.config_for(unet)
            return plan
    return None


def _not_tuned(values: Mapping[str, Any], passes: Sequence[SamplingPass], host: PanelHost, img2img: bool) -> list[Line]:
    """Say of each pass for which a tuning was asked, and there is none, what applies instead."""
    if not values["tuning"]:
        return []
    instead = preset_of({**values, "tuning": ""})
    return [
        Line(f"{sampling}: not tuned on this checkpoint at this size, so {instead} applies", Hint("", ()))
        for sampling in passes
        if host.config(values, sampling.hires) is not None and _plan(values, sampling, host, img2img) is None
    ]


def _tuned_line(sampling: SamplingPass, tuning: Tuning) -> Line:
    plan, within = tuning.plan, f"tuned to within {percent(tuning.tolerance)}"
    if not plan.acts:
        return Line(f"{sampling}: {plan.gain}, so full attention stays", Hint("", ("how_close",)), NOTHING)
    reached = f", deviation {plan.reached}" if plan.reached else ""
    state = ACTS if plan.speed_up is None else _state(plan.speed_up)
    return Line(f"{sampling}: {within}{reached}", None, state, plan.gain)


def _by_flops(share: float) -> tuple[str, str]:
    """Word the gain in time that the share of FLOPs left suggests, and tell the line's state."""
    gain = 1 / share
    return f"{_speed(gain, 'about ')}, by FLOPs over the whole pass", _state(gain)


def _state(gain: float) -> str:
    """Tell the state of a line whose pass runs `gain` times as fast, to the digits that are shown."""
    shown = round(gain, 2)
    return SLOWER if shown < 1 else ACTS if shown > 1 else NOTHING


def _speed(gain: float, about: str = "") -> str:
    words = {
        ACTS: f"Expected: {about}{gain:.2f}× faster",
        SLOWER: f"Slower than without: {about}{gain:.2f}× the speed",
        NOTHING: "No gain in time is expected",
    }
    return words[_state(gain)]


def milliseconds(before: float, after: float) -> str:
    """Format a timing, as in "410 → 330 ms a U-Net call"."""
    return f"{before:.0f} → {after:.0f}\u00a0ms a U-Net call"


@dataclass(frozen=True)
class _Part:
    """A part of the diffusion: its cost and length, and whether the panel's own settings apply in it."""

    cost: Estimate
    length: float
    own: bool

    @property
    def acts(self) -> bool:
        return self.cost.layers > 0 or self.cost.flops_left != self.cost.flops


def _parts(config: AgentConfig, values: Mapping[str, Any], sampling: SamplingPass, layout: Layout) -> list[_Part]:
    """List the parts of the diffusion that the pass reaches."""
    return [
        _Part(
            estimate(layout, config, *sampling.latent, since),
            until - max(since, sampling.start),
            values["since"] <= since < values[sampling.end],
        )
        for since, until in config.parts()
        if until > sampling.start
    ]


# Settings that veto a layer before its method is asked, from the least telling: layers further down are left alone by
# every usual setting
_VETOES = ("max_downsample", "rules", "min_tokens", "merge_attn")


def _why_nothing(cost: Estimate) -> Hint:
    """Name the last veto: the layers that it stopped came closest to being changed."""

    def rank(level: LevelEstimate) -> int:
        remedy = level.plan.remedy[:1]
        return _VETOES.index(remedy[0]) if remedy and remedy[0] in _VETOES else len(_VETOES)

    plan = max(cost.levels, key=rank).plan
    if plan.remedy == ("min_tokens",) and plan.tokens < SMALL:
        return Hint(f"nothing is to be gained from layers of {plan.tokens} tokens")
    return Hint(plan.reason, plan.remedy)


def _advice(acting: _Part, own: _Part | None, sampling: SamplingPass) -> Hint | None:
    """Give advice on a part of the diffusion in which something is changed."""
    if own is None:
        return Hint("agents end before this pass begins, so only what comes afterwards is done", (sampling.end,))
    if not acting.own:
        hint = _why_nothing(own.cost)
        return Hint(f"no agents: {hint.text}", hint.remedy)
    changed = acting.cost.changed
    if not changed:  # tokens are merged elsewhere
        hint = _why_nothing(own.cost)
        return Hint(f"self-attention is left alone: {hint.text}", hint.remedy)
    if all(level.plan.shortfall for level in changed):
        return Hint(f"no agents: {changed[0].plan.shortfall}", changed[0].plan.remedy)
    if acting.cost.share > 1:
        return Hint("this costs more than it saves", ("agent_ratio",))
    tokens = max(level.plan.tokens for level in changed)
    if tokens < SMALL:
        return Hint(f"nothing is gained from layers of {tokens} tokens", ("min_tokens",))
    return None


def _describe(cost: Estimate) -> str:
    words = [f"{level.plan.method.words(level.plan)} {in_layers(level.count)}" for level in cost.changed]
    return ", ".join(words) or "tokens merged outside self-attention"


def in_layers(count: int) -> str:
    """Format a number of layers, as in "in 5 layers"."""
    return f"in {count} layer{'' if count == 1 else 's'}"


def fraction(value: float) -> str:
    """Format a fraction of the diffusion as the sliders show it, such as "0.6"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
