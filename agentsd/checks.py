"""Checks of values: every error names the setting, its value and the range. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from numbers import Real
from typing import Any


class SettingError(ValueError):
    """A setting has a value outside its range. The message names the setting, the value and the range."""


# Characters of a value that messages repeat: they end up in infotexts
LONGEST = 120


def shown(value: Any) -> str:
    """Format a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def reject(name: str, value: Any, allowed: str) -> SettingError:
    return SettingError(f"{name} must be {allowed}, got {shown(value)}")


def checked_number(name: str, value: Any, meta: Mapping[str, Any]) -> float | int | None:
    if value is None and meta.get("optional"):
        return None
    whole = meta["kind"] == "int"
    allowed = f"{'a whole number' if whole else 'a number'} from {meta['low']} to {meta['high']}"
    if meta.get("optional"):
        allowed += ", or None"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise reject(name, value, allowed)
    if not meta["low"] <= value <= meta["high"]:  # also rejects NaN
        raise reject(name, value, allowed)
    if whole and value != int(value):
        raise reject(name, value, allowed)
    return int(value) if whole else float(value)


def checked_choice(name: str, value: Any, meta: Mapping[str, Any]) -> Any:
    # True == 1, but nobody who writes max_downsample=True means 1
    number = isinstance(value, Real) and not isinstance(value, bool)
    for choice in meta["choices"]:
        if (number if isinstance(choice, int) else type(value) is type(choice)) and value == choice:
            return choice
    raise reject(name, value, "one of " + ", ".join(repr(c) for c in meta["choices"]))


def checked_flag(name: str, value: Any, meta: Mapping[str, Any]) -> bool:
    if not isinstance(value, bool):
        raise reject(name, value, "True or False")
    return value


CHECKS = {"float": checked_number, "int": checked_number, "choice": checked_choice, "bool": checked_flag}


def checked_fraction(name: str, value: Any) -> float:
    return checked_number(name, value, {"kind": "float", "low": 0.0, "high": 1.0})


def checked_overrides(settings: Any) -> dict[str, Any] | None:
    """Copy the overrides, so that they cannot change once checked; the config checks their names and values."""
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise reject("settings", settings, "a mapping of settings, or None for full attention")
    return dict(settings)


def checked_sequence(name: str, values: Any, kind: type, allowed: str) -> tuple[Any, ...]:
    if isinstance(values, (str, kind, Mapping)) or not hasattr(values, "__iter__"):
        raise reject(name, values, allowed)
    checked = tuple(values)
    if not all(isinstance(value, kind) for value in checked):
        raise reject(name, values, allowed)
    return checked


def check_names(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise SettingError for the first name in `given` that is not in `known`."""
    for name, value in given.items():
        if name not in known:
            name = str(name)[:LONGEST]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise SettingError(f"unknown setting {name}={shown(value)}{hint}; the settings are {', '.join(known)}")
