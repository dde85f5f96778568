"""demo: a contact sheet of the embedded model's pictures with and without agent attention."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from statistics import mean

from ..words import percent
from .commands import SIDE
from .distance import distance
from .files import print_table, save_picture, save_table
from .models import Request, open_model
from .options import config_of
from .runs import Run, draw, record, warm_up
from .sheets import AMPLIFIED, difference, enlarged, sheet
from .tuned import recorded, tuned

# Recognisable at a glance, with distinct shapes and colours
FAVOURITES = ("red apple", "avocado", "sunglasses face", "panda", "rose", "american football", "frog", "rainbow")
# What the tuned pictures are tuned to, and on how many timesteps of the first picture.
TOLERANCE, MOMENTS = 0.01, 4
WITHOUT, WITH, TUNED = "without", "with", "tuned"


def demo(args: argparse.Namespace) -> None:
    """Draw some prompts of the embedded model with and without agent attention; write a sheet and a table."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)
    model = open_model("embedded")
    prompts = choose(model.pipe.prompts, args.prompts)
    requests = [model.complete(Request(prompt, args.seed, args.steps)) for prompt in prompts]
    tuning = tuned(model, recorded(model, requests[0], MOMENTS, args.quiet), TOLERANCE, quiet=args.quiet)
    ways = {WITHOUT: None, WITH: config_of(args.settings), TUNED: tuning.config_for(model.unet)}
    warm_up(model, requests[0], [*ways.values()], args.quiet)
    drawn: list[dict[str, Run]] = []
    for i, request in enumerate(requests):  # in turns, and each way comes first in turn: a machine's pace drifts
        order = [*ways][i % len(ways) :] + [*ways][: i % len(ways)]
        label = f"{request.prompt}, {{}}"
        drawn.append({way: draw(model, request, ways[way], label.format(way), args.quiet) for way in order})

    folder, pictures, captions, rows, said = Path(args.out), [], [], [], []
    for prompt, runs in zip(prompts, drawn, strict=True):
        plain, ours, best = (runs[way] for way in ways)
        apart, tuned_apart = (distance(plain.picture, run.picture) for run in (ours, best))
        pictures.append([plain.picture, ours.picture, difference(plain.picture, ours.picture), best.picture])
        captions.append([prompt, ours.faster(plain), str(apart), f"{best.faster(plain)}, {tuned_apart}"])
        seconds = [round(run.seconds, 4) for run in (plain, ours, best)]
        speeds = [round(plain.seconds / run.seconds, 3) for run in (ours, best)]
        rows.append([prompt, *seconds, *speeds, *apart.record().values()])
        said.append([prompt, f"{plain.seconds:.2f}", f"{ours.seconds:.2f}", ours.faster(plain), str(apart)])
    means = [mean(runs[way].seconds for runs in drawn) for way in (WITHOUT, WITH)]
    said.append(["mean", *(f"{s:.2f}" for s in means), f"{means[0] / means[1]:.2f}x", ""])
    headings = [WITHOUT, "with agent attention", f"difference, {AMPLIFIED}x", f"tuned to {percent(TOLERANCE)}"]
    page = sheet(
        [[enlarged(picture, SIDE // 2) for picture in row] for row in _in_pairs(pictures)],
        columns=headings * min(2, len(pictures)),
        captions=_in_pairs(captions),
        title=f"Agent attention on the embedded model: {args.steps} steps, seed {args.seed}",
    )
    made = record(model, requests[0], args.settings, prompts=list(prompts), tuning=tuning.text)
    image = save_picture(folder / "demo.png", page, made)
    head = ["prompt", *(f"seconds {way}" for way in ways), "speed", "speed tuned", "rmse", "psnr", "ssim"]
    table = save_table(folder / "demo.csv", head, rows)
    print_table(["prompt", "seconds without", "seconds with", "speed", "distance"], said)
    print(f"\n{tuning}")
    print(f"\nThe pictures: {image.resolve()}\nThe table:    {table.resolve()}")
    print("Try it yourself, with the panel of the WebUI: make playground")


def choose(prompts: list[str], count: int) -> list[str]:
    """Choose `count` of the model's prompts: first the favourites that it knows, then evenly from the rest."""
    first = [prompt for prompt in FAVOURITES if prompt in prompts][:count]
    rest = [prompt for prompt in prompts if prompt not in first]
    more = min(count, len(prompts)) - len(first)
    return first + [rest[i * len(rest) // more] for i in range(more)]


def _in_pairs(rows: list[list]) -> list[list]:
    return [[item for row in rows[i : i + 2] for item in row] for i in range(0, len(rows), 2)]
