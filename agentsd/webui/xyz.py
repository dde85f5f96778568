"""Axes of the X/Y/Z plot, built from the table of settings. Imports no WebUI: the plot's module is passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..checks import Setting
from ..settings.schema import SETTINGS

PREFIX = "[Agent Attention] "
# Attribute of the host's processing object that holds the settings changed by a cell of the plot, by name
XYZ = "_agent_attention_xyz"


def register(grids: Iterable[Any]) -> None:
    """Add an axis for every setting that may have one to each plot module, unless it is there."""
    for grid in grids:
        labels = {option.label for option in grid.axis_options}
        grid.axis_options.extend(axis(grid, row) for row in SETTINGS if row.axis and _label(row) not in labels)


def axis(grid: Any, row: Setting) -> Any:
    """Make the axis of one setting. It switches the extension on, unless the setting is the switch itself."""
    choices = ("True", "False") if row.kind == "flag" else row.choices
    more = {"choices": lambda: list(choices)} if choices else {}
    kind = {"number": float, "whole": int}.get(row.kind, str)
    return grid.AxisOption(_label(row), kind, _apply(row), confirm=_confirm(row), **more)


def _label(row: Setting) -> str:
    return PREFIX + ("Enabled" if row.name == "enabled" else row.label)


def _apply(row: Setting) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # make a new dictionary each time, since a cell's p is a shallow copy
        setattr(p, XYZ, {"enabled": True, **row.implies, **getattr(p, XYZ, {}), row.name: _value(row, value)})

    return apply


def _confirm(row: Setting) -> Callable[[Any, Any], None]:
    def confirm(p: Any, values: Any) -> None:
        for value in values:
            _value(row, value)

    return confirm


def _value(row: Setting, value: Any) -> Any:
    return row.parse(value) if isinstance(value, str) else row.check(value)
