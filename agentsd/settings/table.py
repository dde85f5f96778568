"""The one table of the extension's settings. Panel, infotext, XYZ axes and API are all made from it.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..config import AUTO, LIMITS, TOKEN_MERGING, AgentConfig, SettingError, check_names, early
from ..methods import selectable
from ..rules import format_rules, parse_rules, rules_from

NOTHING, MERGING = "nothing", "token merging"
BOTH, FIRST, HIRES = "both", "first", "hires"


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: its name in the API and in the infotext.
        label: what the panel calls it; short, constant and unique, since translations match it.
        info: the line under the control, in plain words.
        default: the panel's default.
        kind: "flag", "slider", "number", "choice" or "text".
        low: smallest value of a slider or number.
        high: largest value of a slider or number.
        step: step of a slider or number; whole steps make it a whole number.
        choices: what a choice can be, as text.
        folded: whether it is among the settings that fewer people need.
        written: whether the infotext names it even at its default.
        more_info: what is added to `info`, made when it is asked for.
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

    @property
    def help(self) -> str:
        """The whole line under the control."""
        return self.info if self.more_info is None else f"{self.info} {self.more_info()}".strip()

    @property
    def whole(self) -> bool:
        return self.kind in ("slider", "number") and isinstance(self.step, int)

    @property
    def xyz_type(self) -> type:
        """What an XYZ axis reads its values as."""
        if self.kind in ("slider", "number"):
            return int if self.whole else float
        return str

    def checked(self, value: Any) -> Any:
        """The value in its one canonical form; None (a cleared field) is the default.

        Raises:
            SettingError: naming the setting, the value and the range.
        """
        if value is None:
            return self.default
        if self.kind == "flag":
            return self._flag(value)
        if self.kind == "choice":
            return self._choice(value)
        if self.kind == "text":
            return format_rules(rules_from(value))
        return self._number(value)

    def _flag(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise SettingError(f"{self.name} must be True or False, got {value!r}")

    def _choice(self, value: Any) -> str:
        # a number such as max_downsample=2 is as good as its text; True is not as good as "True"
        text = value if isinstance(value, bool) else str(value)
        if text in self.choices:
            return text
        raise SettingError(f"{self.name} must be one of {', '.join(map(repr, self.choices))}, got {value!r}")

    def _number(self, value: Any) -> float | int:
        real = isinstance(value, Real) and not isinstance(value, bool)
        # a NaN is in no range
        if real and self.low <= value <= self.high and not (self.whole and value != int(value)):
            return int(value) if self.whole else float(value)
        what = "a whole number" if self.whole else "a number"
        raise SettingError(f"{self.name} must be {what} from {self.low} to {self.high}, got {value!r}")

    def parsed(self, text: str) -> Any:
        """The value that `text` stands for, as the infotext or an XYZ axis writes it; raises SettingError."""
        if self.kind == "flag":
            flags = {"on": True, "true": True, "off": False, "false": False}
            return flags[text.lower()] if text.lower() in flags else self._flag(text)
        if self.kind == "choice":
            return self._choice(text)
        if self.kind == "text":
            return self.checked(text)
        try:
            return self._number(float(text))
        except ValueError as error:  # SettingError is one, too
            raise error if isinstance(error, SettingError) else self._not_a_number(text) from None

    def _not_a_number(self, text: str) -> SettingError:
        return SettingError(f"{self.name} must be a number from {self.low} to {self.high}, got {text!r}")

    def text(self, value: Any) -> str:
        """The value as the infotext writes it: `parsed` reads it back exactly."""
        return ("on" if value else "off") if self.kind == "flag" else str(value)


def _limited(name: str, kind: str, label: str, info: str, default: Any, **more: Any) -> Row:
    """A row whose range is that of the core's setting of the same name."""
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
        "Share of the tokens that are left out when agent tokens are made. Higher means fewer agents: faster, less "
        "faithful. 0.95 on a grid is one agent for 4×4 tokens.",
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
        "Compute the patched attention in 32 bits. Slower; for black or noisy images.",
        False,
        "flag",
        folded=False,
    ),
    _limited(
        "agent_source",
        "choice",
        "Agent source",
        "grid: averages over square cells, the fastest and right for every device. similarity: clusters of similar "
        "tokens, as the authors' AgentSD.",
        "grid",
        written=True,
    ),
    _limited(
        "method",
        "choice",
        "Method",
        "How self-attention is computed.",
        "agent",
        more_info=lambda: " ".join(f"{method.name}: {method.summary}." for method in selectable()),
    ),
    Row(
        "since",
        "From",
        "Part of the diffusion that is done when agents begin. 0 is pure noise, 1 the finished image.",
        0.0,
        "slider",
        high=0.95,
        step=0.01,
    ),
    Row(
        "until",
        "Until",
        "Part of the diffusion that is done when agents end. Early steps bear agents best.",
        0.6,
        "slider",
        low=0.05,
        step=0.01,
        written=True,
    ),
    Row(
        "hires_until",
        "Until, hires pass",
        "The same for the hires pass, which starts late: at denoising strength 0.5 half of the diffusion is done.",
        1.0,
        "slider",
        low=0.05,
        step=0.01,
    ),
    Row(
        "after",
        "Afterwards",
        "What is done from there to the end: nothing (the model is untouched), or token merging (ratio 0.4, 2×2).",
        NOTHING,
        "choice",
        choices=(NOTHING, MERGING),
    ),
    Row(
        "passes",
        "Passes",
        "Which passes are made faster. hires: only the hires pass, where the image is large.",
        BOTH,
        "choice",
        choices=(BOTH, FIRST, HIRES),
    ),
    _limited(
        "max_downsample",
        "choice",
        "Layers down to",
        "How far down the U-Net layers are patched. auto: the largest self-attention layers that the model has "
        "(1 in SD 1 and SD 2, 2 in SDXL).",
        AUTO,
        choices=(AUTO, *(str(c) for c in LIMITS["max_downsample"]["choices"] if c != AUTO)),
    ),
    _limited(
        "min_tokens",
        "number",
        "Minimum tokens",
        "Layers with fewer tokens are left alone. A 512×512 image has 4096 tokens in SD 1's largest layers.",
        0,
    ),
    _limited(
        "max_agents",
        "number",
        "Maximum agents",
        "Upper limit on the number of agent tokens in a layer; 0 sets none.",
        0,
        low=0,
    ),
    _limited(
        "sx",
        "slider",
        "Cell width",
        "sx: width in tokens of the cells that similar tokens are merged into (and of the pool method's cells). "
        "At most 1 − 1/(sx·sy) of the tokens can be merged.",
        4,
    ),
    _limited("sy", "slider", "Cell height", "sy: height in tokens of those cells.", 4),
    _limited(
        "use_rand",
        "flag",
        "Random partition",
        "Draw the token that each cell's others are merged into, instead of the first. The same settings give the "
        "same image.",
        True,
    ),
    _limited("merge_attn", "flag", "Merge self-attention", "Act on self-attention at all.", True),
    _limited(
        "merge_crossattn",
        "flag",
        "Merge cross-attention",
        "Merge tokens by Ratio before cross-attention too. Not recommended.",
        False,
    ),
    _limited(
        "merge_mlp",
        "flag",
        "Merge MLP",
        "Merge tokens by Ratio before the feed-forward layer too. Not recommended.",
        False,
    ),
    _limited(
        "seed",
        "number",
        "Partition seed",
        "Seed of the random partition. It has nothing to do with the image's seed.",
        0,
        # what a browser's numbers hold exactly
        high=2**53 - 1,
    ),
    Row(
        "rules",
        "Rules",
        "What differs in some layers or a part of the diffusion, such as “downsample=2+4 method=corrected | "
        "blocks=middle_block.* full”. Later rules count more; “full” is full attention.",
        "",
        "text",
    ),
)

