"""The lifetime of a patch: installed for one sampling pass, and removed however the pass ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..app import token_map as tokenmap
from ..app.decision import Decision, SamplingPass, decide, is_left_out
from ..app.kept_tunings import PanelTunings, make
from ..app.last_run import STATUS, PassReport
from ..app.timings import StepClock, case_of, changed
from ..apply import patch_unet
from ..checks import SettingError
from ..hosts.base import weight_of
from ..patching.patch import Patch
from ..settings import infotext, schema, tunings
from ..tuning.record import record_calls
from ..tuning.result import Tuning, TuningCancelled, headline
from ..words import error_of_ours
from . import compat
from .settings_page import CLOSENESS
from .xyz import XYZ

log = logging.getLogger("agentsd.panel")

NO_END = "this WebUI does not tell where a pass ends"
NO_PASS = "the host announced no sampling pass"
NOT_CHOSEN = "Passes leaves out what was sampled"
NO_UNET = "the model has no U-Net with self-attention that can be patched"
REPLACED = "another extension replaces transformer blocks; its own attention is left to it"
# Attributes of the host's processing object: the `Generation`, and why its settings are invalid
_GENERATION, _ERROR = "_agent_attention", "_agent_attention_error"


@dataclass
class Generation:
    """One patched generation, or one to tune on."""

    values: Mapping[str, Any]
    run: int  # its number among the runs
    recording: tokenmap.Recording | None = None  # for its token map
    reports: list[PassReport] = field(default_factory=list)  # of its passes
    batch: int = 0  # the number of them that are of earlier batches, whose images have their infotext
    found: list[tuple[str, Tuning]] = field(default_factory=list)  # the tunings that it has made, if it tunes
    announced: bool = False  # whether the host has announced a pass

    @property
    def tunes(self) -> bool:
        """Whether it is made without us, to tune on it."""
        return self.values["tune"] > 0

    def entries(self, current: PassReport | None = None) -> dict[str, str]:
        """Make the infotext entries of the batch's images: none unless a pass of them was patched."""
        reports = self.reports[self.batch :]
        if current is not None:
            return self.foreseen(report.made for report in reports if report is current or report.patched)
        if not any(report.patched for report in reports):
            return {}
        result = self.foreseen(report.made for report in reports if report.patched or report.obstacle)
        left_alone = _distinct(report.obstacle for report in reports)
        return {**result, infotext.NOTE: infotext.note(left_alone)} if left_alone else result

    def foreseen(self, decisions: Iterable[Decision | None]) -> dict[str, str]:
        """Make a batch's entries: the settings, the tunings used in place of "auto", and the passes patched."""
        decisions = [made for made in decisions if made is not None]
        patched = [made for made in decisions if made.patches]
        if not patched:
            return {}
        used = [(made.sampling.of, made.tuning) for made in patched if made.tuning is not None]
        values = {**self.values, "tuning": tunings.write(used)}
        # a pass that is left alone because it was measured to be slower here would be patched elsewhere
        slower = any(made.timing and not made.patches for made in decisions)
        if slower and len({made.sampling.hires for made in patched}) == 1:
            values["passes"] = schema.HIRES if patched[0].sampling.hires else schema.FIRST
        return infotext.entries(values)

    def answer(self) -> dict[str, str]:
        """Make what an API request is told and no image is: what was tuned, or why nothing was patched."""
        if self.tunes:
            refusals = _distinct(report.tuned for report in self.reports if report.refused)
            note = infotext.note(["the image was made without Agent Attention and tuned on", *refusals])
            return {infotext.NOTE: note, **({infotext.TUNED: tunings.write(self.found)} if self.found else {})}
        reasons = _distinct(reason for report in self.reports for reason in (report.obstacle, *report.notes))
        unpatched = not any(report.patched for report in self.reports)
        return {infotext.NOTE: infotext.note(reasons)} if reasons and unpatched else {}


def _distinct(reasons: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, reasons)))


# The script's callbacks, in calling order


def before_process(p: Any) -> None:
    """Undo what an earlier generation left behind, and drop what an X/Y/Z cell shares with the one before."""
    # of other threads: the host makes one image at a time
    for leftover in [running for running in _running if running.thread != threading.get_ident()]:
        leftover.close()
    setattr(p, _GENERATION, None)
    setattr(p, _ERROR, "")
    _write_infotext(p, {})


