"""Tunings of checkpoints: made on the calls of a pass, kept, and found again for a pass like it."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.grid import Grid
from ..config import AgentConfig
from ..methods import selectable
from ..patching.call import KVContext
from ..settings import tunings
from ..settings.presets import PRESETS
from ..settings.schema import DEFAULTS, to_config
from ..tuning.record import RecordedCall, progress_of, spread
from ..tuning.replay import Compared, Progress, compare, comparing_takes
from ..tuning.result import Candidate, Tuning, TuningError, reading
from ..tuning.tuner import tune
from ..words import counted, duration
from .tuning_chart import html, title

SECTION = "agent-attention-tunings"  # our section in the host's cache
_MOMENTS = 3  # timesteps at which the presets are tried, for the chart


@dataclass(frozen=True)
class Kept:
    """A tuning as it is kept."""

    checkpoint: str  # its name
    of: str  # the pass: one of `tunings.PASSES`
    tuning: Tuning
    presets: Mapping[str, Compared] = field(default_factory=dict)  # beside it in the chart, by name
    made: float = 0.0  # when, in seconds since 1970

    @property
    def key(self) -> str:
        return _key(self.checkpoint, self.of, self.tuning.size)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {**asdict(replace(self, tuning=None)), "tuning": self.tuning.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Kept:
        """Read what `to_dict` wrote; raises TuningError if it is damaged."""
        with reading():
            presets = {name: Compared(**each) for name, each in data["presets"].items()}
            return cls(**{**data, "tuning": Tuning.from_dict(data["tuning"]), "presets": presets})


def _key(checkpoint: str, of: str, size: tuple[int, int]) -> str:
    return f"{checkpoint}|{of}|{size[1]}x{size[0]}"


class Store:
    """Tunings in a host's cache, of which `open_section` opens a section. What is damaged there counts as absent."""

    def __init__(self, open_section: Callable[[str], MutableMapping[str, Any]]) -> None:
        self._cache = partial(open_section, SECTION)

    def put(self, kept: Kept) -> None:
        self._cache()[kept.key] = kept.to_dict()

    def find(self, checkpoint: str, of: str, size: tuple[int, int]) -> Kept | None:
        """Return the tuning of a checkpoint for a pass at a size, or else of its first pass at that size."""
        return self._read(_key(checkpoint, of, size)) or self._read(_key(checkpoint, tunings.FIRST, size))

    def of_checkpoint(self, checkpoint: str) -> list[Kept]:
        """List a checkpoint's tunings, the newest first."""
        return sorted(filter(None, map(self._read, self.keys(checkpoint))), key=lambda kept: -kept.made)

    def keys(self, checkpoint: str) -> list[str]:
        """List the keys of a checkpoint's tunings, those that can't be read any more included."""
        # a copy: a generation may keep one meanwhile
        return [key for key in list(self._cache()) if str(key).startswith(f"{checkpoint}|")]

    def forget(self, key: str) -> None:
        self._cache().pop(key, None)

    def _read(self, key: str) -> Kept | None:
        try:
            return Kept.from_dict(self._cache()[key])
        except (KeyError, TuningError):
            return None


