"""Time the loaded model's U-Net with and without the panel's settings.

Imports neither gradio nor a WebUI: the caller supplies the model.
"""

from __future__ import annotations

import json
import logging
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..apply import patch_unet
from ..calibration import calibrate
from ..clock import peak_memory, timed
from ..config import AgentConfig
from ..costs import estimate
from ..hosts import example_call, output_tensor
from ..tuning.table import mebibytes
from .host import Busy
from .preview import SamplingPass, layout_of_unet, milliseconds

log = logging.getLogger("agentsd.panel")

ROUNDS = 3  # pairs of forward passes, without and with the patch, after a warm-up pair
ROWS = 2  # cond and uncond
CALIBRATION_SECONDS = 3.0
HEAD = ("Size", "Without", "With", "Speed-up", "Peak memory")


class Cancelled(Exception):
    """The user has cancelled the measurement."""


@dataclass(frozen=True)
class Task:
    """What to measure: a config in a sampling pass, at one moment of the diffusion.

    Attributes:
        sampling: the sampling pass.
        config: the settings.
        progress: fraction of the diffusion done, 0–1, within the agents' range.
    """

    sampling: SamplingPass
    config: AgentConfig
    progress: float


@dataclass(frozen=True)
class Outcome:
    """Result of one task.

    Attributes:
        sampling: the sampling pass.
        before: milliseconds per forward pass of the unpatched U-Net, batch size 2 (median).
        after: milliseconds per forward pass of the patched U-Net.
        peak_before: peak memory of the unpatched U-Net in bytes; None if the device does not report it.
        peak_after: peak memory of the patched U-Net.
    """

    sampling: SamplingPass
    before: float
    after: float
    peak_before: int | None
    peak_after: int | None

    def row(self) -> list[str]:
        """Format the outcome as a table row under `HEAD`."""
        peak = mebibytes(self.peak_before, self.peak_after) or "–"
        speed = f"{self.before / self.after:.2f}×"
        times = f"{self.before:.0f}\u00a0ms", f"{self.after:.0f}\u00a0ms"
        return [str(self.sampling), *times, speed, peak]

    def sentence(self) -> str:
        """Describe the outcome in one line."""
        size, _, _, speed, peak = self.row()
        return f"{size}: {milliseconds(self.before, self.after)} ({speed}), peak memory {peak}"


def tasks(
    values: Mapping[str, Any],
    passes: Sequence[SamplingPass],
    to_config: Callable[[Mapping[str, Any], SamplingPass], AgentConfig | None],
) -> list[Task]:
    """Make a task for each pass in which agents act.

    Args:
        values: every setting, in canonical form.
        passes: the sampling passes.
        to_config: makes the config of a pass from `values`; None if the pass is left alone.

    Raises:
        SettingError: settings contradict each other.
    """
    result = []
    for sampling in passes:
        low, high = max(sampling.start, values["since"]), values[sampling.end]
        config = to_config({**values, "enabled": True}, sampling)
        if config is not None and low < high:
            result.append(Task(sampling, config, (low + high) / 2))
    return result


def measure(unet: nn.Module, task: Task, tick: Callable[[], None], kv_context: Any = None) -> Outcome:
    """Time the U-Net with and without the patch, alternating.

    Args:
        unet: the U-Net, not patched.
        task: what to measure.
        tick: called after every forward pass; may raise to stop.
        kv_context: as in `agentsd.patch_unet`.
    """
    call = example_call(unet, *task.sampling.latent, task.progress, ROWS)
    device = call.args[0].device

    def run() -> Tensor:
        return output_tensor(unet(*call.args, **call.kwargs))

    times: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, int | None] = {}
    for round_ in range(ROUNDS + 1):
        for patched in (False, True):
            patch = patch_unet(unet, task.config, kv_context) if patched else None
            try:
                (_, seconds), peaks[patched] = peak_memory(lambda: timed(run, device), device)
            finally:
                if patch is not None:
                    patch.remove()
            if round_:
                times[patched].append(seconds)
            tick()
    before, after = (1000 * statistics.median(times[patched]) for patched in (False, True))
    return Outcome(task.sampling, before, after, peaks[False], peaks[True])


@dataclass
class State:
    """State of a measurement: "idle", "running", "done", "cancelled", "busy" or "failed"."""

    state: str = "idle"
    progress: float = 0.0
    text: str = ""
    rows: tuple[list[str], ...] = ()
    min_tokens: int | None = None
    tab: str = "txt2img"

    def to_dict(self) -> dict[str, Any]:
        text = f"Measuring: {self.progress:.0%}" if self.state == "running" else self.text
        rows = {"head": list(HEAD), "rows": list(self.rows)}
        more = {"min_tokens": self.min_tokens, "tab": self.tab}
        return {"state": self.state, "progress": self.progress, "text": text, **rows, **more}


# Settings that do not affect timings
_TIMELESS = ("enabled",)


