"""Rules as text, for the panel's field, the infotext and the command line.

    downsample=2+4 until=0.4 method=corrected | blocks=middle_block.* full

Rules are separated by `|` and apply in order. A rule is a list of words separated by spaces: where it applies
(`downsample`, `blocks`, `since`, `until`), and the settings to override by their names in `AgentConfig`, or `full` for
full attention. Without commas, colons, semicolons, quotes and line breaks, it fits into an infotext.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .checks import SettingError, check_names, shown
from .config import FIELDS, RULE_SETTINGS, AgentConfig
from .schedule import LEVEL, SINCE, UNTIL, Rule

FULL = "full"
_AND = "+"
# How to read each, and how to write it: empty where it says nothing
_CONDITIONS: Mapping[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    "downsample": (lambda text: tuple(map(LEVEL.parse, text.split(_AND))), lambda some: _AND.join(map(str, some))),
    "blocks": (lambda text: tuple(text.split(_AND)), _AND.join),
    "since": (SINCE.parse, lambda since: SINCE.format(since) if since > 0 else ""),
    "until": (UNTIL.parse, lambda until: UNTIL.format(until) if until < 1 else ""),
}


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Parse rules; blank text has none.

    Raises:
        SettingError: the text is malformed, a name is unknown, or a value is outside its range.
    """
    return tuple(_parse(part) for part in text.split("|") if part.strip())


def format_rules(rules: Iterable[Rule]) -> str:
    """Write rules as text that `parse_rules` reads back as the same rules."""
    return " | ".join(_format(rule) for rule in rules)


def rules_from(value: Any) -> tuple[Rule, ...]:
    """Convert text, rules, or mappings with the arguments of `Rule` to rules; raises as `parse_rules` does."""
    if value is None or isinstance(value, str):
        return parse_rules(value or "")
    if isinstance(value, (Rule, Mapping)) or not isinstance(value, Iterable):
        raise SettingError(f"rules must be text or a list of rules, got {shown(value)}")
    rules = list(value)
    for i, rule in enumerate(rules):
        if isinstance(rule, Mapping):
            check_names(rule, (*_CONDITIONS, "settings"))
            rules[i] = Rule(**rule)
    return AgentConfig(rules=tuple(rules)).rules


def _parse(text: str) -> Rule:
    where, settings, full = {}, {}, False
    for word in text.split():
        name, equals, value = word.partition("=")
        if word.lower() == FULL:
            full = True
        elif not equals:
            raise SettingError(f"rules must be words such as NAME=VALUE or {FULL!r}, got {shown(word)}")
        elif name in _CONDITIONS:
            where[name] = _CONDITIONS[name][0](value)
        else:
            check_names({name: value}, RULE_SETTINGS)
            settings[name] = FIELDS[name].parse(value)
    if full and settings:
        raise SettingError(f"rules with {FULL!r} have no other settings, got {', '.join(settings)}")
    return Rule(None if full else settings, **where)


def _format(rule: Rule) -> str:
    where = {name: write(getattr(rule, name)) for name, (_, write) in _CONDITIONS.items()}
    words = [f"{name}={text}" for name, text in where.items() if text]
    if rule.settings is None:
        return " ".join([*words, FULL])
    words += [f"{name}={FIELDS[name].format(FIELDS[name].check(value))}" for name, value in rule.settings.items()]
    return " ".join(words) or "since=0.0"  # empty text would be read back as no rule
