"""The options of the command line. Those of the settings are made from the panel's table of settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import cleandoc
from typing import Any

from .. import __version__
from ..config import LIMITS, AgentConfig, SettingError
from ..webui.settings import BY_NAME, Row, check, to_config

# The panel's switch is the command itself, and a command line has no hires pass.
_NOT_HERE = ("enabled", "hires_until", "passes")
# The core's settings that the panel has under other names
_RENAMED = ("attn_precision", "stages")
_KINDS = {"bool": "flag", "int": "number", "float": "slider", "choice": "choice"}


def _row_of(name: str) -> Row:
    """A row for a setting of the core that the panel does not show."""
    limits, default = LIMITS[name], getattr(_CORE, name)
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", cleandoc(AgentConfig.__doc__ or ""), re.MULTILINE)
    info = " ".join(found[1].split()) if found else ""
    ends = {end: limits[end] for end in ("low", "high") if end in limits}
    choices = tuple(str(choice) for choice in limits.get("choices", ()))
    step = 0.01 if limits["kind"] == "float" else 1
    return Row(
        name,
        name,
        info[:1].upper() + info[1:],
        str(default) if choices else default,
        _KINDS[limits["kind"]],
        step=step,
        choices=choices,
        **ends,
    )


_CORE = AgentConfig()
_BEYOND = {name: _row_of(name) for name in LIMITS if name not in BY_NAME and name not in _RENAMED}
ROWS: Mapping[str, Row] = {**{name: row for name, row in BY_NAME.items() if name not in _NOT_HERE}, **_BEYOND}
_OPTION = {"seed": "partition-seed"}  # --seed is the picture's
DTYPES = ("auto", "float32", "float16", "bfloat16")
LARGEST = 8192


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line.

    Raises:
        SystemExit: it was wrong (code 2), or asked for help only. What there is to say has been printed.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.settings = settings_of(_given(args))
        config_of(args.settings)  # settings can exclude each other
        for axis in ("x", "y"):
            _check_axis(args, axis)
    except SettingError as error:
        args.parser.error(str(error))
    return args


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, f"setting_{name}", None) for name in ROWS}
    return {name: value for name, value in given.items() if value is not None}


def _check_axis(args: argparse.Namespace, axis: str) -> None:
    """A wrong cell of a sweep is found before the first picture is drawn."""
    name, values = getattr(args, axis, None) or ("", ())
    for value in values:
        config_of({**args.settings, name: value})


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting: the given ones, and the others at their defaults."""
    beyond = {name: row.checked(given.get(name)) for name, row in _BEYOND.items()}
    panel = {name: value for name, value in given.items() if name not in _BEYOND}
    return {**check({"enabled": True, **panel}), **beyond}


def config_of(values: Mapping[str, Any], first_downsample: int = 1) -> AgentConfig:
    """The config that the settings stand for on a model whose largest self-attention layers are so far down."""
    config = to_config({name: values[name] for name in BY_NAME}, first_downsample=first_downsample)
    assert config is not None  # the panel's switch is on
    return replace(config, **{name: _core_value(name, values[name]) for name in _BEYOND})


def _core_value(name: str, value: Any) -> Any:
    return next((choice for choice in LIMITS[name].get("choices", ()) if str(choice) == value), value)


def _parser() -> argparse.ArgumentParser:
    from . import commands, demo, info

    parser = argparse.ArgumentParser(
        prog="python -m agentsd",
        description="Agent attention for Stable Diffusion: draw pictures with it, and see what it does.",
    )
    parser.add_argument("--version", action="version", version=f"agentsd {__version__}")
    subs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = _command(subs, "generate", commands.generate, "draw a picture with agent attention")
    _picture_options(sub)
    sub.add_argument("--off", action="store_true", help="draw it without agent attention")
    _settings(sub)

    sub = _command(subs, "compare", commands.compare, "draw a picture with and without agent attention, side by side")
    _picture_options(sub)
    _settings(sub)

    sub = _command(subs, "sweep", commands.sweep, "draw a picture over ranges of one or two settings")
    _picture_options(sub, folder=True)
    ranges = "SETTING=VALUES: values divided by commas, or FIRST:LAST:STEP; settings are named as the options below"
    sub.add_argument("--x", type=_axis, required=True, metavar="SETTING=VALUES", help=f"the columns, as {ranges}")
    sub.add_argument("--y", type=_axis, metavar="SETTING=VALUES", help="the rows, in the same form; may be left out")
    _settings(sub)

    sub = _command(
        subs, "info", info.info, "say which layers of a model would be patched, and what that saves", "[MODEL] "
    )
    sub.add_argument("model", nargs="?", default="embedded", metavar="MODEL", help=_MODEL_HELP)
    sub.add_argument(
        "--size", type=size, nargs="+", metavar="SIZE", help="picture sizes in pixels, such as 512 or 768x512"
    )
    sub.add_argument("--layers", action="store_true", help="list every layer by its name")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    _download(sub)
    _settings(sub)

    sub = _command(subs, "demo", demo.demo, "draw a sheet of pictures with and without agent attention", "")
    sub.add_argument("--out", metavar="FOLDER", default="outputs/demo", help="where to put it (default: %(default)s)")
    sub.add_argument("--steps", type=_whole("steps", 1, 1000), default=20, help="sampling steps (default: 20)")
    sub.add_argument("--prompts", type=_whole("prompts", 1, 100), default=6, help="how many prompts (default: 6)")
    sub.add_argument("--seed", type=_whole("seed", 0, 2**63 - 1), default=0, help="seed of the pictures (default: 0)")
    _quiet(sub)
    _settings(sub)

    sub = _command(subs, "playground", _playground, "open a page with the panel of the WebUI, on this machine only", "")
    sub.add_argument("--port", type=_whole("port", 0, 65535), default=7860, help="port (default: 7860, or a free one)")
    sub.add_argument("--open", action="store_true", help="open it in the browser")
    return parser


