"""generate, compare, sweep and demo."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL.Image import Image

from ..settings import to_config
from ..words import percent
from .models import Model, Request, open_model
from .options import AXES
from .pictures import (
    AMPLIFIED,
    Distance,
    difference,
    distance,
    enlarged,
    fresh,
    print_table,
    save_picture,
    save_table,
    sheet,
    slug,
)
from .runs import Run, draw, infotext_of, record, warm_up
from .tuned import recorded, settings_for, tuned

SIDE = 256  # longer side, in pixels, to which small pictures are enlarged
# Recognisable at a glance, with distinct shapes and colours
FAVOURITES = ("red apple", "avocado", "sunglasses face", "panda", "rose", "american football", "frog", "rainbow")
# What the demo's tuned pictures are tuned to, and on how many timesteps of the first picture
TOLERANCE, MOMENTS = 0.01, 4


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
    values, config = settings_for(args, model, request)()
    run = draw(model, request, None if args.off else config, request.prompt, args.quiet)
    seconds = {"seconds": round(run.seconds, 3), "unet_seconds": round(run.unet_seconds, 3)}
    made = record(model, request, None if args.off else values, **seconds)
    path = save_picture(target(args, request), enlarged(run.picture, SIDE), made, infotext_of(made))
    print(f"{path}: {run.seconds:.2f} s, {run.unet_seconds:.2f} s of it in {run.calls} calls of the U-Net")
    if args.off:
        print("agent attention: off")
    else:
        run.say_what_was_done()


def compare(args: argparse.Namespace) -> None:
    """Draw a picture with and without agent attention."""
    model, request = opened(args)
    values, config = settings_for(args, model, request)()
    warm_up(model, request, [None, config], args.quiet)
    plain = draw(model, request, None, "without", args.quiet)
    patched = draw(model, request, config, "with", args.quiet)
    apart = distance(plain.picture, patched.picture)
    seconds = {"without": round(plain.seconds, 3), "with": round(patched.seconds, 3)}
    made = record(model, request, values, seconds=seconds, distance=apart.record())
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
    """One cell of a sweep: its settings as texts, the picture, and how far it is from that without agent attention."""

    texts: list[str]
    run: Run
    apart: Distance


def sweep(args: argparse.Namespace) -> None:
    """Draw a picture for each combination of two settings' values."""
    model, request = opened(args)
    folder = target(args, request, "sweep-", suffix="")
    axes = dict(axis for axis in (args.x, args.y) if axis)
    columns, lines = args.x[1], args.y[1] if args.y else (None,)
    settings = settings_for(args, model, request)
    warm_up(model, request, [None, settings()[1]], args.quiet)

    def drawn(name: str, changes: dict[str, Any] | None = None) -> Cell:
        """Draw the picture of a cell, or the one without agent attention, and save it."""
        values, config = (None, None) if changes is None else settings(**changes)
        label = ", ".join(f"{k} {v}" for k, v in changes.items()) if changes else name
        run = draw(model, request, config, label, args.quiet)
        apart = distance((plain.run if changes else run).picture, run.picture)
        made = record(model, request, values, seconds=round(run.seconds, 3), distance=apart.record())
        save_picture(folder / f"{name}.png", enlarged(run.picture, SIDE), made, infotext_of(made))
        texts = [AXES[axis].format(changes[axis]) if changes else name for axis in axes]
        return Cell(texts, run, apart)

    def grid(view: Callable[[Image], Image], what: str = "") -> Image:
        """The picture without agent attention, and a view of that of each cell, labelled."""
        rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
        pictures = [[None, *(enlarged(view(cell.run.picture), SIDE) for cell in row)] for row in rows]
        captions = [
            ["", *(f"{c.run.seconds:.2f} s, {c.run.faster(plain.run)}\n{c.apart}" for c in row)] for row in rows
        ]
        pictures[0][0], captions[0][0] = enlarged(plain.run.picture, SIDE), f"{plain.run.seconds:.2f} s"
        named = [[f"{name} = {AXES[name].format(value)}" for value in values] for name, values in axes.items()]
        title = f"{request.prompt}, seed {request.seed}, {request.steps} steps, {model.name}{what}"
        labels = named[1] if args.y else ()
        return sheet(pictures, columns=["without", *named[0]], labels=labels, captions=captions, title=title)

    def caption(cell: Cell) -> str:
        return f"{cell.run.seconds:.2f} s, {cell.run.faster(plain.run)}\n{cell.apart}"

    def line(cell: Cell) -> list[Any]:
        seconds = [round(cell.run.seconds, 4), round(cell.run.unet_seconds, 4)]
        return [*cell.texts, *seconds, round(plain.run.seconds / cell.run.seconds, 3), *cell.apart.record().values()]

    plain, cells = drawn("without"), []
    header = [*axes, "seconds", "unet_seconds", "speed", "rmse", "psnr", "ssim"]
    for i, y in enumerate(lines):
        for j, x in enumerate(columns):
            cells.append(drawn(f"{i + 1:02}-{j + 1:02}", dict(zip(axes, (x, y), strict=False))))
            # save after every cell, so that an interrupted sweep keeps its measurements
            save_table(folder / "sweep.csv", header, map(line, (plain, *cells)))
    made = record(model, request, args.settings, sweep={name: list(values) for name, values in axes.items()})
    changed = grid(lambda picture: difference(plain.run.picture, picture), f", difference, {AMPLIFIED}x")
    for name, page in (("sweep", grid(lambda picture: picture)), ("difference", changed)):
        save_picture(folder / f"{name}.png", page, made, infotext_of(made))
    print_table(
        [*axes, "seconds", "speed", "distance"],
        [[*c.texts, f"{c.run.seconds:.2f}", c.run.faster(plain.run), str(c.apart)] for c in cells],
    )
    print(f"without: {plain.run.seconds:.2f} s")
    print(", ".join(str(folder / name) for name in ("sweep.png", "difference.png", "sweep.csv")))


