"""The command line's parser: commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from .. import __version__
from ..checks import SettingError
from ..methods import METHODS
from ..settings import check, to_config
from .options import ROWS, TOLERANCE, axis, option_name, reader, real, size, whole

_SEED = {"type": whole("seed", 0, 2**63 - 1), "default": 0, "help": "seed of the picture (default: 0)"}
_QUIET: dict[str, Any] = {"action": "store_true", "help": "show no progress bars"}
_DOWNLOAD: dict[str, Any] = {"action": "store_true", "help": "download what the hub's local cache lacks"}
_TUNING: dict[str, Any] = {"metavar": "FILE", "help": "use the tuning that `tune` wrote, instead of settings"}
_MODEL = (
    "embedded (the small bundled model; the default), a diffusers folder, a .safetensors or .ckpt file, or a "
    "hub id (owner/name, from the local cache)"
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        SystemExit: it was invalid (code 2), or only asked for help. The message has been printed.
    """
    args = _parser().parse_args(argv)
    chosen = {name: value for name in ROWS if (value := getattr(args, f"setting_{name}", None)) is not None}
    axes = dict(given for given in (getattr(args, name, None) for name in "xy") if given)
    try:
        own = [name for name in (*chosen, *axes) if name != TOLERANCE.name]
        if getattr(args, "tuning", None):
            if own:
                raise SettingError(f"a tuning has settings of its own, got {', '.join(own)} as well")
        elif TOLERANCE.name in axes:
            raise SettingError("a sweep over tolerance needs --tuning")
        args.settings = check({"enabled": True, **chosen})
        to_config(args.settings)  # settings can contradict each other, those of a sweep's cells too
        for cell in product(*axes.values()):
            to_config({**args.settings, **dict(zip(axes, cell, strict=True))})
    except SettingError as error:
        args.parser.error(str(error))
    return args


def _parser() -> argparse.ArgumentParser:
    about = "Agent attention for Stable Diffusion: draw pictures with it, and see what it does."
    parser = argparse.ArgumentParser(prog="python -m agentsd", description=about)
    parser.add_argument("--version", action="version", version=f"agentsd {__version__}")
    subs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _command(subs, "generate", "draw a picture with agent attention", "PROMPT ")
    _picture_options(add)
    add("--off", action="store_true", help="draw the picture without agent attention")

    with_and_without = "draw a picture with and without agent attention, side by side"
    add = _command(subs, "compare", with_and_without, "PROMPT ")
    _picture_options(add)

    add = _command(subs, "sweep", "draw a picture over ranges of one or two settings", "PROMPT ")
    _picture_options(add, "FOLDER", "folder to write to")
    ranges = "SETTING=VALUES: values separated by commas, or FIRST:LAST:STEP; settings are named like the options below"
    add("--x", type=axis, required=True, metavar="SETTING=VALUES", help=f"the columns, as {ranges}")
    add("--y", type=axis, metavar="SETTING=VALUES", help="the rows, in the same form; may be left out")

    fastest = "find the fastest settings of each layer within a tolerance"
    add = _command(subs, "tune", fastest, settings=False)
    prompts = "prompts of the pictures to tune on (default: some of the model's)"
    add("--prompt", nargs="+", metavar="PROMPT", help=prompts)
    _model_options(add)
    tolerance = "limit on the deviation of the U-Net's output, as a fraction (default: %(default)s)"
    add("--tolerance", type=real("tolerance", 0.0001, 1), default=0.02, help=tolerance)
    add("--methods", nargs="+", choices=[*METHODS], help="methods to try (default: all)")
    add("--moments", type=whole("moments", 1, 100), default=6, help="timesteps to tune on (default: 6)")
    add("--out", metavar="FILE", help="JSON file to write (default: a new one in outputs/)")
    add("--quiet", **_QUIET)

    layers = "show which layers of a model would be patched, and what that saves"
    add = _command(subs, "info", layers, "[MODEL] ")
    add("model", nargs="?", default="embedded", metavar="MODEL", help=_MODEL)
    add("--size", type=size, nargs="+", metavar="SIZE", help="picture sizes in pixels, such as 512 or 768x512")
    add("--layers", action="store_true", help="list every layer by its name")
    add("--json", action="store_true", help="print it as JSON")
    add("--tuning", **_TUNING)
    add("--download", **_DOWNLOAD)

    add = _command(subs, "demo", "draw a sheet of pictures with and without agent attention")
    add("--out", metavar="FOLDER", default="outputs/demo", help="where to put it (default: %(default)s)")
    add("--steps", type=whole("steps", 1, 1000), default=20, help="sampling steps (default: 20)")
    add("--prompts", type=whole("prompts", 1, 100), default=6, help="number of prompts (default: 6)")
    add("--seed", **{**_SEED, "help": "seed of the pictures (default: 0)"})
    add("--quiet", **_QUIET)

    page = "serve a page with the WebUI's panel, to this machine only"
    add = _command(subs, "playground", page, settings=False)
    add("--port", type=whole("port", 0, 65535), default=7860, help="port (default: 7860, or a free one)")
    add("--open", action="store_true", help="open the page in the browser")
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.command == "playground":
        from .playground import serve  # needs gradio

        return serve(args.port, args.open)
    from . import commands  # needs Pillow, and mostly diffusers

    return getattr(commands, args.command)(args)


