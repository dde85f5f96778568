"""The setting `tuning`: the tunings kept for the checkpoint, or plans as text, each with the pass that it is for.

first tuning 1 64x64 0.02 1f00… | method=corrected … & hires tuning 1 128x128 0.02 1f00… | …
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..checks import SettingError
from ..tuning.result import Tuning, TuningError

AUTO = "auto"
# Passes that tunings are kept for
FIRST, HIRES, IMG2IMG = PASSES = "first", "hires", "img2img"
_AND = " & "
LONGEST = 60  # characters of a value to repeat in an error message


class PassTuning(NamedTuple):
    """A tuning, and the pass that it is for: one of `PASSES`."""

    of: str
    tuning: Tuning


def write(plans: Iterable[tuple[str, Tuning]]) -> str:
    """Write plans as text, without repetition. It has no comma, colon, semicolon, quote or line break."""
    return _AND.join(dict.fromkeys(f"{of} {tuning.text}" for of, tuning in plans))


def read(text: str) -> tuple[PassTuning, ...]:
    """Read plans from text; blank text and AUTO have none. Raises SettingError for text that is damaged."""
    found = []
    for part in () if text.strip() in ("", AUTO) else text.split(_AND.strip()):
        first, _, rest = part.strip().removeprefix("plan:").strip().partition(" ")
        of, plan = (first, rest) if first in PASSES else (FIRST, part)
        with _refusing(part):
            found.append(PassTuning(of, Tuning.from_text(plan)))
    return tuple(found)


def canonical(value: Any) -> str:
    """Return the text of what the API may send: text, a tuning as a dictionary or an object, or a list of these.

    Raises SettingError for anything else.
    """
    if isinstance(value, str):
        return AUTO if value.strip() == AUTO else write(read(value))
    if isinstance(value, (list, tuple)):
        return write(plan for entry in value for plan in read(canonical(entry)))
    with _refusing(value):
        if not isinstance(value, (Tuning, Mapping)):
            raise TuningError("it is none")
        return write([(FIRST, value if isinstance(value, Tuning) else Tuning.from_dict(value))])


@contextmanager
def _refusing(value: Any) -> Iterator[None]:
    try:
        yield
    except TuningError as error:
        allowed, given = f"{AUTO!r} or a tuning, as text or as a dictionary", str(value)[:LONGEST]
        raise SettingError(f"tuning must be {allowed}, got {given!r}: {error}") from error


def matching(plans: Sequence[PassTuning], of: str, size: tuple[int, int]) -> list[Tuning]:
    """Return the tunings for a pass at a size, the (height, width) of its latent: its own first, then the first pass's.

    A tuning of the first pass was measured over the whole diffusion, so it does for the others, too.
    """
    kinds = dict.fromkeys((of, FIRST))
    return [tuning for kind in kinds for own, tuning in plans if (own, tuning.size) == (kind, size)]
