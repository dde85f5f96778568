"""Settings in an image's infotext: one compact entry, written while the extension is on and read back exactly.

Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ..checks import SettingError
from . import legacy
from .table import BY_NAME, IMPLIED, SETTINGS

KEY = "Agent Attention"
NOTE = "Agent Attention note"
# What a generation that tuned has found: not of its own images, which were made without us
TUNED = "Agent Attention tuning"
ENTRIES = (KEY, NOTE, TUNED)


def write(values: Mapping[str, Any]) -> str:
    """Write the entry under KEY, such as "agent_ratio=0.95; until=0.6".

    It needs no quotes, having no comma, colon or line break. The main settings are always named, others only if they
    differ from what an entry without them stands for.
    """
    rows = [row for row in SETTINGS if row.name != "enabled" and not row.local]
    named = [row for row in rows if row.written or values[row.name] != IMPLIED[row.name]]
    return "; ".join(f"{row.name}={row.text(values[row.name])}" for row in named)


def read(entry: str) -> dict[str, Any] | None:
    """Read all settings from an entry; None if it names none of them, and so is not ours.

    Those that cannot be read (a later version's, say) get the value that an entry without them stands for.
    """
    values = {**IMPLIED, "enabled": True}
    pairs = dict(pair.strip().partition("=")[::2] for pair in entry.split(";"))
    if not pairs.keys() & BY_NAME.keys():
        return None
    for name, text in pairs.items():
        if name in BY_NAME:
            try:
                values[name] = BY_NAME[name].parsed(text)
            except SettingError:
                continue
    return values


@cache
def reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function from the host's parsed infotext to the control's value; None leaves the control as it is.

    Images of the older extension are read too. An image made with neither extension switches the extension off and
    changes nothing else. Each name has exactly one function, so that the host can match the controls of two tabs by it.
    """

    def value(params: Mapping[str, Any]) -> Any:
        entry = params.get(KEY)
        values = legacy.read(params) if entry is None else read(str(entry))
        if values is None:
            return False if name == "enabled" else None
        return None if BY_NAME[name].local else values[name]

    return value
