"""Settings in an image's infotext: one compact entry, written while the extension is on and read back exactly.

Everything that we write into images keeps to one alphabet, since some thirty programs read it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import Any

from ..checks import SettingError
from .schema import BY_NAME, DAMAGED, FIRST, HIRES, IMPLIED, MERGING, NOTHING, SETTINGS

# The last is what a generation that tuned has found: not of its own images, which were made without us
KEY, NOTE, TUNED = ENTRIES = "Agent Attention", "Agent Attention note", "Agent Attention tuning"
LONGEST = 4000  # characters of an entry
_END = " &"  # ends a text, so that one that was cut off is noticed
_ROWS = {row.name: row for row in SETTINGS if row.name != "enabled" and not row.local}
_PASTED: set[str] = set()  # the entries that were pasted since the program began, as `write` writes them
# What readers of infotexts take for the end of a value, a quotation, a network or a weight
_REPLACED: dict[int, Any] = str.maketrans("(){}–−", "[][]--", "<>\"'“”‘’")
_REPLACED |= {ord(","): ";", ord(":"): " -", ord("×"): "x", ord("→"): "to"}


def plain(text: str) -> str:
    """Rewrite text in what we write into images: printable ASCII without , : " ' ( ) { } < >, brackets balanced."""
    text = unicodedata.normalize("NFKD", text).translate(_REPLACED).encode("ascii", "ignore").decode()
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[: LONGEST - 1]
    depths = list(accumulate((c == "[") - (c == "]") for c in text)) or [0]
    return text if min(depths) >= 0 == depths[-1] else re.sub(r"[\[\]]", "", text)


def note(reasons: Iterable[str]) -> str:
    """Write why an image, or a part of it, was made without us: the entry under NOTE."""
    return plain(f"not applied, {' and '.join(reasons)}")


def write(values: Mapping[str, Any]) -> str:
    """Write the entry under KEY, such as "agent_ratio=0.95; until=0.6".

    The main settings are always named, others only if they differ from what an entry without them stands for.
    """
    named = (row for row in _ROWS.values() if row.written or values[row.name] != IMPLIED[row.name])
    return "; ".join(f"{row.name}={row.format(values[row.name])}{_END * (row.kind == 'text')}" for row in named)


def entries(values: Mapping[str, Any]) -> dict[str, str]:
    """Make the entry under KEY; where a tuning is too long for an infotext, a note instead."""
    entry = write(values)
    refusal = f"the settings are left out; their {len(entry)} characters are too many for an infotext"
    return {KEY: entry} if len(entry) < LONGEST else {NOTE: plain(refusal)}


def read(entry: str) -> dict[str, Any]:
    """Read all settings from an entry; raises SettingError for one that is damaged, or of a later version."""
    values = {**IMPLIED, "enabled": True}
    for pair in entry.split(";"):
        name, _, text = pair.strip().partition("=")
        row = _ROWS.get(name)
        if row is None:
            raise SettingError(f"unknown setting {name[:40]!r}")
        if row.kind == "text" and not text.endswith(_END):
            raise SettingError(f"{name} is cut off")
        values[name] = row.parse(text.removesuffix(_END) if row.kind == "text" else text)
    return values


# Settings that the older extension has as well
_SAME = {"ratio": "First Pass Ratio", "agent_ratio": "First Pass Agent Ratio", "sx": "First Pass sx"}
_SAME |= {"sy": "First Pass sy", "max_downsample": "Max Downsample", "fp32": "Use FP32 Precision"}


def read_older(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read our settings from an image of sd-webui-agentattention ("AgAt …" keys); None for any other image.

    It patches either the first pass or the hires pass. What it does from "Second Pass Step" on becomes our token
    merging, whatever its settings. What cannot be read gets our defaults.
    """

    def entry(key: str) -> str:
        return str(params.get(f"AgAt {key}"))

    if entry("Active") != "True":
        return None
    # the host's parser can't see past the full stop
    hires_only = "True" in (entry("Apply to Hires. Fix Only"), str(params.get("Fix Only")))
    values = {**IMPLIED, "enabled": True, "agent_source": "similarity", "passes": HIRES if hires_only else FIRST}
    values["after"] = MERGING if entry("Use Second Pass") == "True" else NOTHING
    for name, key in _SAME.items():
        with suppress(SettingError):
            values[name] = BY_NAME[name].parse(entry(key))
    with suppress(KeyError, ValueError, ZeroDivisionError):
        steps = float((hires_only and params.get("Hires steps")) or params["Steps"])
        part = min(1.0, float(entry("Second Pass Step")) / steps)
        start = 1.0 - float(params.get("Denoising strength", 1.0)) if hires_only else 0.0
        end = BY_NAME["hires_until" if hires_only else "until"]
        values[end.name] = end.check(max(end.low, round(start + (1.0 - start) * part, 2)))
    return values


def was_pasted(values: Mapping[str, Any]) -> bool:
    """Whether settings are those of an infotext that was read: they are to make its image again."""
    return write(values) in _PASTED


@cache
def reader(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function from the host's parsed infotext to the control's value; None leaves the control as it is.

    An image made with neither this extension nor the older one switches ours off and changes nothing else. A damaged
    entry is refused as a whole: it switches the extension on and puts the reason in the place of the rules, where
    preview and run tell it. Each name has one function, by which the host matches the controls of two tabs.
    """

    def value(params: Mapping[str, Any]) -> Any:
        try:
            values = read(str(params[KEY])) if params.get(KEY) is not None else read_older(params)
        except SettingError as error:
            values = {"enabled": True, "rules": plain(f"{DAMAGED} {error}")}
        else:
            if values is None:
                values = {"enabled": False}
            else:
                _PASTED.add(write(values))
        return None if BY_NAME[name].local else values.get(name)

    return value
