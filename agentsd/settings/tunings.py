"""The setting `tuning`: the tunings kept for the checkpoint, or plans as text, each with the pass that it is for.

first tuning 1 64x64 0.02 1f00… | method=corrected … & hires tuning 1 128x128 0.02 1f00… | …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import SettingError
from ..tuning.result import Tuning, TuningError

AUTO = "auto"
# Passes that tunings are kept for
FIRST, HIRES, IMG2IMG = PASSES = "first", "hires", "img2img"
_AND = " & "
LONGEST = 60  # characters of a value to repeat in an error message


@dataclass(frozen=True)
class PassTuning:
    """A tuning, and the pass that it is for: one of `PASSES`."""

    of: str
    tuning: Tuning

    @property
    def text(self) -> str:
        return f"{self.of} {self.tuning.text}"


def write(plans: Iterable[PassTuning]) -> str:
    """Write plans as text, without repetition. It has no comma, colon, semicolon, quote or line break."""
    return _AND.join(dict.fromkeys(plan.text for plan in plans))


def read(text: str) -> tuple[PassTuning, ...]:
    """Read plans from text; blank text and AUTO have none.

    Raises:
        SettingError: the text is damaged, or of a later version.
    """
    return () if text.strip() in ("", AUTO) else tuple(_read(part) for part in text.split(_AND.strip()))


def _read(text: str) -> PassTuning:
    first, _, rest = text.strip().removeprefix("plan:").strip().partition(" ")
    of, plan = (first, rest) if first in PASSES else (FIRST, text)
    try:
        return PassTuning(of, Tuning.from_text(plan))
    except TuningError as error:
        raise _refuse(text, str(error)) from error


def canonical(value: Any) -> str:
    """Return the text of what the API may send: text, a tuning as a dictionary or an object, or a list of these.

    Raises:
        SettingError: it is none of these, or is damaged.
    """
    if isinstance(value, str):
        return AUTO if value.strip() == AUTO else write(read(value))
    if isinstance(value, Tuning):
        return PassTuning(FIRST, value).text
    if isinstance(value, Mapping):
        try:
            return PassTuning(FIRST, Tuning.from_dict(value)).text
        except TuningError as error:
            raise _refuse(value, str(error)) from error
    if isinstance(value, (list, tuple)):
        return write(plan for entry in value for plan in read(canonical(entry)))
    raise _refuse(value, "it is none")


def _refuse(value: Any, why: str) -> SettingError:
    return SettingError(
        f"tuning must be {AUTO!r} or a tuning, as text or as a dictionary, got {str(value)[:LONGEST]!r}: {why}"
    )


def matching(plans: Iterable[PassTuning], of: str, size: tuple[int, int]) -> list[Tuning]:
    """Return the tunings for a pass at a size, its own first.

    A tuning of the first pass was measured over the whole diffusion, so it does for the others, too. `size` is the
    (height, width) of the latent.
    """
    listed = list(plans)
    return [
        plan.tuning
        for kind in dict.fromkeys((of, FIRST))
        for plan in listed
        if (plan.of, plan.tuning.size) == (kind, size)
    ]
