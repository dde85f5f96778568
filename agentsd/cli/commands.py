"""generate, compare and sweep."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..methods import UNTOUCHED, method_of
from .distance import Distance, distance
from .files import OUTPUTS, fresh, save_picture, save_table, slug
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


def generate(args: argparse.Namespace) -> None:
    """Draw one picture."""
    model, request = opened(args)
    settings = settings_for(args, model, request)
    values = None if args.off else settings.values
    config = None if args.off else settings.config()
    run = draw(model, request, config, request.prompt, args.quiet)
    metadata = record(model, request, values, seconds=round(run.seconds, 3), unet_seconds=round(run.unet_seconds, 3))
    path = Path(args.out) if args.out else fresh(f"{slug(request.prompt)}-seed{request.seed}")
    save_picture(path, enlarged(run.picture, SIDE), metadata, infotext_of(metadata))
    print(f"{path}: {run.timings()}")
    say_what_was_done(run, config is not None)


def say_what_was_done(run: Run, patched: bool) -> None:
    """Print what agent attention did in a run, and why it left layers to the model."""
    if not patched:
        print("agent attention: off")
        return
    changed = {action: count for action, count in run.actions.items() if action != UNTOUCHED and count}
    total = sum(run.actions.values())
    what = ", ".join(f"{count} {method_of(action).phrase}" for action, count in changed.items()) or "none changed"
    print(f"agent attention: of {total} self-attentions {what}")
    if run.closeness is not None:
        print(f"  {run.closeness}")
    for reason, count in run.notes.items():
        print(f"  left to the model {count} times: {reason}")


def compare(args: argparse.Namespace) -> None:
    """Draw a picture with and without agent attention."""
    model, request = opened(args)
    settings = settings_for(args, model, request)
    config = settings.config()
    warm_up(model, request, [None, config], args.quiet)
    plain = draw(model, request, None, "without", args.quiet)
    patched = draw(model, request, config, "with", args.quiet)
    metrics = distance(plain.picture, patched.picture)
    metadata = record(
        model,
        request,
        settings.values,
        seconds={"without": round(plain.seconds, 3), "with": round(patched.seconds, 3)},
        distance=as_record(metrics),
    )
    pictures = [plain.picture, patched.picture, difference(plain.picture, patched.picture)]
    page = sheet(
        [[enlarged(picture, SIDE) for picture in pictures]],
        columns=["without", "with agent attention", f"difference, {AMPLIFIED}x"],
        captions=[[f"{plain.seconds:.2f} s", f"{patched.seconds:.2f} s, {speed(plain, patched)}", str(metrics)]],
        title=f"{request.prompt}, seed {request.seed}, {request.steps} steps",
    )
    path = Path(args.out) if args.out else fresh(f"compare-{slug(request.prompt)}-seed{request.seed}")
    save_picture(path, page, metadata, infotext_of(metadata))
    print_table(
        ["", "seconds", "U-Net seconds", "speed", "distance"],
        [
            ["without", f"{plain.seconds:.2f}", f"{plain.unet_seconds:.2f}", "1.00x", ""],
            ["with", f"{patched.seconds:.2f}", f"{patched.unet_seconds:.2f}", speed(plain, patched), str(metrics)],
        ],
    )
    say_what_was_done(patched, True)
    print(path)


def speed(plain: Run, ours: Run) -> str:
    """Format the speed-up of the whole run over the unpatched one."""
    return f"{plain.seconds / ours.seconds:.2f}x"


def as_record(apart: Distance) -> dict[str, float | None]:
    """Convert a distance for JSON and CSV, which have no infinity: equal pictures get no PSNR."""
    psnr = round(apart.psnr, 3) if apart.rmse else None
    return {"rmse": round(apart.rmse, 4), "psnr": psnr, "ssim": None if apart.ssim is None else round(apart.ssim, 5)}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns, numbers to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [all(text[:1].isdigit() or text in ("", "–") for text in column) for column in zip(*rows, strict=True)]
    for row in table:
        cells = zip(row, widths, right, strict=True)
        print("  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in cells).rstrip())


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep."""

    values: dict[str, Any]
    run: Run
    apart: Distance