def process(p: Any, args: Sequence[Any]) -> None:
    """Read the settings. With an invalid value, generate unpatched and say why."""
    try:
        values = schema.from_args(args, getattr(p, XYZ, None))
    except SettingError as error:
        by_name = bool(args) and isinstance(args[0], Mapping)  # an API call, which knows no labels
        message = str(error) if by_name else schema.labelled(str(error))
        STATUS.begin(False, message, compat.HOST.task())
        setattr(p, _ERROR, message)
        p.comment(f"Agent Attention was not applied: {message}")
        return
    STATUS.begin(values["enabled"], task=compat.HOST.task())
    if any(report.tuned for report in STATUS.passes):
        values = {**values, "tune": 0.0}  # a plot or another script makes many images from one order
    if values["enabled"]:
        generation = Generation(values, STATUS.run, tokenmap.Recording() if schema.wants_record(args) else None)
        STATUS.recording = generation.recording
        setattr(p, _GENERATION, generation)


def before_batch(p: Any) -> None:
    """Write what is foreseen into the infotext: the host keeps that of its last generation before it samples."""
    generation = generation_of(p)
    if generation is None or generation.tunes:
        return
    generation.batch = len(generation.reports)
    try:
        kinds = (False, True) if getattr(p, "enable_hr", False) else (False,)
        decisions = [_decide(p, generation, compat.HOST.sampling(p, hires)) for hires in kinds]
        _write_infotext(p, generation.foreseen(decisions))
    except Exception as error:  # a bug of ours must never cost the user an image
        STATUS.say(error_of_ours(error))
        return
    for made in decisions if not generation.reports else ():
        if made.refused and not made.reason.remedy:  # a setting is wrong
            p.comment(f"Agent Attention was not applied: {schema.labelled(made.reason.text)}")


def after_batch(p: Any) -> None:
    """Correct the infotext of images whose passes were not made as foreseen."""
    generation = generation_of(p)
    if generation is not None:
        _write_infotext(p, generation.entries())


def before_sampling(p: Any, latent: Tensor | None = None) -> None:
    """Sample the next pass under the patch; `latent` is its (B, C, height, width), if the host provides it."""
    hires = compat.HOST.is_hires(p)
    size = None if latent is None else (latent.shape[-2], latent.shape[-1])
    if generation_of(p) is not None or _running:
        wrap_sampling(p.sampler, lambda: around_pass(p, hires, size))
    else:
        _begin_without(p, hires, size)


def before_model_call() -> None:
    """Follow a refiner that has taken over since the last step."""
    if _running:
        _running[-1].next_call(compat.HOST.unet())
    elif _without is not None:
        _without[0].lap()


def postprocess(p: Any, processed: Any) -> None:
    """Keep the image over which the token map is drawn; answer an API request, which has no panel."""
    generation, error = generation_of(p), getattr(p, _ERROR, "")
    answer = {infotext.NOTE: infotext.note([error])} if error else generation.answer() if generation else {}
    if answer:  # in a dictionary of its own: that of `p` is written into images
        processed.extra_generation_params = {**p.extra_generation_params, **answer}
    if generation is not None and generation.recording is not None:
        generation.recording.image = compat.HOST.first_image(p, processed)
        STATUS.recording = generation.recording
    finish(p)


def finish(p: Any) -> None:
    """Say why if the images were made without any pass of ours."""
    _end_without()
    generation = generation_of(p)
    if generation is None or generation.reports or generation.run != STATUS.run or STATUS.errors:
        return
    no_pass = NO_UNET if compat.HOST.unet() is None else NO_PASS
    STATUS.fail(NOT_CHOSEN if generation.announced else no_pass)


def generation_of(p: Any) -> Generation | None:
    """Return the generation that `p` is making; None if it is made without us."""
    return getattr(p, _GENERATION, None)


def token_map(task: str, call: int, layer: int, *place: Any) -> tokenmap.View:
    """Show the token map of the last run to the page whose last request was `task`; see `tokenmap.view`."""
    return tokenmap.view(STATUS.recording, call, layer, STATUS.text(), task != STATUS.task, *place)


def _decide(p: Any, generation: Generation, sampling: SamplingPass) -> Decision:
    return decide(generation.values, sampling, compat.HOST.rows(p), compat.HOST.program(p))


def _write_infotext(p: Any, entries: Mapping[str, str]) -> None:
    for key in infotext.ENTRIES:
        p.extra_generation_params.pop(key, None)
    p.extra_generation_params.update(entries)


# One pass


def wrap_sampling(sampler: Any, around: Callable[[], AbstractContextManager]) -> None:
    """Run the sampler's next launch inside `around()`, and restore the sampler afterwards."""
    own = vars(sampler)
    unwrap = getattr(own.get("launch_sampling"), "unwrap", None)
    if unwrap is not None:  # Forge announces a hires pass twice
        unwrap()
    before, launch = own.get("launch_sampling"), sampler.launch_sampling

    def launch_sampling(*args: Any, **kwargs: Any) -> Any:
        try:
            with around():
                return launch(*args, **kwargs)
        finally:
            restore()

    def restore() -> None:
        if own.get("launch_sampling") is not launch_sampling:
            return  # another extension has wrapped our wrapper: removing ours would remove both
        if before is None:
            del sampler.launch_sampling
        else:
            sampler.launch_sampling = before

    launch_sampling.unwrap = restore  # type: ignore[attr-defined]
    sampler.launch_sampling = launch_sampling


