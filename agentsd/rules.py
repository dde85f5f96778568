"""Rules as text, for the panel's field, the infotext and the command line.

    downsample=2+4 until=0.4 method=corrected | blocks=middle_block.* full

Rules are separated by `|` and apply in order. A rule is a list of words separated by spaces: where it applies
(`downsample`, `blocks`, `since`, `until`), and the settings to override by their names in `AgentConfig`, or `full` for
full attention. Without commas, colons, semicolons, quotes and line breaks, it fits into an infotext.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from .checks import SettingError, check_names, shown
from .config import LIMITS, STAGE_SETTINGS, AgentConfig
from .schedule import Rule

FULL = "full"
_CONDITIONS = ("downsample", "blocks", "since", "until")
_FLAGS = {"on": True, "true": True, "off": False, "false": False}
_NONE = "none"


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Parse rules; blank text has none.

    Raises:
        SettingError: the text is malformed, a name is unknown, or a value is outside its range.
    """
    rules = tuple(_parse(part) for part in text.split("|") if part.strip())
    AgentConfig(rules=rules)  # checks names and ranges
    return rules


def format_rules(rules: Iterable[Rule]) -> str:
    """Write rules as text that `parse_rules` reads back as the same rules."""
    return " | ".join(_format(rule) for rule in rules)


def rules_from(value: Any) -> tuple[Rule, ...]:
    """Convert text, rules, or mappings with the arguments of `Rule` to rules.

    Raises:
        SettingError: it is none of these, a name is unknown, or a value is outside its range.
    """
    if value is None or isinstance(value, str):
        return parse_rules(value or "")
    if isinstance(value, (Rule, Mapping)) or not isinstance(value, Iterable):
        raise SettingError(f"rules must be text or a list of rules, got {shown(value)}")
    rules = tuple(_from_mapping(rule) if isinstance(rule, Mapping) else rule for rule in value)
    return AgentConfig(rules=rules).rules


def _from_mapping(arguments: Mapping[str, Any]) -> Rule:
    check_names(arguments, (*_CONDITIONS, "settings"))
    return Rule(**arguments)


def _parse(text: str) -> Rule:
    where: dict[str, Any] = {}
    settings: dict[str, Any] | None = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if word.lower() == FULL:
            if settings:
                raise SettingError(f"rules with {FULL!r} have no other settings, got {', '.join(settings)}")
            settings = None
        elif not equals:
            raise SettingError(f"rules must be words such as NAME=VALUE or {FULL!r}, got {shown(word)}")
        elif name in _CONDITIONS:
            where[name] = _parsed_condition(name, value)
        elif settings is None:
            raise SettingError(f"rules with {FULL!r} have no other settings, got {shown(word)}")
        else:
            check_names({name: value}, STAGE_SETTINGS)
            settings[name] = _parsed(name, value)
    return Rule(settings, **where)


def _parsed_condition(name: str, text: str) -> Any:
    if name in ("since", "until"):
        return _number(name, text)
    parts = text.split("+")
    return tuple(_number(name, part) for part in parts) if name == "downsample" else tuple(parts)


def _number(name: str, text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise SettingError(f"{name} must be a number, got {shown(text)}") from None
    return int(value) if value.is_integer() else value


def _parsed(name: str, text: str) -> Any:
    limits = LIMITS[name]
    if limits["kind"] == "bool":
        if text.lower() not in _FLAGS:
            raise SettingError(f"{name} must be on or off, got {shown(text)}")
        return _FLAGS[text.lower()]
    if text.lower() == _NONE and (limits.get("optional") or None in limits.get("choices", ())):
        return None
    if limits["kind"] == "choice":
        return next((choice for choice in limits["choices"] if str(choice) == text), text)
    return _number(name, text)


def _format(rule: Rule) -> str:
    where = {
        "downsample": "+".join(map(str, rule.downsample)),
        "blocks": "+".join(rule.blocks),
        "since": _written(rule.since) if rule.since > 0 else "",
        "until": _written(rule.until) if rule.until < 1 else "",
    }
    words = [f"{name}={text}" for name, text in where.items() if text]
    if rule.settings is None:
        return " ".join([*words, FULL])
    words += [f"{name}={_written(value)}" for name, value in rule.settings.items()]
    return " ".join(words) or "since=0"  # empty text would be read back as no rule


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return _NONE
    if isinstance(value, Real):
        return str(int(value) if value == int(value) else float(value))
    return str(value)