class PanelTunings:
    """The tunings of a program's checkpoint, as the panel shows them; `refusal` says why it can't make any.

    The `program` is a `Program` with `tunings`, a `Store`.
    """

    def __init__(self, program: Any, refusal: str = "") -> None:
        self._program, self.refusal = program, refusal

    def _kept(self) -> dict[str, Kept]:
        checkpoint = self._program.checkpoint()
        return {title(kept): kept for kept in self._program.tunings.of_checkpoint(checkpoint)} if checkpoint else {}

    def titles(self) -> list[str]:
        """List them by what they are for, such as "First pass, 512×512", the newest first."""
        return list(self._kept())

    def results(self) -> str:
        """Show them as HTML; empty if no model is loaded."""
        return html(list(self._kept().values())) if self._program.checkpoint() else ""

    def forget(self, which: str = "") -> str:
        """Forget one of them, or all of the checkpoint, and say so."""
        store, checkpoint, kept = self._program.tunings, self._program.checkpoint(), self._kept()
        if which and which not in kept:
            return "There is no such tuning any more."
        gone = [kept[which].key] if which else store.keys(checkpoint) if checkpoint else []
        for key in gone:
            store.forget(key)
        return f"{counted(len(gone), 'tunings')} of {checkpoint or 'no checkpoint'} forgotten."

    def export(self, which: str) -> str | None:
        """Write one by `Tuning.save` to a file such as "6ce0161689-first-512x512.tuning.json"; None if it is gone."""
        kept = self._kept().get(which)
        if kept is None:
            return None
        height, width = Grid(*kept.tuning.size).pixels
        name = self._program.checkpoint("shorthash") or re.sub(r"\W+", "-", kept.checkpoint)
        path = Path(tempfile.mkdtemp()) / f"{name}-{kept.of}-{width}x{height}.tuning.json"
        kept.tuning.save(path)
        return str(path)

    def load(self, path: str) -> str:
        """Keep the tuning of a file for the checkpoint, and say so, or why not."""
        unet, checkpoint = self._program.unet(), self._program.checkpoint()
        if unet is None:
            return "No model is loaded yet."
        try:
            tuning = Tuning.load(path)
            tuning.config_for(unet)
        except (TuningError, OSError) as error:
            return f"Not imported: {error}."
        of = tuning.conditions.get("pass", tunings.FIRST)
        kept = Kept(checkpoint, of if of in tunings.PASSES else tunings.FIRST, tuning, made=time.time())
        self._program.tunings.put(kept)
        return f"Imported for {checkpoint}: {title(kept)}."


def make(
    unet: nn.Module,
    calls: Sequence[RecordedCall],
    tolerance: float,
    *,
    checkpoint: str,
    of: str,
    methods: Iterable[str | Candidate] | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
    kv_context: KVContext | None = None,
    conditions: Mapping[str, str] | None = None,
) -> Kept:
    """Tune a U-Net on the calls of the pass `of` of a checkpoint, and measure the presets beside the result.

    All is as in `agentsd.tune`, but texts of `progress` end with the time left. `precision` is the `attn_precision` of
    what is tried, unless `methods` names it.
    """
    by_moment = {progress_of(call): call for call in calls}
    moments, configs = [by_moment[at] for at in spread(by_moment, _MOMENTS)], _preset_configs(of, precision)
    takes, begun, tuned = comparing_takes(moments, configs), time.monotonic(), 0

    def tell(done: int, total: int, text: str) -> Any:
        left = f", {duration((time.monotonic() - begun) * (total - done) / done)} left" if done else ""
        return None if progress is None else progress(done, total, f"{text}{left}")

    def tuning_done(done: int, total: int, text: str) -> Any:
        nonlocal tuned
        tuned = total
        return tell(done, total + takes, text)

    def presets_done(done: int, total: int, text: str) -> Any:
        return tell(tuned + done, tuned + takes, "Trying the presets")

    common, told = {"attn_precision": precision} if precision else {}, {"pass": of, **(conditions or {})}
    methods = methods or [{"method": each.name, **more, **common} for each in selectable() for more in each.candidates]
    tuning = tune(unet, calls, tolerance, methods=methods, progress=tuning_done, kv_context=kv_context, conditions=told)
    presets = compare(unet, moments, configs, progress=presets_done, kv_context=kv_context)
    return Kept(checkpoint, of, tuning, presets, time.time())


def _preset_configs(of: str, precision: str | None) -> dict[str, AgentConfig]:
    """Make the config of each preset in a pass; those that leave it alone, or equal an earlier one, have none."""
    found: dict[AgentConfig, str] = {}
    for name, preset in PRESETS.items():
        config = to_config({**DEFAULTS, **preset, "enabled": True}, hires=of == tunings.HIRES)
        if config is not None:
            found.setdefault(replace(config, attn_precision=precision), name)
    return {name: config for config, name in found.items()}
