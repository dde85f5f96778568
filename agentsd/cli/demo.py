"""demo: a contact sheet of the embedded model's pictures with and without agent attention."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from statistics import mean

from ..words import percent
from .commands import SIDE, as_record, print_table, speed
from .distance import distance
from .files import save_picture, save_table
from .models import Request, open_model
from .options import config_of
from .runs import draw, record, warm_up
from .sheets import AMPLIFIED, difference, enlarged, sheet
from .tuned import recorded, tuned

# Recognisable at a glance, with distinct shapes and colours
FAVOURITES = ("red apple", "avocado", "sunglasses face", "panda", "rose", "american football", "frog", "rainbow")
# What the tuned pictures are tuned to, and on how many timesteps of the first picture.
TOLERANCE, MOMENTS = 0.01, 4


def demo(args: argparse.Namespace) -> None:
    """Draw some prompts of the embedded model with and without agent attention; write a sheet and a table."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)
    model = open_model("embedded")
    config = config_of(args.settings)
    prompts = choose(model.pipe.prompts, args.prompts)
    requests = [model.complete(Request(prompt, args.seed, args.steps)) for prompt in prompts]
    tuning = tuned(model, recorded(model, requests[0], MOMENTS, args.quiet), TOLERANCE, quiet=args.quiet)
    best = tuning.config_for(model.unet)
    warm_up(model, requests[0], [None, config, best], args.quiet)
    results, last = [], []
    for request in requests:  # in turns, since a machine's pace drifts
        plain = draw(model, request, None, f"{request.prompt}, without", args.quiet)
        patched = draw(model, request, config, f"{request.prompt}, with", args.quiet)
        results.append((request.prompt, plain, patched, distance(plain.picture, patched.picture)))
        last.append(draw(model, request, best, f"{request.prompt}, tuned", args.quiet))

    folder = Path(args.out)
    rows = [
        [plain.picture, patched.picture, difference(plain.picture, patched.picture), run.picture]
        for (_, plain, patched, _), run in zip(results, last, strict=True)
    ]
    captions = [
        [prompt, speed(plain, patched), str(metrics), f"{speed(plain, run)}, {distance(plain.picture, run.picture)}"]
        for (prompt, plain, patched, metrics), run in zip(results, last, strict=True)
    ]
    tuned_to = f"tuned to {percent(TOLERANCE)}"
    page = sheet(
        [[enlarged(picture, SIDE // 2) for row in pair for picture in row] for pair in _in_pairs(rows)],
        columns=["without", "with agent attention", f"difference, {AMPLIFIED}x", tuned_to] * min(2, len(rows)),
        captions=[[text for row in pair for text in row] for pair in _in_pairs(captions)],
        title=f"Agent attention on the embedded model: {args.steps} steps, seed {args.seed}",
    )
    metadata = record(model, requests[0], args.settings, prompts=list(prompts), tuning=tuning.text)
    image = save_picture(folder / "demo.png", page, metadata)
    table = save_table(
        folder / "demo.csv",
        ["prompt", "seconds without", "seconds with", "seconds tuned", "speed", "speed tuned", "rmse", "psnr", "ssim"],
        [
            [
                prompt,
                *(round(run.seconds, 4) for run in (plain, patched, tuned_run)),
                *(round(plain.seconds / run.seconds, 3) for run in (patched, tuned_run)),
                *("" if value is None else value for value in as_record(metrics).values()),
            ]
            for (prompt, plain, patched, metrics), tuned_run in zip(results, last, strict=True)
        ],
    )
    _print(results)
    print(f"\n{tuning}")
    print(f"\nThe pictures: {image.resolve()}\nThe table:    {table.resolve()}")
    print("Try it yourself, with the panel of the WebUI: make playground")


def choose(prompts: list[str], count: int) -> list[str]:
    """Choose `count` of the model's prompts: first the favourites that it knows, then evenly from the rest."""
    first = [prompt for prompt in FAVOURITES if prompt in prompts][:count]
    rest = [prompt for prompt in prompts if prompt not in first]
    more = min(count, len(prompts)) - len(first)
    return first + [rest[i * len(rest) // more] for i in range(more)]


def _in_pairs(items: list) -> list[list]:
    return [items[i : i + 2] for i in range(0, len(items), 2)]


def _print(results: list) -> None:
    rows = [
        [prompt, f"{plain.seconds:.2f}", f"{patched.seconds:.2f}", speed(plain, patched), str(metrics)]
        for prompt, plain, patched, metrics in results
    ]
    seconds = [mean(run.seconds for run in runs) for runs in zip(*((p, o) for _, p, o, _ in results), strict=True)]
    rows.append(["mean", *(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}x", ""])
    print_table(["prompt", "seconds without", "seconds with", "speed", "distance"], rows)
