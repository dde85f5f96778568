"""tune: the fastest settings of each block within a tolerance, on the user's model; and how other commands use them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
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
from .models import EMBEDDED, Model, Request, open_model
from .options import TOLERANCE
from .pictures import fresh, write_whole
from .runs import draw

# Presets that are compared with the tuning; those for a hires pass or another model say nothing here.
_COMPARED = ("Fast", "Balanced", "Faithful")
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
    configs = {name: to_config(check({"enabled": True, **PRESETS[name]})) for name in _COMPARED}
    with _progress("comparing presets", args.quiet) as progress:
        found = compare(model.unet, calls[:: len(prompts)], configs, progress=progress)
    points = [PresetPoint(name, one.deviation, 1 / one.time) for name, one in found.items()]
    drawn = path.with_suffix(".svg")
    for file, text in ((path, tuning.to_json()), (drawn, standalone(chart(tuning, points)))):
        write_whole(file, text.encode())
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


@contextmanager
def _progress(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar; yields what `agentsd.tune` calls."""
    with tqdm(desc=label, unit="call", leave=False, disable=quiet) as bar:

        def show(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        yield show


def loaded(path: str, unet: nn.Module) -> Tuning:
    """Load the tuning of a file for a U-Net; a CommandError says why it cannot be used."""
    try:
        tuning = Tuning.load(path)
        tuning.config_for(unet)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except TuningError as error:
        raise CommandError(str(error)) from error
    return tuning


def settings_for(
    args: argparse.Namespace, model: Model, request: Request
) -> Callable[..., tuple[dict[str, Any], AgentConfig]]:
    """Make a function from changes to a command line's settings to (the settings for a picture's file, the config).

    With a tuning, the settings are its text, and `tolerance` chooses from its frontier; what becomes of it at the size
    of the request is printed.
    """
    if not args.tuning:
        return lambda **changes: ({**args.settings, **changes}, to_config({**args.settings, **changes}))
    tuning = loaded(args.tuning, model.unet)
    if advice := tuning.advice(*(side // model.factor for side in request.size)):
        print(advice)

    def chosen(**changes: Any) -> tuple[dict[str, Any], AgentConfig]:
        at = tuning.at(changes[TOLERANCE.name]) if changes else tuning
        return {**args.settings, **changes, "tuning": at.text}, at.config_for(model.unet)

    return chosen