BY_NAME: Mapping[str, Row] = {row.name: row for row in SETTINGS}
NAMES: tuple[str, ...] = tuple(BY_NAME)
DEFAULTS: Mapping[str, Any] = {row.name: row.default for row in SETTINGS}

# What a script is given, in this order. The order is a contract of the API: what is new goes to the end. "record" asks
# for the token map's record.
RECORD = "record"
_AT = NAMES.index("seed") + 1
ARGUMENTS: tuple[str, ...] = (*NAMES[:_AT], RECORD, *NAMES[_AT:])

# Rows that the core has under the same name and in the same form
_AS_IN_THE_CORE = tuple(n for n in NAMES if n in LIMITS and n not in ("max_downsample", "max_agents", "rules"))


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting in its canonical form, those not given at their default.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    check_names(values, NAMES)
    return {name: row.checked(values.get(name)) for name, row in BY_NAME.items()}


def from_args(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that a script's positional arguments stand for.

    Args:
        args: values in the order of `ARGUMENTS`; or fewer; or more, which are ignored; or one mapping by name, which
            switches the extension on unless it says otherwise, and after which the arguments go on in that order.
        overrides: settings by name that count more than the arguments: an XYZ cell's.

    Returns:
        Every setting, canonical. Where the extension is off the others are not looked at: all are at their defaults.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    values = dict(zip(ARGUMENTS, args, strict=False))
    values.pop(RECORD, None)
    if args and isinstance(args[0], Mapping):
        values.update({"enabled": True, **args[0]})
    values.update(overrides or {})
    return check(values if BY_NAME["enabled"].checked(values.get("enabled")) else {})


def wants_record(args: Sequence[Any]) -> bool:
    """Whether a script's positional arguments ask for the token map's record."""
    return dict(zip(ARGUMENTS, args, strict=False)).get(RECORD) is True


def to_config(values: Mapping[str, Any], *, hires: bool = False) -> AgentConfig | None:
    """The core's config for one sampling pass; None where that pass is to be left alone.

    Args:
        values: every setting, canonical (from `check`).
        hires: whether it is the hires pass.

    Raises:
        SettingError: settings that exclude each other; the message names them.
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
