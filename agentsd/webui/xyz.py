"""Axes of the X/Y/Z plot, built from the table of settings. Imports no WebUI: the plot's module is passed in."""

from __future__ import annotations

from collections.abc import Iterable
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
        axes = [axis(grid, row) for row in SETTINGS if row.axis]
        grid.axis_options.extend(each for each in axes if each.label not in labels)


def axis(grid: Any, row: Setting) -> Any:
    """Make the axis of one setting. It switches the extension on, unless the setting is the switch itself."""

    def read(value: Any) -> Any:
        return row.parse(value) if isinstance(value, str) else row.check(value)

    def apply(p: Any, value: Any, values: Any) -> None:
        # a new dictionary each time, since a cell's p is a shallow copy
        setattr(p, XYZ, {"enabled": True, **row.implies, **getattr(p, XYZ, {}), row.name: read(value)})

    def confirm(p: Any, values: Any) -> None:
        for value in values:
            read(value)

    choices = ("True", "False") if row.kind == "flag" else row.choices
    more = {"choices": lambda: list(choices)} if choices else {}
    label = PREFIX + ("Enabled" if row.name == "enabled" else row.label)
    return grid.AxisOption(label, {"number": float, "whole": int}.get(row.kind, str), apply, confirm=confirm, **more)