@contextmanager
def around_pass(p: Any, hires: bool, size: tuple[int, int] | None = None) -> Iterator[Pass]:
    """Sample a pass, patched or not, and unpatch however it ends; `size` is the latent's (height, width), if known."""
    current = Pass(p, hires, size)
    generation, report = current.generation, current.report
    for outer in _running:
        outer.suspend()  # enclosing passes lose their patch until their next step
    _running.append(current)
    try:
        current.follow(compat.HOST.unet())
        tunes = generation is not None and generation.tunes
        with _tuned_on(p, generation, current.sampling, report) if tunes else nullcontext():
            if generation is not None and not tunes:
                # some hosts make an interrupted image's infotext before the pass ends
                _write_infotext(p, generation.entries(report))
            yield current
    finally:
        current.close()
        if generation is not None:
            STATUS.add(report)
            _write_infotext(p, generation.entries())


class Pass:
    """One sampling pass, and the patch during it.

    Without a `generation` the model is left alone: an unpatched image may be made in the middle of a patched one, the
    settings leave the pass out, or the first of several images was tuned on already.
    """

    def __init__(self, p: Any, hires: bool, size: tuple[int, int] | None = None) -> None:
        self.p, self.hires, self.generation = p, hires, generation_of(p)
        self.report = PassReport()
        self.thread = threading.get_ident()
        self._clock = StepClock(compat.HOST.now)
        self._observer: Any = None
        self._patch: Patch | None = None
        self._made: Decision | None = None
        self._model: tuple[nn.Module | None, str] = None, ""
        self._models: set[int] = set()
        generation, later = self.generation, getattr(p, "iteration", 0)
        if generation is None:
            return
        generation.announced = True
        if is_left_out(generation.values, hires) or (generation.tunes and later):
            self.generation = None
            return
        try:
            self.sampling = compat.HOST.sampling(p, hires, size)
            if generation.recording is not None and not (generation.tunes or later):  # the map is of the first image
                self._observer = generation.recording.observer(hires, size)
        except Exception as error:  # a bug of ours must never cost the user an image
            STATUS.fail(error_of_ours(error))
            self.generation = None
            return
        generation.reports.append(self.report)
        if generation.tunes:
            self.report.name = str(self.sampling)

    def follow(self, unet: nn.Module | None) -> None:
        """Patch `unet`, and only that. Never raises: the image is generated unpatched instead."""
        # a host may load another checkpoint into the same U-Net
        model = unet, "" if unet is None else compat.HOST.checkpoint()
        if self.generation is None or self.generation.tunes or (model == self._model and unet is not None):
            return
        self.suspend()
        self._model = model
        with self._guarded():
            if unet is not None:
                self._patch = self._patched(unet, self.generation)
            elif not self._models:
                self.report.notes[NO_UNET] = 0

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Note an error of ours, such as one of the device while closeness is read: it costs nobody an image."""
        try:
            yield
        except Exception as error:
            self.report.notes[error_of_ours(error)] += 1

    def next_call(self, unet: nn.Module | None) -> None:
        """Prepare for a call of `unet`, which may be a refiner's."""
        self._lap()
        self.follow(unet)

    def close(self) -> None:
        """Remove the patch and end the pass. Further calls do nothing."""
        if self in _running:
            _running.remove(self)
            with self._guarded():
                self._lap()
                self.report.pace = self._clock.pace()
                made, (unet, _) = self._made, self._model
                # of one model, on a device that does not lag behind
                if made is not None and made.key and unet is not None and len(self._models) < 2 and _is_cpu(unet):
                    pace = self._clock.pace(skip=1)
                    compat.HOST.timings.add_calls(made.key, pace.patched, pace.untouched)
        self.suspend()

    def _patched(self, unet: nn.Module, generation: Generation) -> Patch | None:
        made = self._made = _decide(self.p, generation, self.sampling)
        if self.report.made is None or made.patches:
            self.report.made = made
        if not made.patches:
            return None
        if compat.HOST.replaced_blocks(unet):
            self.report.notes[REPLACED] = 0
        patch = patch_unet(unet, made.config, compat.HOST.kv_context())
        patch.observer = self._observer
        patch.observe_closeness = compat.HOST.option(CLOSENESS) is not False
        if made.key is not None and made.timing is None and not _is_cpu(unet):
            patch.measure(compat.HOST.clock)
        self._models.add(id(unet))
        self.report.models = len(self._models)
        return patch

    def _lap(self) -> None:
        if self._patch is not None:
            call = self._patch.last_call
            self.report.see(None if call is None else call.latent)
        self._clock.lap(0 if self._patch is None else sum(changed(layer.calls) for layer in self._patch.report()))

    def suspend(self) -> None:
        """Remove the patch until `follow` is called again."""
        patch, self._patch, self._model = self._patch, None, (None, "")
        if patch is None:
            return
        try:
            with self._guarded():
                found = patch.measured
                if found is not None:
                    compat.HOST.timings.put_layers(self._made.key, found.with_seconds, found.without_seconds)
                self.report.add(patch, None if self._made.tuning is not None else self.generation.values["since"])
        finally:
            patch.remove()


