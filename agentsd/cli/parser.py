"""The command line's parser: commands, their options, and how values are read. Imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from .. import __version__
from ..checks import Setting, SettingError
from ..methods import METHODS
from ..settings import SETTINGS, check, to_config

ROWS: Mapping[str, Setting] = {row.name: row for row in SETTINGS if row.option}
TOLERANCE = Setting("tolerance", "number", 0.02)  # what a sweep with a tuning may vary instead
AXES: Mapping[str, Setting] = {**ROWS, TOLERANCE.name: TOLERANCE}
LARGEST = 8192


def option_name(row: Setting) -> str:
    # --seed is the seed of the picture
    return "partition-seed" if row.name == "seed" else row.name.replace("_", "-")


def reader(row: Setting) -> Callable[[str], Any]:
    """Make argparse's type of a setting."""

    def read(text: str) -> Any:
        spaced = text.replace("-", " ")
        try:
            return row.parse(spaced if spaced in row.choices else text)
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _number(name: str, low: float, high: float, kind: str = "whole") -> Callable[[str], Any]:
    return reader(Setting(name, kind, low, low=low, high=high))


def axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Parse SETTING=VALUES to the setting's name in the table and its values."""
    option, equals, values = text.partition("=")
    by_option = {option_name(row): row for row in AXES.values()}
    row = by_option.get(option.strip().lstrip("-").replace("_", "-"))
    if row is None or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not SETTING=VALUES with one of {', '.join(by_option)}")
    return row.name, tuple(map(reader(row), _spread(values)))


def _spread(values: str) -> list[str]:
    """Expand "1,2,3" or "0.2:0.8:0.2" (both ends included) to values as text."""
    result = []
    for part in map(str.strip, values.split(",")):
        ends = part.split(":")
        if len(ends) != 3:
            result.append(part)
            continue
        try:
            first, last, step = map(float, ends)
            count = int((last - first) / step + 1e-9) + 1
        except (ValueError, ZeroDivisionError, OverflowError):
            count = 0
        if not 1 <= count <= 1000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range FIRST:LAST:STEP of 1 to 1000 values")
        result += [f"{first + i * step:.10g}" for i in range(count)]
    return result


def size(text: str) -> tuple[int, int]:
    """Parse "512" or "768x512" (width × height) to (height, width)."""
    match = re.fullmatch(r"(\d+)(?:\s*[x×*]\s*(\d+))?", text.strip())
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or not all(16 <= side <= LARGEST and side % 8 == 0 for side in sides):
        allowed = f"WIDTHxHEIGHT in pixels, multiples of 8 from 16 to {LARGEST}"
        raise argparse.ArgumentTypeError(f"a size must be {allowed}, got {text!r}")
    return sides[-1], sides[0]


