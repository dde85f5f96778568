"""generate, compare and sweep."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .distance import Distance, distance
from .files import fresh, print_table, save_picture, save_table, slug
from .models import Model, Request, open_model
from .options import AXES
from .runs import Run, draw, infotext_of, record, warm_up
from .sheets import AMPLIFIED, difference, enlarged, sheet
from .tuned import settings_for

SIDE = 256  # longer side, in pixels, to which small pictures are enlarged


def opened(args: argparse.Namespace) -> tuple[Model, Request]:
    """Open the model of a command line, and complete its request."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)  # the notes of the patch are printed below
    model = open_model(args.model, download=args.download, config=args.config, device=args.device, dtype=args.dtype)
    request = Request(args.prompt, args.seed, args.steps, args.guidance, args.negative, args.size)
    return model, model.complete(request)


def target(args: argparse.Namespace, request: Request, prefix: str = "", suffix: str = ".png") -> Path:
    """Where to write: the command line's --out, or an unused path."""
    return Path(args.out) if args.out else fresh(f"{prefix}{slug(request.prompt)}-seed{request.seed}", suffix)


def generate(args: argparse.Namespace) -> None:
    """Draw one picture."""
    model, request = opened(args)
    settings = settings_for(args, model, request)
    config = None if args.off else settings.config()
    run = draw(model, request, config, request.prompt, args.quiet)
    seconds = {"seconds": round(run.seconds, 3), "unet_seconds": round(run.unet_seconds, 3)}
    made = record(model, request, None if args.off else settings.values, **seconds)
    path = save_picture(target(args, request), enlarged(run.picture, SIDE), made, infotext_of(made))
    print(f"{path}: {run.timings()}")
    if config is None:
        print("agent attention: off")
    else:
        run.say_what_was_done()


def compare(args: argparse.Namespace) -> None:
    """Draw a picture with and without agent attention."""
    model, request = opened(args)
    settings = settings_for(args, model, request)
    config = settings.config()
    warm_up(model, request, [None, config], args.quiet)
    plain = draw(model, request, None, "without", args.quiet)
    patched = draw(model, request, config, "with", args.quiet)
    apart = distance(plain.picture, patched.picture)
    seconds = {"without": round(plain.seconds, 3), "with": round(patched.seconds, 3)}
    made = record(model, request, settings.values, seconds=seconds, distance=apart.record())
    pictures = [plain.picture, patched.picture, difference(plain.picture, patched.picture)]
    page = sheet(
        [[enlarged(picture, SIDE) for picture in pictures]],
        columns=["without", "with agent attention", f"difference, {AMPLIFIED}x"],
        captions=[[f"{plain.seconds:.2f} s", f"{patched.seconds:.2f} s, {patched.faster(plain)}", str(apart)]],
        title=f"{request.prompt}, seed {request.seed}, {request.steps} steps",
    )
    path = save_picture(target(args, request, "compare-"), page, made, infotext_of(made))
    rows = [("without", plain, ""), ("with", patched, str(apart))]
    print_table(
        ["", "seconds", "U-Net seconds", "speed", "distance"],
        [[name, f"{run.seconds:.2f}", f"{run.unet_seconds:.2f}", run.faster(plain), far] for name, run, far in rows],
    )
    patched.say_what_was_done()
    print(path)


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: what was varied, and the picture."""

    values: dict[str, Any]
    run: Run
    apart: Distance


def sweep(args: argparse.Namespace) -> None:
    """Draw a picture for each combination of two settings' values."""
    model, request = opened(args)
    folder = target(args, request, "sweep-", suffix="")
    axes = dict(axis for axis in (args.x, args.y) if axis)
    columns, lines = args.x[1], args.y[1] if args.y else (None,)
    settings = settings_for(args, model, request)
    warm_up(model, request, [None, settings.config()], args.quiet)

    def made_at(changes: dict[str, Any] | None, name: str) -> Cell:
        """Draw the picture of a cell, or the one without agent attention, and save it."""
        values = None if changes is None else settings.varied(changes)
        config = None if changes is None else settings.config(values)
        label = "without" if changes is None else ", ".join(f"{k} {v}" for k, v in changes.items())
        run = draw(model, request, config, label, args.quiet)
        apart = distance((plain or run).picture, run.picture)
        written = record(model, request, values, seconds=round(run.seconds, 3), distance=apart.record())
        save_picture(folder / f"{name}.png", enlarged(run.picture, SIDE), written, infotext_of(written))
        return Cell(changes or {}, run, apart)

    def texts(cell: Cell) -> list[str]:
        return [AXES[name].format(cell.values[name]) if cell.values else "without" for name in axes]

    def line(cell: Cell) -> list[Any]:
        seconds = [round(cell.run.seconds, 4), round(cell.run.unet_seconds, 4)]
        speed = round(plain.seconds / cell.run.seconds, 3)
        return [*texts(cell), *seconds, speed, *cell.apart.record().values()]

    def grid(view: Callable[[Image], Image], what: str = "") -> Image:
        """The picture without agent attention, and a view of that of each cell, labelled."""
        rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
        before = [enlarged(plain.picture, SIDE)] + [None] * (len(rows) - 1)
        said = [f"{plain.seconds:.2f} s"] + [""] * (len(rows) - 1)
        return sheet(
            [[b, *(enlarged(view(c.run.picture), SIDE) for c in row)] for b, row in zip(before, rows, strict=True)],
            columns=["without", *(f"{args.x[0]} = {AXES[args.x[0]].format(value)}" for value in columns)],
            labels=[f"{args.y[0]} = {AXES[args.y[0]].format(value)}" for value in lines] if args.y else (),
            captions=[[s, *map(caption, row)] for s, row in zip(said, rows, strict=True)],
            title=f"{request.prompt}, seed {request.seed}, {request.steps} steps, {model.name}{what}",
        )

    def caption(cell: Cell) -> str:
        return f"{cell.run.seconds:.2f} s, {cell.run.faster(plain)}\n{cell.apart}"

    plain: Run | None = None
    without = made_at(None, "without")
    plain, cells = without.run, []
    header = [*axes, "seconds", "unet_seconds", "speed", "rmse", "psnr", "ssim"]
    for i, y in enumerate(lines):
        for j, x in enumerate(columns):
            changes = dict(zip(axes, (x, y), strict=False))
            cells.append(made_at(changes, f"{i + 1:02}-{j + 1:02}"))
            # save after every cell, so that an interrupted sweep keeps its measurements
            save_table(folder / "sweep.csv", header, [line(without), *map(line, cells)])
    made = record(model, request, args.settings, sweep={name: list(values) for name, values in axes.items()})
    changed = grid(lambda picture: difference(plain.picture, picture), f", difference, {AMPLIFIED}x")
    for name, page in (("sweep", grid(lambda picture: picture)), ("difference", changed)):
        save_picture(folder / f"{name}.png", page, made, infotext_of(made))
    print_table(
        [*axes, "seconds", "speed", "distance"],
        [[*texts(cell), f"{cell.run.seconds:.2f}", cell.run.faster(plain), str(cell.apart)] for cell in cells],
    )
    print(f"without: {plain.seconds:.2f} s")
    print(", ".join(str(folder / name) for name in ("sweep.png", "difference.png", "sweep.csv")))
