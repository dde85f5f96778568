"""What the settings will do at the current size, in a sentence for each sampling pass.

The page's script reads the controls and asks; all that it shows is worded here. Imports neither gradio nor a WebUI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..config import AgentConfig, SettingError
from ..costs import Estimate, Layout, LevelEstimate, estimate, layouts, share_of_run
from ..methods import method_of
from ..settings.presets import CUSTOM, PRESETS, preset_of
from ..settings.table import BY_NAME, DEFAULTS, SETTINGS, check
from .host import Hint, PanelHost

if TYPE_CHECKING:
    from torch import nn

# Pixels to a position of the latent
FACTOR = 8
# Taken for the model while none is loaded
USUAL = "SD 1"

# Reading a layout walks over every module of the U-Net.
_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


@dataclass(frozen=True)
class SamplingPass:
    """One sampling pass of the image that the page would make now.

    Attributes:
        width: of the image, in pixels.
        height: of the image, in pixels.
        start: fraction of the diffusion done when it begins, 0–1.
        hires: whether it is the hires pass.
    """

    width: int
    height: int
    start: float = 0.0
    hires: bool = False

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width) of the latent."""
        return self.height // FACTOR, self.width // FACTOR

    @property
    def end(self) -> str:
        """Name of the setting that says when agents end in this pass."""
        return "hires_until" if self.hires else "until"

    def __str__(self) -> str:
        return f"{'Hires ' if self.hires else ''}{self.width}×{self.height}"


def hires_size(width: int, height: int, scale: float, resize_x: int, resize_y: int) -> tuple[int, int]:
    """(width, height) of the hires pass, as the WebUI makes it of its sliders."""
    if not resize_x and not resize_y:
        return int(width * scale), int(height * scale)
    if not resize_y:
        return resize_x, resize_x * height // width
    if not resize_x:
        return resize_y * width // height, resize_y
    return resize_x, resize_y


def page_data() -> dict[str, Any]:
    """What the page's script has to know of the settings, in JSON's types."""
    rows = [
        {"name": row.name, "kind": row.kind, "low": row.low, "high": row.high, "choices": list(row.choices)}
        for row in SETTINGS
    ]
    return {
        "rows": rows,
        "defaults": dict(DEFAULTS),
        "presets": {name: dict(values) for name, values in PRESETS.items()},
        "custom": CUSTOM,
        "min_tokens_label": BY_NAME["min_tokens"].label,
    }


@dataclass(frozen=True)
class Line:
    """One line of the preview.

    Attributes:
        text: what happens.
        hint: what to know or change; its own remedy where nothing happens.
        acts: whether anything is changed.
    """

    text: str
    hint: Hint | None = None
    acts: bool = False

    def to_dict(self) -> dict[str, str]:
        """The line as two runs of full sentences."""
        return {"text": f"{self.text}." if self.text else "", "hint": "" if self.hint is None else sentence(self.hint)}


def preview(
    values: Mapping[str, Any],
    passes: Sequence[SamplingPass],
    host: PanelHost,
    *,
    img2img: bool = False,
    measured: Callable[[SamplingPass], str] | None = None,
) -> dict[str, Any]:
    """What the page shows: {"lines": [{"text", "hint"}, …], "preset": name}.

    Args:
        values: settings by name; what is missing or None is at its default.
        passes: the sampling passes that the page would make.
        host: the program that the panel is shown in.
        img2img: whether it is the img2img tab.
        measured: what was measured for a pass with these settings, in words; empty where nothing was.
    """
    try:
        checked = check({**values, "enabled": True})
    except SettingError as error:
        return {"lines": [Line("", Hint(str(error))).to_dict()], "preset": CUSTOM}
    unet = host.unet()
    layout = layouts()[USUAL] if unet is None else layout_of_unet(unet)
    lines = _chosen([_line(checked, one, layout, host, img2img, measured) for one in passes], checked)
    if unet is None:
        lines.append(Line(f"No model is loaded yet: figures are those of {USUAL}"))
    else:
        lines += [Line("", hint) for hint in host.advice(checked)]
    return {"lines": [line.to_dict() for line in lines], "preset": preset_of(checked)}


def layout_of_unet(unet: nn.Module) -> Layout:
    """The layout of a U-Net, read once."""
    from ..hosts.layout import layout_of

    if unet not in _LAYOUTS:
        _LAYOUTS[unet] = layout_of(unet)
    return _LAYOUTS[unet]


def sentence(hint: Hint) -> str:
    """A hint that names the controls to change by their labels."""
    if not hint.text:
        return ""
    labels = [f"“{BY_NAME[name].label if name in BY_NAME else name}”" for name in hint.remedy]
    change = f" Change {' or '.join(labels)}." if labels else ""
    return f"{hint.text[0].upper()}{hint.text[1:]}.{change}"