def _option(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


def _flag(text: str) -> dict[str, Any]:
    return {"help": text, "action": "store_true"}


def _out(metavar: str, text: str) -> dict[str, Any]:
    return _option(f"{text} (default: a new one in outputs/)", metavar=metavar)


_Options = Mapping[str, dict[str, Any]]
_MODEL_HELP = (
    "embedded (the small bundled model; the default), a diffusers folder, a .safetensors or .ckpt file, or a "
    "hub id (owner/name, from the local cache)"
)
_RANGES = "SETTING=VALUES: values separated by commas, or FIRST:LAST:STEP; settings are named like the options below"
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_SEED = _option("seed of the picture (default: 0)", type=_number("seed", 0, 2**63 - 1), default=0)
_STEPS = _option("sampling steps (default: 20)", type=_number("steps", 1, 1000))
_QUIET = {"--quiet": _flag("show no progress bars")}
_DOWNLOAD = {"--download": _flag("download what the hub's local cache lacks")}
_TUNING = {"--tuning": _option("use the tuning that `tune` wrote, instead of settings", metavar="FILE")}
_MODEL: _Options = {
    "--model": _option(_MODEL_HELP, default="embedded"),
    "--config": _option("diffusers folder or hub id that tells how to read a single file", metavar="FOLDER"),
    **_DOWNLOAD,
    "--negative": _option("negative prompt", default="", metavar="PROMPT"),
    "--seed": _SEED,
    "--steps": _STEPS,
    "--guidance": _option("scale of classifier-free guidance", type=_number("guidance", 0, 100, "number")),
    "--size": _option("size of the picture in pixels, such as 512 or 768x512 (width first)", type=size),
    "--device": _option("torch device (default: a GPU if there is one)", default="auto"),
    "--dtype": _option("default: float16 on a GPU, else float32", default="auto", choices=_DTYPES),
}
_PICTURE: _Options = {
    "prompt": _option("what to draw; the embedded model knows emoji by name, such as 'a cat'"),
    **_MODEL,
    "--out": _out("FILE", "PNG file to write"),
    **_TUNING,
    **_QUIET,
}
_GENERATE: _Options = {**_PICTURE, "--off": _flag("draw the picture without agent attention")}
_SWEEP: _Options = {
    **_PICTURE,
    "--out": _out("FOLDER", "folder to write to"),
    "--x": _option(f"the columns, as {_RANGES}", type=axis, required=True, metavar="SETTING=VALUES"),
    "--y": _option("the rows, in the same form; may be left out", type=axis, metavar="SETTING=VALUES"),
}
_TOLERANCE_HELP = "limit on the deviation of the U-Net's output, as a fraction (default: %(default)s)"
_TUNE: _Options = {
    "--prompt": _option("prompts of the pictures to tune on (default: some of the model's)", nargs="+"),
    **_MODEL,
    "--tolerance": _option(_TOLERANCE_HELP, type=_number("tolerance", 0.0001, 1, "number"), default=0.02),
    "--methods": _option("methods to try (default: all)", nargs="+", choices=[*METHODS]),
    "--moments": _option("timesteps to tune on (default: 6)", type=_number("moments", 1, 100), default=6),
    "--out": _out("FILE", "JSON file to write"),
    **_QUIET,
}
_INFO: _Options = {
    "model": _option(_MODEL_HELP, nargs="?", default="embedded"),
    "--size": _option("picture sizes in pixels, such as 512 or 768x512", type=size, nargs="+"),
    "--layers": _flag("list every layer by its name"),
    "--json": _flag("print it as JSON"),
    **_TUNING,
    **_DOWNLOAD,
}
_DEMO: _Options = {
    "--out": _option("where to put it (default: %(default)s)", metavar="FOLDER", default="outputs/demo"),
    "--steps": _STEPS,
    "--prompts": _option("number of prompts (default: 6)", type=_number("prompts", 1, 100), default=6),
    "--seed": {**_SEED, "help": "seed of the pictures (default: 0)"},
    **_QUIET,
}
_PLAYGROUND: _Options = {
    "--port": _option("port (default: 7860, or a free one)", type=_number("port", 0, 65535), default=7860),
    "--open": _flag("open the page in the browser"),
}
# By command: what it does, and its options, which are those of agent attention as well but where there is a third entry
_COMMANDS: Mapping[str, tuple[Any, ...]] = {
    "generate": ("draw a picture with agent attention", _GENERATE),
    "compare": ("draw a picture with and without agent attention, side by side", _PICTURE),
    "sweep": ("draw a picture over ranges of one or two settings", _SWEEP),
    "tune": ("find the fastest settings of each layer within a tolerance", _TUNE, False),
    "info": ("show which layers of a model would be patched, and what that saves", _INFO),
    "demo": ("draw a sheet of pictures with and without agent attention", _DEMO),
    "playground": ("serve a page with the WebUI's panel, to this machine only", _PLAYGROUND, False),
}


def make_parser() -> argparse.ArgumentParser:
    about = "Agent attention for Stable Diffusion: draw pictures with it, and see what it does."
    parser = argparse.ArgumentParser(prog="python -m agentsd", description=about)
    parser.add_argument("--version", action="version", version=f"agentsd {__version__}")
    subs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        _add(subs, name, *command)
    return parser


def _add(subs: Any, name: str, text: str, options: _Options, settings: bool = True) -> None:
    """Add a command with its options, and those of the settings."""
    arguments = [
        f"[{option.upper()}]" if given.get("nargs") == "?" else option.upper()
        for option, given in options.items()
        if not option.startswith("-")
    ]
    usage = " ".join(["python -m agentsd", name, *arguments, "[options]"])
    sub = subs.add_parser(name, help=text, usage=usage, description=f"{text[0].upper()}{text[1:]}.")
    sub.set_defaults(parser=sub, download=False)
    sub.add_argument("--debug", action="store_true", help="show where an error came from")
    for option, given in options.items():
        sub.add_argument(option, **given)
    if not settings:
        return
    group = sub.add_argument_group("agent attention", "the settings of the WebUI's panel, with its defaults")
    for row in ROWS.values():
        names = ",".join(choice.replace(" ", "-") for choice in row.choices)
        kind: dict[str, Any] = {"type": reader(row), "metavar": f"{{{names}}}" if names else row.name.upper()}
        if row.kind == "flag":
            kind = {"action": argparse.BooleanOptionalAction, "default": None}
        told = f"{row.tooltip} (default: {row.format(row.default)})".replace("%", "%%")
        group.add_argument(f"--{option_name(row)}", dest=f"setting_{row.name}", help=told, **kind)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; SystemExit means that it was invalid (code 2), or only asked for help, and is told."""
    args = make_parser().parse_args(argv)
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
        # settings can contradict each other, those of a sweep's cells too; without axes there is one cell
        for cell in product(*axes.values()):
            to_config({**args.settings, **dict(zip(axes, cell, strict=True))})
    except SettingError as error:
        args.parser.error(str(error))
    return args
