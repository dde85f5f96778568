"""Timing the loaded model's U-Net with and without the panel's settings.

Imports neither gradio nor the WebUI; the host's part is handed in.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentsd import AgentConfig, patch_unet
from agentsd.calibrate import calibrate
from agentsd.config import MAX_TIMESTEP
from agentsd.hosts import find_sites

log = logging.getLogger("agentsd.webui")

ROUNDS = 3  # pairs of forwards, without and with, after one of each to warm up
ROWS = 2  # cond and uncond
CALIBRATION_SECONDS = 3.0
PROMPT_TOKENS = 77


class Busy(RuntimeError):
    """The model is in use."""


class Cancelled(Exception):
    """The user has changed their mind."""


@dataclass(frozen=True)
class Task:
    """What to measure: a config at a size, at one moment of the diffusion.

    Attributes:
        width: of the image, in pixels.
        height: of the image, in pixels.
        hires: whether this stands for the hires pass.
        config: the settings.
        done: fraction of the diffusion done, 0–1; somewhere within the agents' range.
    """

    width: int
    height: int
    hires: bool
    config: AgentConfig
    done: float


@dataclass(frozen=True)
class Outcome:
    """What was measured for one task.

    Attributes:
        width: of the image, in pixels.
        height: of the image, in pixels.
        hires: whether this stands for the hires pass.
        before: milliseconds of a forward pass of the unpatched U-Net, two rows (median).
        after: the same of the patched one.
        peak_before: peak memory of the unpatched U-Net in bytes; None where the device does not tell.
        peak_after: the same of the patched one.
        distance: ‖patched − unpatched‖ / ‖unpatched‖ of the outputs, for noise as latent and prompt.
    """

    width: int
    height: int
    hires: bool
    before: float
    after: float
    peak_before: int | None
    peak_after: int | None
    distance: float

    def sentence(self) -> str:
        """The outcome in one line."""
        peak = ""
        if self.peak_before is not None and self.peak_after is not None:
            peak = f", peak memory {self.peak_before / 2**20:.0f} → {self.peak_after / 2**20:.0f} MiB"
        return (
            f"{'hires ' if self.hires else ''}{self.width}×{self.height}: {self.before:.0f} → {self.after:.0f} ms a "
            f"U-Net call ({self.before / self.after:.2f}x){peak}, outputs differ by {self.distance:.1%}"
        )


def tasks(values: Mapping[str, Any], passes: Sequence[Mapping[str, Any]], to_config: Callable[..., Any]) -> list[Task]:
    """A task for each pass in which agents act.

    Args:
        values: every setting, canonical.
        passes: "width", "height", "hires" and "start" (the fraction of the diffusion done when it begins) of each.
        to_config: gives the config of a pass from `values` and `hires`; None where the pass is left alone.
    """
    found = []
    for one in passes:
        hires, start = bool(one["hires"]), float(one["start"])
        low, high = max(start, values["since"]), values["hires_until" if hires else "until"]
        config = to_config({**values, "enabled": True}, hires=hires)
        if config is not None and low < high:
            found.append(Task(int(one["width"]), int(one["height"]), hires, config, (low + high) / 2))
    return found


def inputs(unet: nn.Module, task: Task) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Noise that an LDM, sgm or Forge U-Net takes: (latent, timestep) and context, and y where it wants one."""
    generator = torch.Generator().manual_seed(0)
    weight = next(p for p in unet.parameters() if p.is_floating_point())
    dtype = getattr(unet, "computation_dtype", None) or weight.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, dtype)

    channels = next(m for m in unet.modules() if isinstance(m, nn.Conv2d)).in_channels
    width = find_sites(unet)[0].block.attn2.to_k.in_features
    t = torch.full((ROWS,), (1 - task.done) * (MAX_TIMESTEP - 1), device=weight.device)
    more = {"context": noise(ROWS, PROMPT_TOKENS, width)}
    labels = getattr(unet, "label_emb", None)
    if labels is not None:
        more["y"] = noise(ROWS, next(m for m in labels.modules() if isinstance(m, nn.Linear)).in_features)
    return (noise(ROWS, channels, task.height // 8, task.width // 8), t), more


def measure(unet: nn.Module, task: Task, tick: Callable[[], None], kv_context: Any = None) -> Outcome:
    """Time the U-Net with and without the patch, taking turns, and compare its outputs.

    Args:
        unet: the U-Net, not patched.
        task: what to measure.
        tick: called after every forward; may raise to stop.
        kv_context: as in `agentsd.patch_unet`.
    """
    args, more = inputs(unet, task)
    times: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, int | None] = {}
    outputs: dict[bool, Tensor] = {}
    for round_ in range(ROUNDS + 1):
        for patched in (False, True):
            with _patched(unet, task.config, kv_context) if patched else nullcontext():
                seconds, peaks[patched], outputs[patched] = _timed(lambda: unet(*args, **more), args[0].device)
            if round_:
                times[patched].append(seconds)
            tick()
    distance = (outputs[True].float() - outputs[False].float()).norm() / outputs[False].float().norm()
    before, after = (1000 * statistics.median(times[patched]) for patched in (False, True))
    return Outcome(
        task.width, task.height, task.hires, before, after, peaks[False], peaks[True], round(float(distance), 6)
    )


class _patched:
    """A `with` block during which a U-Net is patched."""

    def __init__(self, unet: nn.Module, config: AgentConfig, kv_context: Any) -> None:
        self.patch = patch_unet(unet, config, kv_context)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        self.patch.remove()


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, int | None, Tensor]:
    """(seconds, peak bytes or None, output) of one call on `device`."""
    module = getattr(torch, device.type, None)
    wait = getattr(module, "synchronize", lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait()
    begin = time.perf_counter()
    output = call()
    wait()
    seconds = time.perf_counter() - begin
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None, output


_IDLE: dict[str, Any] = {"state": "idle", "progress": 0.0, "text": "", "outcomes": [], "min_tokens": None}


class Job:
    """The one measurement that may be under way, in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel = threading.Event()
        self._state: dict[str, Any] = {**_IDLE, "outcomes": []}

    def start(self, todo: list[Task], model: Callable[[], AbstractContextManager[tuple[nn.Module, Any]]]) -> str:
        """Begin; returns why not, or "".

        Args:
            todo: what to measure, in turn.
            model: makes a `with` block that holds the model: (U-Net, kv_context). Raises Busy where it is in use.
        """
        if not todo:
            return "Nothing to measure: with these settings no pass is changed."
        with self._lock:
            if self._state["state"] == "running":
                return "A measurement is running."
            self._cancel.clear()
            self._state = {**_IDLE, "state": "running", "outcomes": []}
        threading.Thread(target=self._run, args=(todo, model), daemon=True, name="agent attention measure").start()
        return ""

    def cancel(self) -> None:
        """Stop after the forward that is under way."""
        self._cancel.set()

    def as_dict(self) -> dict[str, Any]:
        """State ("idle", "running", "done", "cancelled", "busy" or "failed"), progress 0–1, text, outcomes, min_tokens.

        "min_tokens" is the proposed threshold, None before there is one.
        """
        return dict(self._state)

    def _run(self, todo: list[Task], model: Callable[[], AbstractContextManager]) -> None:
        try:
            with model() as (unet, kv_context):
                self._measure(todo, unet, kv_context)
        except Cancelled:
            self._state.update(state="cancelled", text="Cancelled.")
        except Busy as error:
            self._state.update(state="busy", text=str(error))
        except Exception as error:  # told in the panel; the host has no part in it
            log.debug("measuring failed", exc_info=True)
            self._state.update(state="failed", text=f"Measuring failed: {type(error).__name__}: {error}")

    def _measure(self, todo: list[Task], unet: nn.Module, kv_context: Any) -> None:
        ticks = self._ticks(len(todo) * 2 * (ROUNDS + 1))
        for task in todo:
            outcome = measure(unet, task, lambda: next(ticks), kv_context)
            log.info("measured %s", outcome.sentence())
            self._state["outcomes"].append(asdict(outcome))
        found = calibrate(unet, config=todo[0].config, batch=ROWS, seconds=CALIBRATION_SECONDS).min_tokens
        log.info("on this machine layers of %d tokens and more are faster with these settings", found)
        text = f"Layers of {found} tokens and more are faster with these settings on this machine."
        self._state.update(state="done", progress=1.0, min_tokens=found, text=text)

    def _ticks(self, total: int) -> Iterator[None]:
        for i in range(total):
            if self._cancel.is_set():
                raise Cancelled
            self._state["progress"] = (i + 1) / total
            yield


JOB = Job()
