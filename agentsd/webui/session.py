"""The life of a patch: on for one sampling pass, and off whatever way the pass ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import SettingError
from ..panel import tokenmap
from ..panel.pace import StepClock, changed
from ..panel.report import STATUS, PassReport
from ..patch import Answer, Patch, patch_unet
from ..settings import infotext, table
from . import compat
from .xyz import XYZ

# On the host's processing object: this generation
_GENERATION = "_agent_attention"


@dataclass
class Generation:
    """The settings of one generation that is made with us, what became of its passes, and the token map's record."""

    values: Mapping[str, Any]
    recording: tokenmap.Recording | None = None
    reports: list[PassReport] = field(default_factory=list)

    def entries(self) -> dict[str, str]:
        """What the infotext is to say: the settings, unless every pass was left to the host, and which were."""
        obstacles = dict.fromkeys(reason for report in self.reports for reason in report.obstacles)
        found = {}
        if not self.reports or any(not report.obstacles for report in self.reports):
            found[infotext.KEY] = infotext.write(self.values)
        if obstacles:
            found[infotext.NOTE] = f"not applied, {' and '.join(obstacles)}"
        return found


# The script's callbacks, in the order in which the host makes them


def before_process(p: Any) -> None:
    """Take back whatever an earlier generation left, and forget what an XYZ cell shares with the one before."""
    close_leftovers()
    setattr(p, _GENERATION, None)
    _write_infotext(p, {})


def process(p: Any, args: Sequence[Any]) -> None:
    """Read the settings and write the infotext. With a bad value the image is made unpatched, and says why."""
    try:
        values = table.from_args(args, getattr(p, XYZ, None))
        for hires in (False, True):
            table.to_config(values, hires=hires)
    except SettingError as error:
        STATUS.begin(False, str(error))
        _write_infotext(p, {infotext.NOTE: f"not applied, {error}"})
        p.comment(f"Agent Attention was not applied: {error}")
        return
    STATUS.begin(values["enabled"])
    if values["enabled"]:
        generation = Generation(values, tokenmap.Recording() if table.wants_record(args) else None)
        STATUS.recording = generation.recording
        setattr(p, _GENERATION, generation)
        _write_infotext(p, generation.entries())


def before_sampling(p: Any, latent: Tensor | None = None) -> None:
    """Sample the next pass under the patch; `latent` is its (B, C, height, width), where the host hands it over."""
    generation = getattr(p, _GENERATION, None)
    hires = bool(getattr(p, "is_hr_pass", False))
    if generation is not None and table.to_config(generation.values, hires=hires) is not None:
        observer = _observer(p, generation.recording, hires, latent)
        wrap_sampling(p.sampler, lambda: sampling_pass(p, generation, hires, observer))
    elif _running:  # an image without us, made in the middle of one with us
        wrap_sampling(p.sampler, lambda: under_way(Pass({}, PassReport(hires, obstacles=["it is off"]))))


def before_model_call() -> None:
    """Follow a refiner that has taken over since the last step."""
    if _running:
        _running[-1].next_call(compat.current_unet())


def postprocess(p: Any, processed: Any) -> None:
    """Keep the image that the token map is drawn over."""
    generation = getattr(p, _GENERATION, None)
    if generation is not None and generation.recording is not None:
        generation.recording.image = compat.first_image(p, processed)
        STATUS.recording = generation.recording


def token_map(call: int, layer: int) -> tokenmap.View:
    """The token map of the last run; see `tokenmap.view`."""
    return tokenmap.view(STATUS.recording, call, layer, STATUS.text())


def _observer(
    p: Any, recording: tokenmap.Recording | None, hires: bool, latent: Tensor | None
) -> Callable[[Answer], None] | None:
    """Records the coming pass, if it is one of the first image's."""
    if recording is None or getattr(p, "iteration", 0):
        return None
    return recording.observer(hires, None if latent is None else tuple(latent.shape[-2:]))


def _write_infotext(p: Any, entries: Mapping[str, str]) -> None:
    for key in (infotext.KEY, infotext.NOTE):
        p.extra_generation_params.pop(key, None)
    p.extra_generation_params.update(entries)


# One pass