class Job:
    """The measurement that may be running, in its own thread, and earlier outcomes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel = threading.Event()
        self._state = State()
        self._measured: WeakKeyDictionary[nn.Module, dict[str, Outcome]] = WeakKeyDictionary()

    def start(
        self,
        values: Mapping[str, Any],
        todo: list[Task],
        model: Callable[[], AbstractContextManager[tuple[nn.Module, Any]]],
        tab: str = "txt2img",
    ) -> str:
        """Start measuring; return why not, or "".

        Args:
            values: the settings that the tasks are made from.
            todo: the tasks, in order.
            model: reserves the model for a `with` block, which gets (U-Net, kv_context); raises Busy if it is in use.
            tab: the panel that shows the outcome.
        """
        if not todo:
            return "Nothing to measure: with these settings no pass is changed."
        with self._lock:
            if self._state.state == "running":
                return "A measurement is running."
            self._cancel.clear()
            self._state = State("running", tab=tab)
        args = (dict(values), todo, model)
        threading.Thread(target=self._run, args=args, daemon=True, name="agent attention measure").start()
        return ""

    def cancel(self) -> None:
        """Stop after the current forward pass."""
        self._cancel.set()

    def as_dict(self) -> dict[str, Any]:
        """Return the state, progress 0–1, text, table, tab and proposed "min_tokens" (None until known) for JSON."""
        return self._state.to_dict()

    def times(self, unet: nn.Module | None, values: Mapping[str, Any], one: SamplingPass) -> tuple[float, float] | None:
        """Return the milliseconds of a call of this U-Net in a pass, unpatched and with these settings, if measured."""
        outcome = self._measured.get(unet, {}).get(_key(values, one)) if unet is not None else None
        return None if outcome is None else (outcome.before, outcome.after)

    def _run(self, values: dict[str, Any], todo: list[Task], model: Callable[[], AbstractContextManager]) -> None:
        state = self._state
        try:
            with model() as (unet, kv_context):
                self._measure(values, todo, unet, kv_context)
        except Cancelled:
            state.text, state.state = "Cancelled.", "cancelled"
        except Busy as error:
            state.text, state.state = str(error), "busy"
        except Exception as error:  # report it in the panel; it must not reach the host
            log.debug("measuring failed", exc_info=True)
            state.text, state.state = f"Measuring failed: {type(error).__name__}: {error}", "failed"

    def _measure(self, values: dict[str, Any], todo: list[Task], unet: nn.Module, kv_context: Any) -> None:
        state, ticks = self._state, self._ticks(len(todo) * 2 * (ROUNDS + 1))
        slower = []
        for task in todo:
            outcome = measure(unet, task, lambda: next(ticks), kv_context)
            log.info("measured %s", outcome.sentence())
            state.rows = (*state.rows, outcome.row())
            self._measured.setdefault(unet, {})[_key(values, task.sampling)] = outcome
            if outcome.after >= outcome.before:
                slower.append(task)
        config = todo[0].config
        found = calibrate(unet, config=config, batch=ROWS, seconds=CALIBRATION_SECONDS, tick=self._stop_if_cancelled)
        state.min_tokens, state.text = _threshold(unet, found.min_tokens, slower)
        log.info(state.text)
        state.progress, state.state = 1.0, "done"

    def _ticks(self, total: int) -> Iterator[None]:
        for i in range(total):
            self._stop_if_cancelled()
            # the rest of the bar is the calibration's
            self._state.progress = 0.95 * (i + 1) / total
            yield

    def _stop_if_cancelled(self) -> None:
        if self._cancel.is_set():
            raise Cancelled


def _threshold(unet: nn.Module, faster: int, slower: Sequence[Task]) -> tuple[int, str]:
    """Propose `min_tokens` and say why.

    Args:
        unet: the U-Net.
        faster: the number of tokens from which on single layers were faster.
        slower: the tasks in which the whole U-Net was not faster, which count more than single layers.
    """
    largest = max((_largest(unet, task) for task in slower), default=0)
    if largest < faster:
        return faster, f"Layers of {faster} tokens and more are faster with these settings on this machine."
    sizes = " and ".join(str(task.sampling) for task in slower)
    return largest + 1, f"These settings are not faster at {sizes} on this machine: such layers are better left alone."


def _largest(unet: nn.Module, task: Task) -> int:
    """Return the tokens of the largest layer that a task changes."""
    cost = estimate(layout_of_unet(unet), task.config, *task.sampling.latent, task.progress)
    return max((level.plan.tokens for level in cost.changed), default=0)


def _key(values: Mapping[str, Any], sampling: SamplingPass) -> str:
    """Key of a measurement: the settings and the pass for which it is valid."""
    timed = {name: value for name, value in values.items() if name not in _TIMELESS}
    return json.dumps([timed, sampling.width, sampling.height, sampling.hires], sort_keys=True)


JOB = Job()
