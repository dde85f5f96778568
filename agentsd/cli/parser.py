"""The command line's parser: commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..checks import SettingError
from ..methods import METHODS
from . import commands, demo, info, tuned
from .options import ROWS, TOLERANCE, axis, config_of, option_name, reader, real, settings_of, size, whole

DTYPES = ("auto", "float32", "float16", "bfloat16")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        SystemExit: it was invalid (code 2), or only asked for help. The message has been printed.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.settings = settings_of(_chosen_settings(args))
        config_of(args.settings)  # settings can contradict each other
        _check_tuning(args)
        for axis in ("x", "y"):
            _check_axis(args, axis)
    except SettingError as error:
        args.parser.error(str(error))
    return args


def _chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(args, f"setting_{name}", None) for name in ROWS}
    return {name: value for name, value in settings.items() if value is not None}


def _check_tuning(args: argparse.Namespace) -> None:
    """Check that settings come from a tuning or from the command line, not from both."""
    axes = [given[0] for given in (getattr(args, axis, None) for axis in ("x", "y")) if given]
    if getattr(args, "tuning", None):
        others = [name for name in (*_chosen_settings(args), *axes) if name != TOLERANCE.name]
        if others:
            raise SettingError(f"a tuning has settings of its own, got {', '.join(others)} as well")
    elif TOLERANCE.name in axes:
        raise SettingError("a sweep over tolerance needs --tuning")


def _check_axis(args: argparse.Namespace, axis: str) -> None:
    """Check every cell of a sweep before the first picture is drawn."""
    name, values = getattr(args, axis, None) or ("", ())
    for value in values:
        config_of({**args.settings, name: value})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agentsd",
        description="Agent attention for Stable Diffusion: draw pictures with it, and see what it does.",
    )
    parser.add_argument("--version", action="version", version=f"agentsd {__version__}")
    subs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = _command(subs, "generate", commands.generate, "draw a picture with agent attention")
    _picture_options(sub)
    sub.add_argument("--off", action="store_true", help="draw the picture without agent attention")
    _settings(sub)

    sub = _command(subs, "compare", commands.compare, "draw a picture with and without agent attention, side by side")
    _picture_options(sub)
    _settings(sub)

    sub = _command(subs, "sweep", commands.sweep, "draw a picture over ranges of one or two settings")
    _picture_options(sub, folder=True)
    ranges = "SETTING=VALUES: values separated by commas, or FIRST:LAST:STEP; settings are named like the options below"
    sub.add_argument("--x", type=axis, required=True, metavar="SETTING=VALUES", help=f"the columns, as {ranges}")
    sub.add_argument("--y", type=axis, metavar="SETTING=VALUES", help="the rows, in the same form; may be left out")
    _settings(sub)

    sub = _command(subs, "tune", tuned.tune, "find the fastest settings of each layer within a tolerance", "")
    sub.add_argument(
        "--prompt",
        nargs="+",
        metavar="PROMPT",
        help="prompts of the pictures to tune on (default: some of the model's)",
    )
    _model_options(sub)
    tolerance = "limit on the deviation of the U-Net's output, as a fraction (default: %(default)s)"
    sub.add_argument("--tolerance", type=real("tolerance", 0.0001, 1), default=0.02, help=tolerance)
    sub.add_argument("--methods", nargs="+", choices=[*METHODS], help="methods to try (default: all)")
    sub.add_argument("--moments", type=whole("moments", 1, 100), default=6, help="timesteps to tune on (default: 6)")
    sub.add_argument("--out", metavar="FILE", help="JSON file to write (default: a new one in outputs/)")
    _quiet(sub)

    sub = _command(
        subs, "info", info.info, "show which layers of a model would be patched, and what that saves", "[MODEL] "
    )
    sub.add_argument("model", nargs="?", default="embedded", metavar="MODEL", help=_MODEL_HELP)
    sub.add_argument(
        "--size", type=size, nargs="+", metavar="SIZE", help="picture sizes in pixels, such as 512 or 768x512"
    )
    sub.add_argument("--layers", action="store_true", help="list every layer by its name")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    _tuning(sub)
    _download(sub)
    _settings(sub)

    sub = _command(subs, "demo", demo.demo, "draw a sheet of pictures with and without agent attention", "")
    sub.add_argument("--out", metavar="FOLDER", default="outputs/demo", help="where to put it (default: %(default)s)")
    sub.add_argument("--steps", type=whole("steps", 1, 1000), default=20, help="sampling steps (default: 20)")
    sub.add_argument("--prompts", type=whole("prompts", 1, 100), default=6, help="number of prompts (default: 6)")
    sub.add_argument("--seed", type=whole("seed", 0, 2**63 - 1), default=0, help="seed of the pictures (default: 0)")
    _quiet(sub)
    _settings(sub)

    sub = _command(subs, "playground", _playground, "serve a page with the WebUI's panel, to this machine only", "")
    sub.add_argument("--port", type=whole("port", 0, 65535), default=7860, help="port (default: 7860, or a free one)")
    sub.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def _playground(args: argparse.Namespace) -> None:
    from .playground import serve  # needs gradio

    serve(args.port, args.open)


_MODEL_HELP = (
    "embedded (the small bundled model; the default), a diffusers folder, a .safetensors or .ckpt file, or a "
    "hub id (owner/name, from the local cache)"
)


def _command(
    subs: Any, name: str, run: Callable[..., Any], text: str, arguments: str = "PROMPT "
) -> argparse.ArgumentParser:
    usage = f"python -m agentsd {name} {arguments}[options]"
    sub = subs.add_parser(name, help=text, usage=usage, description=f"{text[0].upper()}{text[1:]}.")
    sub.set_defaults(run=run, parser=sub, download=False)
    sub.add_argument("--debug", action="store_true", help="show where an error came from")
    return sub


def _quiet(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quiet", action="store_true", help="show no progress bars")


def _download(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--download", action="store_true", help="download what the hub's local cache lacks")


def _picture_options(sub: argparse.ArgumentParser, folder: bool = False) -> None:
    sub.add_argument("prompt", help="what to draw; the embedded model knows emoji by name, such as 'a cat'")
    _model_options(sub)
    where, what = ("FOLDER", "folder to write to") if folder else ("FILE", "PNG file to write")
    sub.add_argument("--out", metavar=where, help=f"{what} (default: a new one in outputs/)")
    _tuning(sub)
    _quiet(sub)


def _tuning(sub: argparse.ArgumentParser) -> None:
    tuning = "use the tuning that `tune` wrote, instead of settings"
    sub.add_argument("--tuning", metavar="FILE", help=tuning)


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="embedded", help=_MODEL_HELP)
    sub.add_argument(
        "--config", metavar="FOLDER", help="diffusers folder or hub id that tells how to read a single file"
    )
    _download(sub)
    sub.add_argument("--negative", default="", metavar="PROMPT", help="negative prompt")
    sub.add_argument("--seed", type=whole("seed", 0, 2**63 - 1), default=0, help="seed of the picture (default: 0)")
    sub.add_argument("--steps", type=whole("steps", 1, 1000), help="sampling steps (default: 20)")
    sub.add_argument("--guidance", type=real("guidance", 0, 100), help="scale of classifier-free guidance")
    sub.add_argument("--size", type=size, help="size of the picture in pixels, such as 512 or 768x512 (width first)")
    sub.add_argument("--device", default="auto", help="torch device (default: a GPU if there is one)")
    sub.add_argument("--dtype", default="auto", choices=DTYPES, help="default: float16 on a GPU, else float32")


def _settings(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("agent attention", "the settings of the WebUI's panel, with its defaults")
    for row in ROWS.values():
        flag, dest = f"--{option_name(row)}", f"setting_{row.name}"
        text = f"{row.tooltip} (default: {row.format(row.default)})".replace("%", "%%")
        if row.kind == "flag":
            group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            names = ",".join(choice.replace(" ", "-") for choice in row.choices)
            choices = f"{{{names}}}" if names else row.name.upper()
            group.add_argument(flag, dest=dest, type=reader(row), metavar=choices, help=text)
