"""The table of the extension's settings, from which panel, infotext, X/Y/Z axes and API are all built.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ..checks import SettingError, check_names, shown
from ..config import AUTO, LIMITS, TOKEN_MERGING, AgentConfig, early
from ..methods import selectable
from ..rules import format_rules, parse_rules, rules_from
from ..words import percent
from . import tunings

# Layers of fewer tokens gain nothing: the speed-up of SD 1's U-Net is 1.01× at 128×128 pixels (256 tokens) and 1.07× at
# 256×256 pixels. See docs/performance-log.md.
SMALL = 512
NOTHING, MERGING = "nothing", "token merging"
BOTH, FIRST, HIRES = "both", "first", "hires"


def _read_percent(value: Any) -> Any:
    """Bring a fraction such as 0.005, or a text such as "0.5%", into `percent`'s form; others are left as they are."""
    try:
        if isinstance(value, str):
            return percent(fraction_of(value))
        return percent(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    except ValueError:
        return value


def fraction_of(text: str) -> float:
    """Read a deviation that `percent` wrote."""
    return float(text.removesuffix("%")) / 100


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: name in the API and the infotext.
        label: label in the panel; short, constant and unique, since translations match it.
        info: help text of the control, in plain words.
        default: default in the panel.
        kind: "flag", "slider", "number", "choice" or "text".
        low: smallest value of a slider or number.
        high: largest value of a slider or number.
        step: step of a slider or number; with a whole step, values are whole numbers.
        choices: allowed values of a choice, as text.
        folded: whether it is under "More settings".
        written: whether the infotext names it even at its default.
        more_info: makes text to append to `info`; called when the help is read.
        implied: value that an infotext stands for which does not name the setting; None for the default. It never
            changes, so that a new default leaves the images of existing infotexts as they are.
        read: turns what the API may send into a text or choice in canonical form.
        local: whether it concerns one generation or one user only: neither infotext nor presets hold it.
        implies: settings that its X/Y/Z axis sets as well.
        axis: whether the X/Y/Z plot has an axis for it.
    """

    name: str
    label: str
    info: str
    default: Any
    kind: str
    low: float = 0
    high: float = 1
    step: float = 1
    choices: Sequence[str] = ()
    folded: bool = True
    written: bool = False
    more_info: Callable[[], str] | None = None
    implied: Any = None
    read: Callable[[Any], Any] | None = None
    local: bool = False
    implies: Mapping[str, Any] = field(default_factory=dict)
    axis: bool = True

    @property
    def help(self) -> str:
        """The complete help text of the control."""
        return self.info if self.more_info is None else self.info + self.more_info()

    @property
    def whole(self) -> bool:
        return self.kind in ("slider", "number") and isinstance(self.step, int)

    @property
    def xyz_type(self) -> type:
        """The type of the values of an X/Y/Z axis."""
        if self.kind in ("slider", "number"):
            return int if self.whole else float
        return str

    def checked(self, value: Any) -> Any:
        """Return the value in canonical form; None (a cleared field) gives the default.

        Raises:
            SettingError: the value is invalid; the message names the setting, the value and the range.
        """
        if value is None:
            return self.default
        if self.kind == "flag":
            return self._flag(value)
        if self.read is not None:
            value = self.read(value)
        if self.kind == "choice":
            return self._choice(value)
        return value if self.kind == "text" else self._number(value)

    def _flag(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise SettingError(f"{self.name} must be True or False, got {shown(value)}")

    def _choice(self, value: Any) -> str:
        # accept a number such as max_downsample=2 for its text, but not True for "True"
        text = value if isinstance(value, bool) else str(value)
        if text in self.choices:
            return text
        raise SettingError(f"{self.name} must be one of {', '.join(map(repr, self.choices))}, got {shown(value)}")

    def _number(self, value: Any) -> float | int:
        real = isinstance(value, Real) and not isinstance(value, bool)
        # NaN fails the comparison
        if real and self.low <= value <= self.high and not (self.whole and value != int(value)):
            return int(value) if self.whole else float(value)
        if self.whole and isinstance(value, float) and value.is_integer():
            value = int(value)  # as it was typed
        kind = "a whole number" if self.whole else "a number"
        raise SettingError(f"{self.name} must be {kind} from {self.low} to {self.high}, got {shown(value)}")

    def parsed(self, text: str) -> Any:
        """Parse a value as the infotext or an X/Y/Z axis writes it.

        Raises:
            SettingError: the text is no valid value.
        """
        if self.kind == "flag":
            flags = {"on": True, "true": True, "off": False, "false": False}
            return flags[text.lower()] if text.lower() in flags else self._flag(text)
        if self.kind in ("choice", "text"):
            return self.checked(text)
        try:
            return self._number(float(text))
        except ValueError as error:  # SettingError is a ValueError too
            raise error if isinstance(error, SettingError) else self._not_a_number(text) from None

    def _not_a_number(self, text: str) -> SettingError:
        return SettingError(f"{self.name} must be a number from {self.low} to {self.high}, got {shown(text)}")

    def text(self, value: Any) -> str:
        """Format a value for the infotext; `parsed` reads it back exactly."""
        return ("on" if value else "off") if self.kind == "flag" else str(value)


def _limited(name: str, kind: str, label: str, info: str, default: Any, **more: Any) -> Row:
    """Make a row with the range of the core's setting of the same name."""
    limits = LIMITS[name]
    if kind == "choice":
        more.setdefault("choices", limits["choices"])
    elif kind != "flag":
        more = {"low": limits["low"], "high": limits["high"], **more}
    return Row(name, label, info, default, kind, **more)


SETTINGS: tuple[Row, ...] = (
    Row(
        "enabled",
        "Agent Attention",
        "Faster self-attention for large images, without training.",
        False,
        "flag",
        folded=False,
    ),
    _limited(
        "ratio",
        "slider",
        "Ratio",
        "Share of the image tokens merged before self-attention. Higher is faster and less faithful; 0 merges none.",
        0.0,
        step=0.01,
        folded=False,
        written=True,
    ),
    _limited(
        "agent_ratio",
        "slider",
        "Agent ratio",
        "Share of the tokens merged away to make the agent tokens. Higher means fewer agents: faster, less faithful. "
        "0.95 on a grid is one agent per 4×4 tokens.",
        0.95,
        step=0.01,
        folded=False,
        written=True,
    ),
    _limited(
        "k_scale2",
        "slider",
        "k_scale2",
        "How sharply each token chooses among the agents: smaller is sharper, 1 is the paper's plain equation.",
        0.3,
        step=0.005,
        folded=False,
        written=True,
    ),
    _limited(
        "k_shortcut",
        "slider",
        "k_shortcut",
        "How much of each token's own value is added to the result. Keeps detail; too much looks over-sharp.",
        0.075,
        step=0.005,
        folded=False,
        written=True,
    ),
    Row(
        "fp32",
        "FP32 precision",
        "Compute the patched attention in 32 bits. Slower; try it if images come out black or noisy.",
        False,
        "flag",
        folded=False,
    ),
    _limited(
        "agent_source",
        "choice",
        "Agent source",
        "grid: averages over square cells, the fastest, and right for every device. similarity: clusters of similar "
        "tokens, as in the authors' AgentSD.",
        "grid",
        written=True,
    ),
    _limited(
        "method",
        "choice",
        "Method",
        "How self-attention is computed.",
        "corrected",
        implied="agent",
        more_info=lambda: "".join(f"\n{method.name}: {method.summary}." for method in selectable()),
        folded=False,
    ),
    Row(
        "since",
        "From",
        "Fraction of the diffusion done when agents begin. 0 is pure noise, 1 the finished image.",
        0.0,
        "slider",
        high=0.95,
        step=0.01,
        folded=False,
    ),
    Row(
        "until",
        "Until",
        "Fraction of the diffusion done when agents end. Early steps tolerate agents best.",
        1.0,
        "slider",
        low=0.05,
        step=0.01,
        written=True,
        implied=0.6,
        folded=False,
    ),
    Row(
        "hires_until",
        "Until, hires pass",
        "When agents end in the hires pass, which starts late: at denoising strength 0.5 the diffusion is half done.",
        1.0,
        "slider",
        low=0.05,
        step=0.01,
    ),
    Row(
        "after",
        "Afterwards",
        "What to do after the agents end: nothing (the model is untouched), or token merging (ratio 0.4, 2×2).",
        NOTHING,
        "choice",
        choices=(NOTHING, MERGING),
    ),
    Row(
        "passes",
        "Passes",
        "Which passes to speed up. hires: only the hires pass, where the image is large.",
        BOTH,
        "choice",
        choices=(BOTH, FIRST, HIRES),
        folded=False,
    ),
    _limited(
        "max_downsample",
        "choice",
        "Layers down to",
        "Deepest level of the U-Net to patch. auto: the level of the model's largest self-attention layers (1 in SD 1 "
        "and SD 2, 2 in SDXL).",
        AUTO,
        choices=(AUTO, *(str(c) for c in LIMITS["max_downsample"]["choices"] if c != AUTO)),
    ),
    _limited(
        "min_tokens",
        "number",
        "Minimum tokens",
        "Layers with fewer tokens are left alone: they gain nothing. A 512×512 image has 4096 tokens in SD 1's largest "
        "layers.",
        SMALL,
        implied=0,
    ),
    _limited(
        "max_agents",
        "number",
        "Maximum agents",
        "Upper limit on the number of agent tokens in a layer; 0 sets none, except for 640 with the methods corrected "
        "and local.",
        0,
        low=0,
    ),
    _limited(
        "sx",
        "slider",
        "Cell width",
        "sx: width in tokens of the cells of the merging partition, and of the cells of the pool method. "
        "At most 1 − 1/(sx·sy) of the tokens can be merged.",
        4,
    ),
    _limited("sy", "slider", "Cell height", "sy: height in tokens of those cells.", 4),
    _limited(
        "use_rand",
        "flag",
        "Random partition",
        "Draw the token of each cell that others merge into at random, instead of taking the first. The same settings "
        "still give the same image.",
        True,
    ),
    _limited("merge_attn", "flag", "Merge self-attention", "Patch self-attention at all.", True),
    _limited(
        "merge_crossattn",
        "flag",
        "Merge cross-attention",
        "Also merge tokens by Ratio before cross-attention. Not recommended.",
        False,
    ),
    _limited(
        "merge_mlp",
        "flag",
        "Merge MLP",
        "Also merge tokens by Ratio before the feed-forward layer. Not recommended.",
        False,
    ),
    _limited(
        "seed",
        "number",
        "Partition seed",
        "Seed of the random partition, independent of the image's seed.",
        0,
        # the largest integer that a browser represents exactly
        high=2**53 - 1,
    ),
    Row(
        "rules",
        "Rules",
        "Settings for some layers or a part of the diffusion, such as “downsample=2+4 method=corrected | "
        "blocks=middle_block.* full”. Later rules win; “full” is full attention.",
        "",
        "text",
        read=lambda value: format_rules(rules_from(value)),
    ),
    Row(
        "tuning",
        "Tuning",
        "“auto” uses what was tuned for this checkpoint and size; images carry the plan itself. Passes without a plan "
        "use the other settings.",
        "",
        "text",
        read=tunings.canonical,
    ),
    Row(
        "how_close",
        "How close",
        "How much the U-Net's output may deviate from full attention's: what to tune for, and which of the plans found "
        "then to use.",
        "2%",
        "choice",
        choices=("0.5%", "1%", "2%", "5%"),
        read=_read_percent,
        local=True,
        implies={"tuning": tunings.AUTO},
    ),
    Row(
        "tune",
        "Tune to",
        "Make the next image without Agent Attention and tune on it, to this deviation, such as 0.02. 0 doesn't tune.",
        0.0,
        "slider",
        step=0.001,
        local=True,
        axis=False,
    ),
    _limited(
        "landmarks",
        "choice",
        "Landmarks",
        "Which keys the methods corrected and local attend to. sample: one token of each cell, closest where attention "
        "is smooth. superpixel: means over cells that follow the content, closer where attention is sharp. heavy: the "
        "sample, and the keys between that most attention goes to, closest where attention is sharp.",
        "sample",
    ),
)

BY_NAME: Mapping[str, Row] = {row.name: row for row in SETTINGS}
NAMES: tuple[str, ...] = tuple(BY_NAME)
DEFAULTS: Mapping[str, Any] = {row.name: row.default for row in SETTINGS}
# What an infotext that names no setting stands for
IMPLIED: Mapping[str, Any] = {row.name: row.default if row.implied is None else row.implied for row in SETTINGS}

# Order of a script's arguments. It is a contract of the API: append new ones. "record" asks for the token map's record.
RECORD = "record"
_AT = NAMES.index("seed") + 1
ARGUMENTS: tuple[str, ...] = (*NAMES[:_AT], RECORD, *NAMES[_AT:])

# Rows that the core has under the same name and with the same values
_AS_IN_THE_CORE = tuple(n for n in NAMES if n in LIMITS and n not in ("max_downsample", "max_agents", "rules"))


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting in canonical form, missing ones at their defaults.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    check_names(values, NAMES)
    return {name: row.checked(values.get(name)) for name, row in BY_NAME.items()}


def from_args(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the settings from a script's positional arguments.

    Args:
        args: values in the order of `ARGUMENTS`; missing ones get their defaults, extra ones are ignored. The first may
            be a mapping of settings by name, which switches the extension on unless it says otherwise; the remaining
            arguments follow in order.
        overrides: settings by name that take precedence over the arguments, such as those of an X/Y/Z cell.

    Returns:
        Every setting, in canonical form. While the extension is off, all settings are at their defaults, unchecked.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    values = dict(zip(ARGUMENTS, args, strict=False))
    values.pop(RECORD, None)
    # the older extension's list has a switch in its place
    other_order = isinstance(values.get("ratio"), bool)
    if args and isinstance(args[0], Mapping):
        values.update({"enabled": True, **args[0]})
    values.update(overrides or {})
    if not BY_NAME["enabled"].checked(values.get("enabled")):
        return check({})
    if other_order:
        raise SettingError(_OTHER_ORDER)
    return check(values)


_OTHER_ORDER = (
    "the list of arguments is in another order, perhaps sd-webui-agentattention's; expected were "
    f"{', '.join(ARGUMENTS[:7])} and so on, or a dictionary such as {{'ratio': 0.4}}"
)


def labelled(message: str) -> str:
    """Name the settings in the message of a `SettingError` by their labels, as the panel shows them."""
    return _NAMED.sub(lambda found: BY_NAME[found[0]].label if found[0] in BY_NAME else found[0], message)


# Where a message has a setting's name
_NAMED = re.compile(r"^\w+|(?<=must be above )\w+")


def wants_record(args: Sequence[Any]) -> bool:
    """Whether a script's positional arguments ask for the token map's record."""
    return dict(zip(ARGUMENTS, args, strict=False)).get(RECORD) is True


def to_config(values: Mapping[str, Any], *, hires: bool = False) -> AgentConfig | None:
    """Make the core's config for one sampling pass; None if the pass is to be left alone.

    Args:
        values: every setting, in canonical form (from `check`).
        hires: whether it is the hires pass.

    Raises:
        SettingError: settings contradict each other; the message names them.
    """
    if not values["enabled"] or values["passes"] == (FIRST if hires else HIRES):
        return None
    layers = values["max_downsample"]
    return AgentConfig(
        **{name: values[name] for name in _AS_IN_THE_CORE},
        attn_precision="fp32" if values["fp32"] else None,
        max_downsample=AUTO if layers == AUTO else int(layers),
        max_agents=values["max_agents"] or None,
        stages=_stages(values, "hires_until" if hires else "until"),
        rules=parse_rules(values["rules"]),
    )


def _stages(values: Mapping[str, Any], end: str) -> tuple:
    since, until = values["since"], values[end]
    if since >= until:
        raise SettingError(f"{end} must be above since ({since}), got {until}")
    if since == 0 and until == 1:
        return ()
    return early(until, since=since, after=TOKEN_MERGING if values["after"] == MERGING else None)