# Passes under way, nested if a script generates an image in the middle of another one
_running: list[Pass] = []


def _is_cpu(unet: nn.Module) -> bool:
    return weight_of(unet).device.type == "cpu"


# A pass to tune on


@contextmanager
def _tuned_on(p: Any, generation: Generation, sampling: SamplingPass, report: PassReport) -> Iterator[None]:
    """Record the pass that is made in a `with` block, and tune on it at its end. Never raises for its own sake."""
    unet, checkpoint = compat.HOST.unet(), compat.HOST.checkpoint()
    calls, why_not, values = [], "", generation.values
    with ExitStack() as stack:
        try:
            why_not = _untunable(p, unet, sampling)
            calls = [] if why_not else stack.enter_context(record_calls(unet))
        except Exception as error:
            why_not = error_of_ours(error)
        yield
    try:
        if why_not:
            pass
        elif compat.HOST.was_stopped():
            why_not = "the image was interrupted"
        elif (unet, checkpoint) != (compat.HOST.unet(), compat.HOST.checkpoint()):
            why_not = "another checkpoint took over: tune each without a refiner"
        elif not calls:
            why_not = "the U-Net was not called"
        else:
            cfg, host = getattr(p, "cfg_scale", None), compat.HOST
            given: dict[str, Any] = {"checkpoint": checkpoint, "of": sampling.of, "kv_context": host.kv_context()}
            given["conditions"] = {**host.program(p).conditions(), "cfg": "" if cfg is None else f"{cfg:g}"}
            given["precision"] = "fp32" if values["fp32"] or host.upcasts() else None
            with host.progress_bar() as tell:
                given["progress"] = lambda done, total, text: tell(done, total, f"Tuning Agent Attention: {text}")
                kept = make(unet, calls, values["tune"], **given)
            compat.HOST.tunings.put(kept)
            generation.found.append((sampling.of, kept.tuning))
            STATUS.tuned, report.tuned = True, "; ".join([headline(kept.tuning), *kept.tuning.notes])
    except TuningCancelled:
        why_not = "cancelled"
    except Exception as error:
        log.debug("tuning failed", exc_info=True)
        why_not = error_of_ours(error)
    if why_not:
        report.tuned = f"not tuned, {why_not}"
        p.comment(f"Agent Attention: {report.tuned}")


def _untunable(p: Any, unet: nn.Module | None, sampling: SamplingPass) -> str:
    """Say what keeps a pass from being recorded; empty if nothing does."""
    in_the_way = compat.HOST.program(p).obstacle(sampling)
    if not compat.HOST.announces_passes:
        return NO_END
    if in_the_way is not None:
        return in_the_way.text
    if unet is None:
        return "this model has no self-attention to patch"
    return "another extension replaces transformer blocks" if compat.HOST.replaced_blocks(unet) else ""


def panel_tunings() -> PanelTunings:
    """Make what the panel shows of the current checkpoint's tunings."""
    return PanelTunings(compat.HOST, "" if compat.HOST.announces_passes else NO_END)


# Seconds of a pass that is made without us, by the calls of the host alone: nothing of it is wrapped
_without: tuple[StepClock, str] | None = None


def _begin_without(p: Any, hires: bool, size: tuple[int, int] | None) -> None:
    """Time a pass, unless its seconds would not be those of full attention."""
    global _without
    _end_without()
    unet = compat.HOST.unet()
    if unet is None or not _is_cpu(unet):
        return
    sampling = compat.HOST.sampling(p, hires, size)
    if compat.HOST.program(p).obstacle(sampling) is None:
        case = case_of(unet, compat.HOST.checkpoint(), sampling.latent, compat.HOST.rows(p))
        _without = StepClock(compat.HOST.now), case


def _end_without() -> None:
    """Keep what was timed; the end of the last call is not known."""
    global _without
    if _without is not None:
        clock, case = _without
        compat.HOST.timings.add_calls((case, ""), None, clock.pace(skip=1).untouched)
    _without = None