def wrap_sampling(sampler: Any, around: Callable[[], AbstractContextManager]) -> None:
    """Make the sampler's next launch run inside `around()`; afterwards the sampler is as it was."""
    unwrap = getattr(vars(sampler).get("launch_sampling"), "unwrap", None)
    if unwrap is not None:  # Forge announces a hires pass twice
        unwrap()
    before, launch = vars(sampler).get("launch_sampling"), sampler.launch_sampling

    def launch_sampling(*args: Any, **kwargs: Any) -> Any:
        try:
            with around():
                return launch(*args, **kwargs)
        finally:
            restore()

    def restore() -> None:
        if vars(sampler).get("launch_sampling") is not launch_sampling:
            return  # somebody has wrapped us: taking ours out would take theirs out
        if before is None:
            del sampler.launch_sampling
        else:
            sampler.launch_sampling = before

    launch_sampling.unwrap = restore
    sampler.launch_sampling = launch_sampling


@contextmanager
def sampling_pass(
    p: Any, generation: Generation, hires: bool, observer: Callable[[Answer], None] | None = None
) -> Iterator[None]:
    """Patch the U-Net in use, and one that takes over from it; take both back however the pass ends."""
    current = Pass(generation.values, PassReport(hires, obstacles=list(compat.obstacles(p, hires))), observer)
    try:
        with under_way(current):
            yield
    finally:
        STATUS.add(current.report)
        generation.reports.append(current.report)
        _write_infotext(p, generation.entries())


@contextmanager
def under_way(current: Pass) -> Iterator[None]:
    """Make `current` the pass under way. Passes around it lose their patch, and get it back at their next step."""
    for outer in _running:
        outer.suspend()
    _running.append(current)
    try:
        current.follow(compat.current_unet())
        yield
    finally:
        current.close()


class Pass:
    """The patch during one sampling pass."""

    def __init__(
        self, values: Mapping[str, Any], report: PassReport, observer: Callable[[Answer], None] | None = None
    ) -> None:
        self.values, self.report, self.observer = values, report, observer
        self.thread = threading.get_ident()
        self._clock = StepClock()
        self._patch: Patch | None = None
        self._unet: nn.Module | None = None
        self._models: set[int] = set()

    def follow(self, unet: nn.Module | None) -> None:
        """Put the patch on `unet`, and only there. Never raises: the image is made without us instead."""
        if self.report.obstacles or unet is self._unet:
            return
        self.suspend()
        self._unet = unet
        try:
            if unet is not None:
                self._patch = self._patched(unet)
        except Exception as error:
            self.report.notes[f"an error of ours: {type(error).__name__}: {error}"] += 1

    def next_call(self, unet: nn.Module | None) -> None:
        """The U-Net is about to be called: `unet`, which a refiner may have put in the other's place."""
        self._lap()
        self.follow(unet)

    def close(self) -> None:
        """Take the patch back. Doing it again changes nothing."""
        if self in _running:
            self._lap()
            self.report.pace = self._clock.pace()
        self.suspend()
        if self in _running:
            _running.remove(self)

    def _patched(self, unet: nn.Module) -> Patch:
        config = compat.config_of(self.values, hires=self.report.hires)
        if compat.replaced_blocks(unet):
            self.report.notes["another extension replaces transformer blocks; its own attention is left to it"] += 1
        self._models.add(id(unet))
        patch = patch_unet(unet, config, compat.kv_context())
        patch.observer = self.observer
        return patch

    def _lap(self) -> None:
        self._clock.lap(0 if self._patch is None else sum(changed(layer.calls) for layer in self._patch.report()))

    def suspend(self) -> None:
        """Take the patch back until `follow` is called again."""
        patch, self._patch, self._unet = self._patch, None, None
        if patch is not None:
            try:
                self.report.add(patch, self.values["since"])
                self.report.models = len(self._models)
            finally:
                patch.remove()


# Passes under way: nested where a script generates an image in the middle of another one
_running: list[Pass] = []


def close_leftovers() -> None:
    """Close passes that other threads left behind: the host makes one image at a time."""
    for left in [one for one in _running if one.thread != threading.get_ident()]:
        left.close()