def _playground(args: argparse.Namespace) -> None:
    from ..playground import serve

    serve(args.port, args.open)


_MODEL_HELP = (
    "embedded (the small model that comes along; the default), a diffusers folder, a .safetensors or .ckpt file, or a "
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
    sub.add_argument("--download", action="store_true", help="fetch what the hub's local cache does not have")


def _picture_options(sub: argparse.ArgumentParser, folder: bool = False) -> None:
    sub.add_argument("prompt", help="what to draw; the embedded model knows emoji by name, such as 'a cat'")
    sub.add_argument("--model", default="embedded", help=_MODEL_HELP)
    sub.add_argument("--config", metavar="FOLDER", help="a diffusers folder or hub id that tells how to read the file")
    _download(sub)
    sub.add_argument("--negative", default="", metavar="PROMPT", help="negative prompt")
    sub.add_argument("--seed", type=_whole("seed", 0, 2**63 - 1), default=0, help="seed of the picture (default: 0)")
    sub.add_argument("--steps", type=_whole("steps", 1, 1000), help="sampling steps (default: 20)")
    sub.add_argument("--guidance", type=_real("guidance", 0, 100), help="scale of classifier-free guidance")
    sub.add_argument("--size", type=size, help="size of the picture in pixels, such as 512 or 768x512 (width first)")
    sub.add_argument("--device", default="auto", help="torch's name of a device (default: a GPU if there is one)")
    sub.add_argument("--dtype", default="auto", choices=DTYPES, help="default: float16 on a GPU, else float32")
    where, what = ("FOLDER", "folder to write to") if folder else ("FILE", "PNG file to write")
    sub.add_argument("--out", metavar=where, help=f"{what} (default: a new one in outputs/)")
    _quiet(sub)


def _settings(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("agent attention", "the settings of the WebUI's panel, with its defaults")
    for row in ROWS.values():
        flag, dest = f"--{option_name(row)}", f"setting_{row.name}"
        text = f"{row.info} (default: {row.text(row.default)})".replace("%", "%%")
        if row.kind == "flag":
            group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            names = ",".join(choice.replace(" ", "-") for choice in row.choices)
            choices = f"{{{names}}}" if names else row.name.upper()
            group.add_argument(flag, dest=dest, type=_read(row), metavar=choices, help=text)


def option_name(row: Row) -> str:
    return _OPTION.get(row.name, row.name.replace("_", "-"))


def _read(row: Row) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        spaced = text.replace("-", " ")
        try:
            return row.parsed(spaced if spaced in row.choices else text)
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """SETTING=VALUES → its name in the table and its values."""
    given, equals, values = text.partition("=")
    by_option = {option_name(row): row for row in ROWS.values()}
    row = by_option.get(given.strip().lstrip("-").replace("_", "-"))
    if row is None or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not SETTING=VALUES with one of {', '.join(by_option)}")
    read = _read(row)
    return row.name, tuple(read(value) for value in _spread(values))


def _spread(values: str) -> list[str]:
    """ "1,2,3" or "0.2:0.8:0.2" (both ends included) → the values as text."""
    found = []
    for part in values.split(","):
        ends = part.strip().split(":")
        if len(ends) != 3:
            found.append(part.strip())
            continue
        try:
            first, last, step = (float(end) for end in ends)
            count = int((last - first) / step + 1e-9) + 1
        except (ValueError, ZeroDivisionError, OverflowError):
            count = 0
        if not 1 <= count <= 1000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range FIRST:LAST:STEP of 1 to 1000 values")
        found += [f"{first + i * step:.10g}" for i in range(count)]
    return found


def size(text: str) -> tuple[int, int]:
    """ "512" or "768x512" (width × height) → (height, width)."""
    match = re.fullmatch(r"(\d+)(?:\s*[x×*]\s*(\d+))?", text.strip())
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or not all(16 <= side <= LARGEST and side % 8 == 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"a size must be WIDTHxHEIGHT in pixels, multiples of 8 from 16 to {LARGEST}, got {text!r}"
        )
    return sides[-1], sides[0]


def _whole(name: str, low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{name} must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def _real(name: str, low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{name} must be a number from {low} to {high}, got {text!r}")
        return value

    return read
