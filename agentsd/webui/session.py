"""The lifetime of a patch: installed for one sampling pass, and removed however the pass ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..app import token_map as tokenmap
from ..app.last_run import STATUS, PassReport
from ..app.pace import StepClock, changed
from ..apply import patch_unet
from ..checks import SettingError
from ..patching.layer import Answer
from ..patching.patch import Patch
from ..settings import infotext, schema, tunings
from ..tuning.result import TuningError
from . import compat
from .tuning import Plans, Recording, pass_of, size_of
from .xyz import XYZ

NO_PASS = "the host announced no sampling pass"
NOT_CHOSEN = "Passes leaves out what was sampled"
NO_UNET = "the model has no U-Net with self-attention that can be patched"
# Attribute of the host's processing object that holds the `Generation`
_GENERATION = "_agent_attention"
# Attribute of that object that holds why its settings are invalid
_ERROR = "_agent_attention_error"


@dataclass
class Generation:
    """One patched generation, or one to tune on.

    Attributes:
        values: its settings.
        run: its number among the runs.
        recording: the recording for its token map.
        reports: reports of its passes.
        plans: the tunings that its passes use; or those that it has made, if it tunes.
    """

    values: Mapping[str, Any]
    run: int
    recording: tokenmap.Recording | None = None
    reports: list[PassReport] = field(default_factory=list)
    plans: list[tunings.PassTuning] = field(default_factory=list)
    announced: bool = False

    @property
    def tunes(self) -> bool:
        """Whether it is made without us, to tune on it."""
        return self.values["tune"] > 0

    @property
    def patched(self) -> bool:
        return any(report.patched for report in self.reports)

    def entries(self) -> dict[str, str]:
        """Make the infotext entries: none unless a pass was patched; then the settings, and why others were not.

        In the place of the wish for what is kept here they hold the plans that were used.
        """
        if not self.patched:
            return {}
        result = {infotext.KEY: infotext.write({**self.values, "tuning": tunings.write(self.plans)})}
        obstacles = dict.fromkeys(reason for report in self.reports for reason in report.obstacles)
        if obstacles:
            result[infotext.NOTE] = infotext.note(obstacles)
        return result

    def answer(self) -> dict[str, str]:
        """Make what an API request is told and no image is: what was tuned, or why nothing was patched."""
        if self.tunes:
            refusals = dict.fromkeys(report.tuned for report in self.reports if report.refused)
            told = {infotext.NOTE: infotext.note(["the image was made to tune on it", *refusals])}
            return {**told, infotext.TUNED: tunings.write(self.plans)} if self.plans else told
        reasons = dict.fromkeys(reason for report in self.reports for reason in (*report.obstacles, *report.notes))
        return {infotext.NOTE: infotext.note(reasons)} if reasons and not self.patched else {}


# The script's callbacks, in calling order


def before_process(p: Any) -> None:
    """Undo what an earlier generation left behind, and drop what an X/Y/Z cell shares with the one before."""
    close_leftovers()
    setattr(p, _GENERATION, None)
    setattr(p, _ERROR, "")
    _write_infotext(p, {})


def process(p: Any, args: Sequence[Any]) -> None:
    """Read the settings. With an invalid value, generate unpatched and say why."""
    try:
        values = schema.from_args(args, getattr(p, XYZ, None))
        for hires in (False, True):
            schema.to_config(values, hires=hires)
    except SettingError as error:
        by_name = bool(args) and isinstance(args[0], Mapping)  # an API call, which knows no labels
        message = str(error) if by_name else schema.labelled(str(error))
        STATUS.begin(False, message, compat.HOST.task())
        setattr(p, _ERROR, message)
        p.comment(f"Agent Attention was not applied: {message}")
        return
    STATUS.begin(values["enabled"], task=compat.HOST.task())
    if STATUS.order_done:
        values = {**values, "tune": 0.0}  # a plot or another script makes many images from one order
    if values["enabled"]:
        generation = Generation(values, STATUS.run, tokenmap.Recording() if schema.wants_record(args) else None)
        STATUS.recording = generation.recording
        setattr(p, _GENERATION, generation)


def before_sampling(p: Any, latent: Tensor | None = None) -> None:
    """Sample the next pass under the patch; `latent` is its (B, C, height, width), if the host provides it."""
    hires = compat.HOST.is_hires(p)
    if wants_pass(p, hires) or _running:
        size = None if latent is None else tuple(latent.shape[-2:])
        wrap_sampling(p.sampler, lambda: around_pass(p, hires, size))


def before_model_call() -> None:
    """Follow a refiner that has taken over since the last step."""
    if _running:
        _running[-1].next_call(compat.HOST.current_unet())


def postprocess(p: Any, processed: Any) -> None:
    """Keep the image over which the token map is drawn; answer an API request, which has no panel."""
    generation, answer = generation_of(p), _answer(p)
    if answer:  # in a dictionary of its own: that of `p` is written into images
        processed.extra_generation_params = {**p.extra_generation_params, **answer}
    if generation is not None and generation.recording is not None:
        generation.recording.image = compat.HOST.first_image(p, processed)
        STATUS.recording = generation.recording
    finish(p)


def finish(p: Any) -> None:
    """Say why if the images were made without any pass of ours."""
    generation = generation_of(p)
    if generation is None or generation.reports or generation.run != STATUS.run or STATUS.error:
        return
    if generation.announced:
        STATUS.fail(NOT_CHOSEN)
    else:
        STATUS.fail(NO_UNET if compat.HOST.current_unet() is None else NO_PASS)


def _answer(p: Any) -> dict[str, str]:
    error, generation = getattr(p, _ERROR, ""), generation_of(p)
    if error:
        return {infotext.NOTE: infotext.note([error])}
    return {} if generation is None else generation.answer()


def generation_of(p: Any) -> Generation | None:
    """Return the generation that `p` is making; None if it is made without us."""
    return getattr(p, _GENERATION, None)


def token_map(task: str, call: int, layer: int) -> tokenmap.View:
    """Show the token map of the last run to the page whose last request was `task`; see `tokenmap.view`."""
    return tokenmap.view(STATUS.recording, call, layer, STATUS.text(), foreign=task != STATUS.task)


def wants_pass(p: Any, hires: bool) -> bool:
    """Whether the pass of `p` that the host has announced is to be patched."""
    generation = generation_of(p)
    if generation is None:
        return False
    generation.announced = True
    return schema.to_config(generation.values, hires=hires) is not None


def _observer(
    p: Any, recording: tokenmap.Recording | None, hires: bool, size: tuple[int, int] | None
) -> Callable[[Answer], None] | None:
    """Make an observer that records the next pass, if it belongs to the first image."""
    if recording is None or getattr(p, "iteration", 0):
        return None
    return recording.observer(hires, size)


def _write_infotext(p: Any, entries: Mapping[str, str]) -> None:
    for key in infotext.ENTRIES:
        p.extra_generation_params.pop(key, None)
    p.extra_generation_params.update(entries)


# One pass


def wrap_sampling(sampler: Any, around: Callable[[], AbstractContextManager]) -> None:
    """Run the sampler's next launch inside `around()`, and restore the sampler afterwards."""
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
            return  # another extension has wrapped our wrapper: removing ours would remove both
        if before is None:
            del sampler.launch_sampling
        else:
            sampler.launch_sampling = before

    launch_sampling.unwrap = restore
    sampler.launch_sampling = launch_sampling


