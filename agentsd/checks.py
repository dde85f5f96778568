"""A setting: its type, its range, its words, and the one way to check, read and write its values. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any


class SettingError(ValueError):
    """A setting has a value outside its range. The message names the setting, the value and the range."""


NONE = "none"
_FLAGS = {"on": True, "true": True, "off": False, "false": False}
_SHOWN = 120  # characters of a value that messages repeat: they end up in infotexts
_SLIDER_STEPS = 1000  # more than these are typed into a field
_BROWSER_MAX = 2**53 - 1  # the largest integer that a browser represents exactly


def shown(value: Any) -> str:
    """Format a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def reject(name: str, value: Any, allowed: str) -> SettingError:
    return SettingError(f"{name} must be {allowed}, got {shown(value)}")


@dataclass(frozen=True)
class Setting:
    """One setting, as the library, panel, X/Y/Z plot, infotext, API, rules, command line and ComfyUI have it."""

    name: str  # name everywhere but in ComfyUI
    kind: str  # "number", "whole" (a whole number), "flag", "choice" or "text"
    default: Any  # default value
    label: str = ""  # of the control: short, constant, unique (translations match it). Without one: the library's alone
    help: str = ""  # what it does, in full sentences
    place: tuple[int, int] = (99, 0)  # (line of the panel, place in the line); 99 is the last
    low: float = 0.0  # smallest value of a number
    high: float = 1.0  # largest value of a number; number of characters of a text
    step: float = 1  # step of the control of a number
    optional: bool = False  # whether a number may be None, which is written "none"
    choices: Sequence[Any] = ()  # values of a choice
    canonical: Callable[[Any], Any] = lambda value: value  # turns a text or a choice, as the API has it, into its form
    more_help: Callable[[], str] = str  # makes text to append to `help`; called when the help is read
    panel: Any = None  # default of the control; None for that of the library
    # value that an infotext stands for which does not name the setting; None for the panel's default. It never changes,
    # so that a new default leaves the images of existing infotexts as they are.
    implied: Any = None
    written: bool = False  # whether infotexts name it even at that value
    local: bool = False  # whether it concerns one generation or one user only: neither infotext nor presets hold it
    axis: bool = True  # whether the X/Y/Z plot has an axis for it
    implies: Mapping[str, Any] = field(default_factory=dict)  # settings that its axis sets as well
    option: bool = True  # whether the command line has an option for it
    node: str | None = ""  # name of the input of ComfyUI's node; None if it has none, empty for `name`

    @property
    def allowed(self) -> str:
        """The range in words."""
        kind, number = ("a whole number", int) if self.kind == "whole" else ("a number", float)
        return {
            "flag": "True or False",
            "choice": f"one of {', '.join(map(repr, self.choices))}",
            "text": f"a text of at most {self.high:.0f} characters",
        }.get(self.kind, f"{kind} from {number(self.low)} to {number(self.high)}{', or None' if self.optional else ''}")

    @property
    def tooltip(self) -> str:
        return self.help + self.more_help()

    @property
    def numeric(self) -> bool:
        return self.kind in ("number", "whole")

    @property
    def slider(self) -> bool:
        return self.numeric and (self.high - self.low) / self.step <= _SLIDER_STEPS

    @property
    def control(self) -> Setting:
        """The setting as the panel, the API and infotexts have it: choices are texts, and 0 is no limit."""
        changes: dict[str, Any] = {"default": self.default if self.panel is None else self.panel}
        if not all(isinstance(each, str) for each in self.choices):  # those of methods grow as these are registered
            changes["choices"] = tuple(map(str, self.choices))
        if self.optional:
            changes |= {"default": 0, "low": 0, "optional": False}
        if self.kind == "whole":
            changes["high"] = min(self.high, _BROWSER_MAX)
        return replace(self, **changes)

    def of_control(self, value: Any) -> Any:
        """Return the library's value for that of its control."""
        value = self.parse(value) if self.kind == "choice" else value
        return None if self.optional and value == 0 else value

    def check(self, value: Any) -> Any:
        """Return a value in canonical form.

        Raises:
            SettingError: it is not one of this setting; the message names the setting, the value and the range.
        """
        value = self.canonical(value)
        number = isinstance(value, Real) and not isinstance(value, bool)
        # True == 1, but nobody who writes max_downsample=True means 1; 2 does for a control's "2"
        for choice in self.choices:
            if (type(choice) is type(value) or number) and choice in (value, str(value)):
                return choice
        flag, text = self.kind == "flag", self.kind == "text"
        if (flag and isinstance(value, bool)) or (text and isinstance(value, str) and len(value) <= self.high):
            return value
        if self.optional and value is None:
            return None
        if self.numeric and number and self.low <= value <= self.high:  # NaN is not
            if self.kind == "number":
                return float(value)
            if value == int(value):
                return int(value)
        raise reject(self.name, value, self.allowed)

    def parse(self, text: str) -> Any:
        """Read a value that `format` wrote, or that somebody typed; raises as `check` does."""
        text = text.strip()
        if self.kind != "text" and text.lower() == NONE and (self.optional or None in self.choices):
            return None
        value: Any = _FLAGS.get(text.lower(), text) if self.kind == "flag" else text
        value = next((choice for choice in self.choices if self.format(choice) == text), value)
        for number in (float, int) if self.numeric else ():  # int where it can be one
            with suppress(ValueError):
                value = number(text)
        return self.check(value)

    def format(self, value: Any) -> str:
        """Write a value as text that `parse` reads."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return NONE if value is None else str(value)


def check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise SettingError for the first name in `given` that is not in `known`."""
    for name, value in given.items():
        if name not in known:
            name = str(name)[:_SHOWN]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise SettingError(f"unknown setting {name}={shown(value)}{hint}; the settings are {', '.join(known)}")


def checked_sequence(name: str, values: Any, kind: type, allowed: str) -> tuple[Any, ...]:
    iterable = hasattr(values, "__iter__") and not isinstance(values, (str, kind, Mapping))
    checked = tuple(values) if iterable else (values,)
    if not iterable or not all(isinstance(value, kind) for value in checked):
        raise reject(name, values, allowed)
    return checked