def _chosen(lines: list[Line], values: Mapping[str, Any]) -> list[Line]:
    """A pass that the user left out is not worth a line, unless no other is."""
    left_out = [line for line in lines if line.hint is not None and line.hint.remedy == ("passes",)]
    if len(left_out) < len(lines) or not lines:
        return [line for line in lines if line not in left_out]
    only_hires = "only the hires pass is chosen, and there is none"
    return [Line(lines[0].text, Hint(only_hires, ("passes",)) if values["passes"] == "hires" else lines[0].hint)]


def _line(
    values: Mapping[str, Any],
    one: SamplingPass,
    layout: Layout,
    host: PanelHost,
    img2img: bool,
    measured: Callable[[SamplingPass], str] | None,
) -> Line:
    def nothing(text: str, *remedy: str) -> Line:
        return Line(f"{one}: nothing happens", Hint(text, remedy))

    obstacle = host.obstacle(one.hires, img2img)
    if obstacle is not None:
        return nothing(obstacle.text, *obstacle.remedy)
    if values["since"] >= values[one.end]:
        return nothing(f"agents begin at {values['since']} and end at {values[one.end]}", "since", one.end)
    config = host.config(values, one.hires)
    if config is None:
        return nothing("this pass is left out", "passes")
    parts = _parts(config, values, one, layout)
    acting = next((part for part in parts if part.acts), None)
    own = next((part for part in parts if part.own), None)
    if acting is None and own is not None:
        why = _why_nothing(own.found)
        return nothing(why.text, *why.remedy)
    if acting is None:
        begins = f"{percent(one.start)} of the diffusion is done when this pass begins"
        return nothing(f"{begins}, and agents end at {percent(values[one.end])}", one.end)
    text = f"{one}: {_describe(acting.found)}"
    if config.timed:
        text += f", {percent(share_of_run(layout, config, *one.latent, one.start))} over the whole pass"
    timed = measured(one) if measured is not None else ""
    return Line(f"{text}; measured: {timed}" if timed else text, _advice(acting, own, one), acts=True)


@dataclass(frozen=True)
class _Part:
    """A part of the diffusion: what happens there, and whether the panel's own settings hold, and not what follows."""

    found: Estimate
    own: bool

    @property
    def acts(self) -> bool:
        return self.found.layers > 0 or self.found.flops_left != self.found.flops


def _parts(config: AgentConfig, values: Mapping[str, Any], one: SamplingPass, layout: Layout) -> list[_Part]:
    """The parts of the diffusion that the pass reaches."""
    return [
        _Part(estimate(layout, config, *one.latent, since), values["since"] <= since < values[one.end])
        for since, until in config.parts()
        if until > one.start
    ]


# The settings that decide before the method does, in the order of the vetoes in agentsd.plan
_VETOES = ("rules", "max_downsample", "min_tokens", "merge_attn")


def _why_nothing(found: Estimate) -> Hint:
    """The veto that came last: the layers that it kept came closest to being changed."""

    def rank(level: LevelEstimate) -> int:
        remedy = level.plan.remedy[:1]
        return _VETOES.index(remedy[0]) if remedy and remedy[0] in _VETOES else len(_VETOES)

    plan = max(found.levels, key=rank).plan
    return Hint(plan.reason, plan.remedy)


def _advice(acting: _Part, own: _Part | None, one: SamplingPass) -> Hint | None:
    """What to say beside a part that acts."""
    if own is None:
        return Hint("agents end before this pass begins, so only what comes afterwards is done", (one.end,))
    if not acting.own:
        why = _why_nothing(own.found)
        return Hint(f"no agents: {why.text}", why.remedy)
    changed = acting.found.changed
    if changed and all(level.plan.shortfall for level in changed):
        return Hint(f"no agents: {changed[0].plan.shortfall}", changed[0].plan.remedy)
    return Hint("this costs more than it saves", ("agent_ratio",)) if acting.found.share > 1 else None


def _describe(found: Estimate) -> str:
    words = [f"{method_of(level.plan.action).words(level.plan)} {in_layers(level.count)}" for level in found.changed]
    what = ", ".join(words) or "tokens merged outside self-attention"
    return f"{what}; {percent(found.share)} of the U-Net's FLOPs left"


def in_layers(count: int) -> str:
    """Such as "in 5 layers"."""
    return f"in {count} layer{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share as a percentage, in which a line must not break."""
    return f"{math.floor(share * 100 + 0.5)}%"
