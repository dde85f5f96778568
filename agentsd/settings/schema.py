"""The table of settings: those of `AgentConfig`, and the panel's own.

Panel, infotext, X/Y/Z plot, API, command line and ComfyUI are read off it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ..checks import Setting, SettingError, check_names
from ..config import FIELDS, TOKEN_MERGING, AgentConfig, early
from ..rules import format_rules, parse_rules, rules_from
from . import tunings

NOTHING, MERGING = "nothing", "token merging"
BOTH, FIRST, HIRES = "both", "first", "hires"
DAMAGED = "damaged infotext -"  # stands in the place of the rules where an infotext can't be read, with the reason
RECORD = "record"  # the argument that asks for the token map's record
LONGEST_RULES, LONGEST_TUNING = 1000, 2500  # characters: all settings together have to fit into an infotext


def fraction_of(text: str) -> float:
    """Read a deviation, such as "0.5%"."""
    return float(text.removesuffix("%")) / 100


def _as_percent(value: Any) -> Any:
    """Write a fraction such as 0.005, or a text such as "0.5 %", as "0.5%"."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{100 * value:g}%"
    return value.replace(" ", "") if isinstance(value, str) else value


def _rules(value: Any) -> str:
    if isinstance(value, str) and value.startswith(DAMAGED):
        raise SettingError(f"{value}. Nothing of it is used; clear Rules to go on without it")
    return format_rules(rules_from(value))


# fmt: off
_OWN = (
    Setting("enabled", "flag", False, "Agent Attention", "Faster self-attention for large images, without training.",
        option=False, node=None),
    Setting("fp32", "flag", False, "FP32 precision", "Compute the patched attention in 32 bits. Slower; try it if "
        "images come out black or noisy.", (3, 3)),
    Setting("since", "number", 0.0, "From", "Fraction of the diffusion done when agents begin. 0 is pure noise, 1 the "
        "finished image.", (2, 1), high=0.95, step=0.01, node="from"),
    Setting("until", "number", 1.0, "Until", "Fraction of the diffusion done when agents end. Early steps tolerate "
        "agents best.", (2, 2), low=0.05, step=0.01, written=True, implied=0.6),
    Setting("hires_until", "number", 1.0, "Until, hires pass", "When agents end in the hires pass, which starts late: "
        "at denoising strength 0.5 the diffusion is half done.", (8, 1), low=0.05, step=0.01, option=False, node=None),
    Setting("after", "choice", NOTHING, "Afterwards", "What to do after the agents end: nothing (the model is "
        "untouched), or token merging (ratio 0.4, 2×2).", (6, 2), choices=(NOTHING, MERGING), node=None),
    Setting("passes", "choice", BOTH, "Passes", "Which passes to speed up. hires: only the hires pass, where the "
        "image is large.", (3, 2), choices=(BOTH, FIRST, HIRES), option=False, node=None),
    Setting("rules", "text", "", "Rules", "Settings for some layers or a part of the diffusion, such as "
        "“downsample=2+4 method=corrected | blocks=middle_block.* full”. Later rules win; “full” is full attention.",
        (11, 1), high=LONGEST_RULES, canonical=_rules),
    Setting("tuning", "text", "", "Tuning", "“auto” uses what was tuned for this checkpoint and size; images carry the "
        "plan itself. Passes without a plan use the other settings.", (12, 1), high=LONGEST_TUNING,
        canonical=tunings.canonical, option=False, node=None),
    Setting("how_close", "choice", "2%", "How close", "How much the U-Net's output may deviate from full attention's: "
        "what to tune for, and which of the plans found then to use.", choices=("0.5%", "1%", "2%", "5%"), local=True,
        canonical=_as_percent, implies={"tuning": tunings.AUTO}, option=False, node=None),
    Setting("tune", "number", 0.0, "Tune to", "Make the next image without Agent Attention and tune on it, to this "
        "deviation, such as 0.02. 0 doesn't tune.", step=0.001, local=True, axis=False, option=False, node=None),
)
# A script's first arguments. Their order is a contract of the API: new ones are appended, as they come in the table.
_FIRST = (
    "enabled", "ratio", "agent_ratio", "k_scale2", "k_shortcut", "fp32", "agent_source", "method", "since", "until",
    "hires_until", "after", "passes", "max_downsample", "min_tokens", "max_agents", "sx", "sy", "use_rand",
    "merge_attn", "merge_crossattn", "merge_mlp", "seed",
)
# fmt: on