def around_pass(p: Any, hires: bool, size: tuple[int, int] | None = None) -> AbstractContextManager[Pass]:
    """Make the context in which a pass is sampled, patched or not; `size` is the latent's (height, width), if known."""
    if wants_pass(p, hires):
        generation = generation_of(p)
        around = tuning_pass if generation.tunes else sampling_pass
        return around(p, generation, hires, size)
    # an unpatched image may be generated in the middle of a patched one
    return under_way(Pass({}, PassReport(hires, obstacles=["it is off"])))


@contextmanager
def sampling_pass(p: Any, generation: Generation, hires: bool, size: tuple[int, int] | None = None) -> Iterator[Pass]:
    """Patch the current U-Net, and any that takes over from it; unpatch both however the pass ends."""
    report = PassReport(hires, obstacles=list(compat.HOST.obstacles(p, hires)))
    of, latent = pass_of(p, hires), size or size_of(p, hires)
    plans = Plans(generation.values, of, latent, generation.plans)
    observer = _observer(p, generation.recording, hires, size)
    current = Pass(generation.values, report, observer, plans)
    generation.reports.append(report)
    try:
        with under_way(current):
            _write_infotext(p, generation.entries())  # some hosts make an interrupted image's before the pass ends
            yield current
    finally:
        STATUS.add(report)
        _write_infotext(p, generation.entries())


