"""tune: the fastest settings of each block within a tolerance, on the user's model; and how other commands use them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..app.kept_tunings import PresetPoint
from ..app.tuning_chart import chart, standalone
from ..checks import SettingError
from ..config import AgentConfig
from ..settings import check, to_config
from ..settings.presets import PRESETS
from ..tuning.record import RecordedCall, record_calls
from ..tuning.replay import compare
from ..tuning.result import Tuning, TuningError
from ..tuning.tuner import tune as tune_model
from .errors import CommandError
from .files import fresh, write_whole
from .models import EMBEDDED, Model, Request, open_model
from .options import TOLERANCE, config_of
from .runs import draw

# Name under which a picture's settings hold the text of a tuning.
TUNING = "tuning"
# Presets that are compared with the tuning; those for a hires pass or another model say nothing here.
_COMPARED = ("Fast", "Faithful")
_PROMPTS = {EMBEDDED: ("red apple", "panda")}
_OTHERS = ("a photo of a cat",)


def tune(args: argparse.Namespace) -> None:
    """Tune a model, and write the tuning and its chart."""
    model = open_model(args.model, download=args.download, config=args.config, device=args.device, dtype=args.dtype)
    prompts = args.prompt or _PROMPTS.get(args.model, _OTHERS)
    path = Path(args.out) if args.out else fresh("tuning", ".json")
    calls: list[RecordedCall] = []
    for i, prompt in enumerate(prompts):
        request = Request(prompt, args.seed + i, args.steps, args.guidance, args.negative, args.size)
        calls += recorded(model, model.complete(request), args.moments, args.quiet)
    tuning = tuned(model, calls, args.tolerance, args.methods, args.quiet)
    others = rivals(model, calls[:: len(prompts)], args.quiet)
    write_whole(path, lambda file: file.write(tuning.to_json().encode()))
    drawn = path.with_suffix(".svg")
    write_whole(drawn, lambda file: file.write(standalone(chart(tuning, others)).encode()))
    print(tuning)
    print(f"\nThe tuning: {path}\nThe chart:  {drawn}")
    print(f'Use it:     python -m agentsd generate "{prompts[0]}" --model {args.model} --tuning {path}')


def recorded(model: Model, request: Request, moments: int, quiet: bool) -> list[RecordedCall]:
    """Draw a picture without agent attention, and record calls of the U-Net meanwhile."""
    with record_calls(model.unet, moments) as calls:
        draw(model, request, None, f"recording {request.prompt}", quiet)
    return calls


def tuned(
    model: Model, calls: list[RecordedCall], tolerance: float, methods: Any = None, quiet: bool = False
) -> Tuning:
    """Tune a model under a progress bar."""
    with _progress("tuning", quiet) as progress:
        try:
            return tune_model(model.unet, calls, tolerance, methods=methods, progress=progress)
        except SettingError as error:
            raise CommandError(str(error)) from error


def rivals(model: Model, calls: list[RecordedCall], quiet: bool) -> list[PresetPoint]:
    """Measure presets on recorded calls."""
    configs = {name: to_config(check({"enabled": True, **PRESETS[name]})) for name in _COMPARED}
    with _progress("comparing presets", quiet) as progress:
        found = compare(model.unet, calls, configs, progress=progress)
    return [PresetPoint(name, one.deviation, 1 / one.time) for name, one in found.items()]


@contextmanager
def _progress(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar; yields what `agentsd.tune` calls."""
    with tqdm(desc=label, unit="call", leave=False, disable=quiet) as bar:

        def show(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        yield show


# How other commands use a tuning


def loaded(path: str, unet: nn.Module) -> Tuning:
    """Load the tuning of a file for a U-Net.

    Raises:
        CommandError: there is no such file, it is damaged, or it is for another model.
    """
    try:
        tuning = Tuning.load(path)
        tuning.config_for(unet)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except TuningError as error:
        raise CommandError(str(error)) from error
    return tuning


class Plain:
    """The settings of a command line.

    Attributes:
        values: the settings by name, for the picture's file.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.values: dict[str, Any] = args.settings

    def config(self, values: Mapping[str, Any] | None = None) -> AgentConfig:
        """Make the config of these settings, or of others."""
        return config_of(self.values if values is None else values)

    def varied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change some of the settings."""
        return {**self.values, **changes}


class Tuned(Plain):
    """A tuning instead: its settings are its text, and "tolerance" among them chooses from its frontier."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        super().__init__(args)
        self.tuning, self.unet = loaded(args.tuning, model.unet), model.unet
        self.values = {**args.settings, TUNING: self.tuning.text}

    def config(self, values: Mapping[str, Any] | None = None) -> AgentConfig:
        return self._at(values or {}).config_for(self.unet)

    def varied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.values, **changes, TUNING: self._at(changes).text}

    def _at(self, values: Mapping[str, Any]) -> Tuning:
        return self.tuning.at(values[TOLERANCE.name]) if TOLERANCE.name in values else self.tuning


def settings_for(args: argparse.Namespace, model: Model, request: Request) -> Plain:
    """Return what a command line asks for; print what becomes of its tuning at the size of the request."""
    if not args.tuning:
        return Plain(args)
    chosen = Tuned(args, model)
    height, width = request.size
    advice = chosen.tuning.advice(height // model.factor, width // model.factor)
    if advice:
        print(advice)
    return chosen