def _command(subs: Any, name: str, text: str, arguments: str = "", settings: bool = True) -> Callable[..., Any]:
    """Add a command; returns what adds its options, before those of agent attention."""
    usage = f"python -m agentsd {name} {arguments}[options]"
    sub = subs.add_parser(name, help=text, usage=usage, description=f"{text[0].upper()}{text[1:]}.")
    sub.set_defaults(run=_run, parser=sub, download=False)
    sub.add_argument("--debug", action="store_true", help="show where an error came from")
    if settings:
        group = sub.add_argument_group("agent attention", "the settings of the WebUI's panel, with its defaults")
        for row in ROWS.values():
            names = ",".join(choice.replace(" ", "-") for choice in row.choices)
            kind: dict[str, Any] = {"type": reader(row), "metavar": f"{{{names}}}" if names else row.name.upper()}
            if row.kind == "flag":
                kind = {"action": argparse.BooleanOptionalAction, "default": None}
            told = f"{row.tooltip} (default: {row.format(row.default)})".replace("%", "%%")
            group.add_argument(f"--{option_name(row)}", dest=f"setting_{row.name}", help=told, **kind)
    return sub.add_argument


def _picture_options(add: Callable[..., Any], where: str = "FILE", what: str = "PNG file to write") -> None:
    add("prompt", help="what to draw; the embedded model knows emoji by name, such as 'a cat'")
    _model_options(add)
    add("--out", metavar=where, help=f"{what} (default: a new one in outputs/)")
    add("--tuning", **_TUNING)
    add("--quiet", **_QUIET)


def _model_options(add: Callable[..., Any]) -> None:
    add("--model", default="embedded", help=_MODEL)
    add("--config", metavar="FOLDER", help="diffusers folder or hub id that tells how to read a single file")
    add("--download", **_DOWNLOAD)
    add("--negative", default="", metavar="PROMPT", help="negative prompt")
    add("--seed", **_SEED)
    add("--steps", type=whole("steps", 1, 1000), help="sampling steps (default: 20)")
    add("--guidance", type=real("guidance", 0, 100), help="scale of classifier-free guidance")
    add("--size", type=size, help="size of the picture in pixels, such as 512 or 768x512 (width first)")
    add("--device", default="auto", help="torch device (default: a GPU if there is one)")
    dtypes = ("auto", "float32", "float16", "bfloat16")
    add("--dtype", default="auto", choices=dtypes, help="default: float16 on a GPU, else float32")