def sweep(args: argparse.Namespace) -> None:
    """Draw a picture for each combination of two settings' values."""
    model, request = opened(args)
    folder = Path(args.out) if args.out else fresh(f"sweep-{slug(request.prompt)}-seed{request.seed}", suffix="")
    (x, columns), (y, lines) = args.x, args.y or ("", (None,))
    settings = settings_for(args, model, request)
    warm_up(model, request, [None, settings.config()], args.quiet)
    plain = draw(model, request, None, "without", args.quiet)
    _save(folder / "without.png", model, request, None, plain)
    cells: list[list[Cell]] = []
    for i, line in enumerate(lines):
        cells.append([])
        for j, column in enumerate(columns):
            values = settings.varied({x: column, **({y: line} if y else {})})
            label = ", ".join(f"{name} {value}" for name, value in [(x, column), (y, line)] if name)
            run = draw(model, request, settings.config(values), label, args.quiet)
            cell = Cell(values, run, distance(plain.picture, run.picture))
            cells[i].append(cell)
            _save(folder / f"{i + 1:02}-{j + 1:02}.png", model, request, values, run, cell.apart)
            # save after every cell, so that an interrupted sweep keeps its measurements
            _save_csv(folder / "sweep.csv", x, y, plain, cells)
    _save_grid(folder / "sweep.png", model, request, args, plain, cells, lambda picture: picture)
    compared = partial(difference, plain.picture)
    _save_grid(folder / "difference.png", model, request, args, plain, cells, compared, f", difference, {AMPLIFIED}x")
    print_table(
        [x, *([y] if y else []), "seconds", "speed", "distance"],
        [
            [*_where(cell, x, y), f"{cell.run.seconds:.2f}", speed(plain, cell.run), str(cell.apart)]
            for cell in _flat(cells)
        ],
    )
    print(f"without: {plain.seconds:.2f} s")
    print(", ".join(str(folder / name) for name in ("sweep.png", "difference.png", "sweep.csv")))


def _flat(cells: list[list[Cell]]) -> list[Cell]:
    return [cell for row in cells for cell in row]


def _where(cell: Cell, x: str, y: str) -> list[str]:
    return [AXES[name].format(cell.values[name]) for name in (x, y) if name]


def _save(path: Path, model: Model, request: Request, values: Any, run: Run, metrics: Distance | None = None) -> None:
    more = {} if metrics is None else {"distance": as_record(metrics)}
    metadata = record(model, request, values, seconds=round(run.seconds, 3), **more)
    save_picture(path, enlarged(run.picture, SIDE), metadata, infotext_of(metadata))


def _save_csv(path: Path, x: str, y: str, plain: Run, cells: list[list[Cell]]) -> None:
    names = [name for name in (x, y) if name]
    header = [*names, "seconds", "unet_seconds", "speed", "rmse", "psnr", "ssim"]
    rows: list[list[Any]] = [
        ["without"] * len(names) + [round(plain.seconds, 4), round(plain.unet_seconds, 4), 1, 0, "", 1]
    ]
    for cell in _flat(cells):
        times = [round(cell.run.seconds, 4), round(cell.run.unet_seconds, 4)]
        metrics = ["" if value is None else value for value in as_record(cell.apart).values()]
        rows.append([*_where(cell, x, y), *times, round(plain.seconds / cell.run.seconds, 3), *metrics])
    save_table(path, header, rows)


def _save_grid(
    path: Path,
    model: Model,
    request: Request,
    args: argparse.Namespace,
    plain: Run,
    cells: list[list[Cell]],
    view: Callable[[Image], Image],
    what: str = "",
) -> None:
    """Save the unpatched picture and a `view` of the picture of each cell, labelled."""
    (x, columns), (y, lines) = args.x, args.y or ("", (None,))
    first = [enlarged(plain.picture, SIDE)] + [None] * (len(lines) - 1)
    pictures = [[first[i], *(enlarged(view(cell.run.picture), SIDE) for cell in row)] for i, row in enumerate(cells)]
    captions = [
        [f"{plain.seconds:.2f} s" if i == 0 else "", *(_caption(plain, cell) for cell in row)]
        for i, row in enumerate(cells)
    ]
    page = sheet(
        pictures,
        columns=["without", *(f"{x} = {AXES[x].format(value)}" for value in columns)],
        labels=[f"{y} = {AXES[y].format(value)}" for value in lines] if y else (),
        captions=captions,
        title=f"{request.prompt}, seed {request.seed}, {request.steps} steps, {model.name}{what}",
    )
    axes = {x: list(columns), **({y: list(lines)} if y else {})}
    metadata = record(model, request, args.settings, sweep=axes)
    save_picture(path, page, metadata, infotext_of(metadata))


def _caption(plain: Run, cell: Cell) -> str:
    return f"{cell.run.seconds:.2f} s, {speed(plain, cell.run)}\n{cell.apart}"


__all__ = ["OUTPUTS", "compare", "generate", "opened", "sweep"]