def demo(args: argparse.Namespace) -> None:
    """Draw some prompts of the embedded model without agent attention, with it and tuned: a sheet and a table."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)
    model = open_model("embedded")
    prompts = choose(model.pipe.prompts, args.prompts)
    requests = [model.complete(Request(prompt, args.seed, args.steps)) for prompt in prompts]
    tuning = tuned(model, recorded(model, requests[0], MOMENTS, args.quiet), TOLERANCE, quiet=args.quiet)
    ways = {"without": None, "with": to_config(args.settings), "tuned": tuning.config_for(model.unet)}
    warm_up(model, requests[0], ways.values(), args.quiet)

    pictures, captions, rows, said = [], [], [], []
    for i, request in enumerate(requests):
        # in turns, and each way comes first in turn: a machine's pace drifts
        order, prompt = [*ways][i % len(ways) :] + [*ways][: i % len(ways)], request.prompt
        runs = {way: draw(model, request, ways[way], f"{prompt}, {way}", args.quiet) for way in order}
        plain, ours, best = (runs[way] for way in ways)
        apart, tuned_apart = (distance(plain.picture, run.picture) for run in (ours, best))
        pictures.append([plain.picture, ours.picture, difference(plain.picture, ours.picture), best.picture])
        captions.append([prompt, ours.faster(plain), str(apart), f"{best.faster(plain)}, {tuned_apart}"])
        seconds = [round(run.seconds, 4) for run in (plain, ours, best)]
        speeds = [round(plain.seconds / run.seconds, 3) for run in (ours, best)]
        rows.append([prompt, *seconds, *speeds, *apart.record().values()])
        said.append([prompt, f"{plain.seconds:.2f}", f"{ours.seconds:.2f}", ours.faster(plain), str(apart)])
    means = [mean(row[column] for row in rows) for column in (1, 2)]
    said.append(["mean", *(f"{s:.2f}" for s in means), f"{means[0] / means[1]:.2f}x", ""])
    headings = ["without", "with agent attention", f"difference, {AMPLIFIED}x", f"tuned to {percent(TOLERANCE)}"]
    page = sheet(
        [[enlarged(picture, SIDE // 2) for picture in row] for row in _in_pairs(pictures)],
        columns=headings * min(2, len(pictures)),
        captions=_in_pairs(captions),
        title=f"Agent attention on the embedded model: {args.steps} steps, seed {args.seed}",
    )
    made = record(model, requests[0], args.settings, prompts=prompts, tuning=tuning.text)
    image = save_picture(Path(args.out, "demo.png"), page, made)
    head = ["prompt", *(f"seconds {way}" for way in ways), "speed", "speed tuned", "rmse", "psnr", "ssim"]
    table = save_table(Path(args.out, "demo.csv"), head, rows)
    print_table(["prompt", "seconds without", "seconds with", "speed", "distance"], said)
    print(f"\n{tuning}\n\nThe pictures: {image.resolve()}\nThe table:    {table.resolve()}")
    print("Try it yourself, with the panel of the WebUI: make playground")


def choose(prompts: list[str], count: int) -> list[str]:
    """Choose `count` of the model's prompts: first the favourites that it knows, then evenly from the rest."""
    first = [prompt for prompt in FAVOURITES if prompt in prompts][:count]
    rest = [prompt for prompt in prompts if prompt not in first]
    more = min(count, len(prompts)) - len(first)
    return first + [rest[i * len(rest) // more] for i in range(more)]


def _in_pairs(rows: list[list]) -> list[list]:
    return [[item for row in rows[i : i + 2] for item in row] for i in range(0, len(rows), 2)]