@contextmanager
def tuning_pass(p: Any, generation: Generation, hires: bool, size: tuple[int, int] | None = None) -> Iterator[Pass]:
    """Leave the current U-Net alone, and tune on the pass if it is of the first image."""
    report = PassReport(hires, size)
    with under_way(Pass({}, PassReport(hires, obstacles=["it is tuned"]))) as current:
        if getattr(p, "iteration", 0):
            yield current
            return
        generation.reports.append(report)
        recording = Recording(p, generation.values, pass_of(p, hires), report)
        try:
            with recording:
                yield current
        finally:
            if recording.kept is not None:
                generation.plans.append(tunings.PassTuning(recording.of, recording.kept.tuning))
                STATUS.tuned = True
            elif report.tuned:
                p.comment(f"Agent Attention: {report.tuned}")
            STATUS.add(report)
            _write_infotext(p, generation.entries())


@contextmanager
def under_way(current: Pass) -> Iterator[Pass]:
    """Make `current` the pass under way. Enclosing passes lose their patch until their next step."""
    for outer in _running:
        outer.suspend()
    _running.append(current)
    try:
        current.follow(compat.HOST.current_unet())
        yield current
    finally:
        current.close()


class Pass:
    """The patch during one sampling pass."""

    def __init__(
        self,
        values: Mapping[str, Any],
        report: PassReport,
        observer: Callable[[Answer], None] | None = None,
        plans: Plans | None = None,
    ) -> None:
        self.values, self.report, self.observer, self.plans = values, report, observer, plans
        self.thread = threading.get_ident()
        self._clock = StepClock()
        self._patch: Patch | None = None
        self._unet: nn.Module | None = None
        self._models: set[int] = set()

    def follow(self, unet: nn.Module | None) -> None:
        """Patch `unet`, and only that. Never raises: the image is generated unpatched instead."""
        if unet is None and not self._models and not self.report.obstacles:
            self.report.obstacles.append(NO_UNET)
        if self.report.obstacles or (unet is self._unet and (self.plans is None or self.plans.hold())):
            return
        self.suspend()
        self._unet = unet
        try:
            if unet is not None:
                self._patch = self._patched(unet)
        except TuningError as error:
            self.report.notes[str(error)] += 1
        except Exception as error:
            self.report.notes[f"an error of ours: {type(error).__name__}: {error}"] += 1

    def next_call(self, unet: nn.Module | None) -> None:
        """Prepare for a call of `unet`, which may be a refiner's."""
        self._lap()
        self.follow(unet)

    def close(self) -> None:
        """Remove the patch and end the pass. Further calls do nothing."""
        if self in _running:
            self._lap()
            self.report.pace = self._clock.pace()
        self.suspend()
        if self in _running:
            _running.remove(self)

    def _patched(self, unet: nn.Module) -> Patch | None:
        plan = None if self.plans is None else self.plans.config(unet, self.report)
        config = plan or compat.HOST.config(self.values, hires=self.report.hires)
        if compat.HOST.replaced_blocks(unet):
            self.report.notes["another extension replaces transformer blocks; its own attention is left to it"] += 1
        patch = patch_unet(unet, config, compat.HOST.kv_context())
        patch.observer = self.observer
        patch.observe_closeness = compat.HOST.observes_closeness()
        self._models.add(id(unet))
        self.report.models = len(self._models)
        return patch

    def _lap(self) -> None:
        self._clock.lap(0 if self._patch is None else sum(changed(layer.calls) for layer in self._patch.report()))

    def suspend(self) -> None:
        """Remove the patch until `follow` is called again."""
        patch, self._patch, self._unet = self._patch, None, None
        if patch is not None:
            try:
                tuned = self.plans is not None and self.plans.used
                self.report.add(patch, None if tuned else self.values["since"])
            except Exception as error:  # such as one of the device while closeness is read
                self.report.notes[f"an error of ours: {type(error).__name__}: {error}"] += 1
            finally:
                patch.remove()


# Passes under way, nested if a script generates an image in the middle of another one
_running: list[Pass] = []


def close_leftovers() -> None:
    """Close passes that other threads left behind: the host makes one image at a time."""
    for leftover in [running for running in _running if running.thread != threading.get_ident()]:
        leftover.close()