_CORE: Mapping[str, Setting] = {name: field for name, field in FIELDS.items() if field.label}
_ALL = {row.name: row for row in (*_OWN, *(field.control for field in _CORE.values()))}
SETTINGS: tuple[Setting, ...] = tuple(_ALL[name] for name in dict.fromkeys((*_FIRST, *_ALL)))
BY_NAME: Mapping[str, Setting] = {row.name: row for row in SETTINGS}
NAMES: tuple[str, ...] = tuple(BY_NAME)
DEFAULTS: Mapping[str, Any] = {row.name: row.default for row in SETTINGS}
# What an infotext that names no setting stands for
IMPLIED: Mapping[str, Any] = {row.name: row.default if row.implied is None else row.implied for row in SETTINGS}
ARGUMENTS: tuple[str, ...] = (*_FIRST, RECORD, *NAMES[len(_FIRST) :])


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting in canonical form; missing ones and those that are None (a cleared field) at their defaults.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    check_names(values, NAMES)
    return {name: row.default if values.get(name) is None else row.check(values[name]) for name, row in BY_NAME.items()}


def from_args(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read every setting, in canonical form, from a script's positional arguments; raises as `check` does.

    They come in the order of `ARGUMENTS`; missing ones get their defaults, extra ones are ignored. The first may be a
    mapping of settings by name, which switches the extension on unless it says otherwise, and counts more than those
    behind it; `overrides`, such as those of an X/Y/Z cell, count more than all. While the extension is off, nothing is
    checked and all are the defaults.
    """
    values = dict(zip(ARGUMENTS, args, strict=False))
    values.pop(RECORD, None)
    # the older extension's list has a switch in its place
    other_order = isinstance(values.get("ratio"), bool)
    if args and isinstance(args[0], Mapping):
        values.update({"enabled": True, **args[0]})
    values.update(overrides or {})
    if not check({"enabled": values.get("enabled")})["enabled"]:
        return check({})
    if other_order:
        raise SettingError(
            "the list of arguments is in another order, perhaps sd-webui-agentattention's; expected were "
            f"{', '.join(ARGUMENTS[:7])} and so on, or a dictionary such as {{'ratio': 0.4}}"
        )
    return check(values)


def labelled(message: str) -> str:
    """Name the settings in the message of a `SettingError` by their labels, as the panel shows them."""
    name = r"^\w+|(?<=must be above )\w+"
    return re.sub(name, lambda found: BY_NAME[found[0]].label if found[0] in BY_NAME else found[0], message)


def wants_record(args: Sequence[Any]) -> bool:
    """Whether a script's positional arguments ask for the token map's record."""
    return dict(zip(ARGUMENTS, args, strict=False)).get(RECORD) is True


def is_left_out(values: Mapping[str, Any], hires: bool) -> bool:
    return values["passes"] == (FIRST if hires else HIRES)


def to_config(values: Mapping[str, Any], *, hires: bool = False) -> AgentConfig | None:
    """Make the core's config for a pass of every setting, in canonical form; None if the pass is to be left alone.

    Raises SettingError for settings that contradict each other.
    """
    if not values["enabled"] or is_left_out(values, hires):
        return None
    since, end = values["since"], "hires_until" if hires else "until"
    until = values[end]
    if since >= until:
        raise SettingError(f"{end} must be above since ({since}), got {until}")
    after = TOKEN_MERGING if values["after"] == MERGING else None
    return AgentConfig(
        **{name: field.of_control(values[name]) for name, field in _CORE.items()},
        attn_precision="fp32" if values["fp32"] else None,
        stages=() if (since, until) == (0, 1) else early(until, since=since, after=after),
        rules=parse_rules(values["rules"]),
    )
