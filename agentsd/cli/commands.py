"""What the commands do. Each takes the parsed command line."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from PIL.Image import Image
from torch import nn
from tqdm import tqdm

from ..app.kept_tunings import make
from ..app.tuning_chart import chart, standalone
from ..config import AgentConfig
from ..costs import LevelEstimate, estimate
from ..hosts import find_unet
from ..hosts.layout import layout_of
from ..methods import LayerPlan
from ..patching.patch import Patch
from ..settings import to_config
from ..settings.tunings import FIRST
from ..tuning.record import RecordedCall, record_calls
from ..tuning.result import Tuning
from ..tuning.tuner import tune as tune_model
from ..words import percent
from .errors import told
from .models import EMBEDDED, Model, Request, bare_unet, open_model
from .parser import AXES
from .pictures import AMPLIFIED, difference, enlarged, print_table, save_picture, save_table, sheet, target, write_whole
from .runs import COLUMNS, Run, draw, record, warm_up

SIDE = 256  # longer side, in pixels, to which small pictures are enlarged
# Recognisable at a glance, with distinct shapes and colours
FAVOURITES = ("red apple", "avocado", "sunglasses face", "panda", "rose", "american football", "frog", "rainbow")
# What the demo's tuned pictures are tuned to, and on how many timesteps of the first picture
DEMO_TOLERANCE, DEMO_MOMENTS = 0.01, 4
_PROMPTS = {EMBEDDED: ("red apple", "panda")}
_OTHERS = ("a photo of a cat",)
_DISTANCES = ("rmse", "psnr", "ssim")
_DIFFERENCE = f"difference, {AMPLIFIED}x"
GIGA = 1e9
HEAD = ("", "down", "blocks", "channels", "tokens", "queries", "agents", "GFLOPs", "left", "self-attention")


def opened(args: argparse.Namespace, *prompts: str) -> tuple[Any, ...]:
    """Open the model of a command line, and complete its requests, each prompt with another seed."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)  # the notes of the patch are printed below
    model = open_model(args.model, download=args.download, config=args.config, device=args.device, dtype=args.dtype)
    more = (args.steps, args.guidance, args.negative, args.size)
    return model, *(model.complete(Request(prompt, args.seed + i, *more)) for i, prompt in enumerate(prompts))


def generate(args: argparse.Namespace) -> None:
    """Draw one picture."""
    model, request = opened(args, args.prompt)
    values, config = (None, None) if args.off else settings_for(args, model, request)()
    run = draw(model, request, config, request.prompt, args.quiet)
    seconds = {"seconds": round(run.seconds, 3), "unet_seconds": round(run.unet_seconds, 3)}
    made = record(model, request, values, **seconds)
    path = save_picture(target(args.out, request.stem), enlarged(run.picture, SIDE), made)
    print(f"{path}: {run.seconds:.2f} s, {run.unet_seconds:.2f} s of it in {run.calls} calls of the U-Net")
    if args.off:
        print("agent attention: off")
    else:
        run.say_what_was_done()


def compare(args: argparse.Namespace) -> None:
    """Draw a picture with and without agent attention."""
    model, request = opened(args, args.prompt)
    values, config = settings_for(args, model, request)()
    warm_up(model, request, [None, config], args.quiet)
    plain = draw(model, request, None, "without", args.quiet)
    ours = draw(model, request, config, "with", args.quiet, plain)
    shown = (plain.picture, ours.picture, difference(plain.picture, ours.picture))
    columns, captions = ["without", "with agent attention", _DIFFERENCE], [plain.caption, *ours.caption.split("\n")]
    title = f"{request.prompt}, seed {request.seed}, {request.steps} steps"
    page = sheet([[enlarged(picture, SIDE) for picture in shown]], columns, [captions], title)
    seconds = {"without": round(plain.seconds, 3), "with": round(ours.seconds, 3)}
    made = record(model, request, values, seconds=seconds, distance=asdict(ours.apart))
    path = save_picture(target(args.out, f"compare-{request.stem}"), page, made)
    print_table(["", *COLUMNS], [["without", *plain.row], ["with", *ours.row]])
    ours.say_what_was_done()
    print(path)


def sweep(args: argparse.Namespace) -> None:
    """Draw a picture for each combination of two settings' values."""
    model, request = opened(args, args.prompt)
    folder, settings = target(args.out, f"sweep-{request.stem}", ""), settings_for(args, model, request)
    axes = dict(axis for axis in (args.x, args.y) if axis)
    warm_up(model, request, [None, settings()[1]], args.quiet)
    places = product(enumerate(args.y[1] if args.y else [None], 1), enumerate(args.x[1], 1))
    cells = {f"{i:02}-{j:02}": dict(zip(axes, (x, y), strict=False)) for (i, y), (j, x) in places}
    runs: list[Run] = []
    measured, said = [], []
    for name, changes in {"without": {}, **cells}.items():
        values, config = settings(**changes) if changes else (None, None)
        texts = [AXES[axis].format(value) for axis, value in changes.items()] or [name] * len(axes)
        run = draw(model, request, config, ", ".join(texts), args.quiet, runs[0] if runs else None)
        made = record(model, request, values, seconds=round(run.seconds, 3), distance=asdict(run.apart))
        save_picture(folder / f"{name}.png", enlarged(run.picture, SIDE), made)
        figures = [round(run.seconds, 4), round(run.unet_seconds, 4), round(run.speed, 3)]
        measured.append([*texts, *figures, *astuple(run.apart)])
        # save after every cell, so that an interrupted sweep keeps its measurements
        save_table(folder / "sweep.csv", [*axes, "seconds", "unet_seconds", "speed", *_DISTANCES], measured)
        said.append([*texts, *run.row])
        runs.append(run)

    plain, across = runs[0], len(args.x[1])
    rows = [runs[i : i + across] for i in range(1, len(runs), across)]
    captions = [["", *(run.caption for run in row)] for row in rows]
    captions[0][0] = plain.caption
    columns, *labels = [[f"{name} = {AXES[name].format(v)}" for v in values] for name, values in axes.items()]
    made = record(model, request, args.settings, sweep={name: list(values) for name, values in axes.items()})
    differences = partial(difference, plain.picture)
    views: Any = (("sweep", "", lambda picture: picture), ("difference", f", {_DIFFERENCE}", differences))
    for name, what, view in views:
        pictures = [[None, *(enlarged(view(run.picture), SIDE) for run in row)] for row in rows]
        pictures[0][0] = enlarged(plain.picture, SIDE)
        title = f"{request.prompt}, seed {request.seed}, {request.steps} steps, {model.name}{what}"
        save_picture(folder / f"{name}.png", sheet(pictures, ["without", *columns], captions, title, *labels), made)
    print_table([*axes, *COLUMNS], said)
    print(", ".join(str(folder / name) for name in ("sweep.png", "difference.png", "sweep.csv")))


def demo(args: argparse.Namespace) -> None:
    """Draw some prompts of the embedded model without agent attention, with it and tuned: a sheet and a table."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)
    model = open_model(EMBEDDED)
    known = model.pipe.prompts
    prompts = [*dict.fromkeys([*(prompt for prompt in FAVOURITES if prompt in known), *known])][: args.prompts]
    requests = [model.complete(Request(prompt, args.seed, args.steps)) for prompt in prompts]
    calls = recorded(model, requests[0], DEMO_MOMENTS, args.quiet)
    with _progress(args.quiet) as progress:
        tuning = tune_model(model.unet, calls, DEMO_TOLERANCE, progress=progress)
    ways = {"without": None, "with": to_config(args.settings), "tuned": tuning.config_for(model.unet)}
    warm_up(model, requests[0], ways.values(), args.quiet)

    said: list[list[str]] = []
    rows: list[list[Any]] = []
    pictures: list[list[Image]] = [[] for _ in requests[::2]]  # two prompts a line
    captions: list[list[str]] = [[] for _ in requests[::2]]
    for i, request in enumerate(requests):
        # in turns, and each way comes first in turn: a machine's pace drifts
        order, prompt = [*ways][i % len(ways) :] + [*ways][: i % len(ways)], request.prompt
        runs = {way: draw(model, request, ways[way], f"{prompt}, {way}", args.quiet) for way in order}
        plain = runs["without"]
        ours, best = (replace(runs[way], plain=plain) for way in ("with", "tuned"))
        speeds = [f"{run.speed:.2f}x" for run in (ours, best)]
        shown = (plain.picture, ours.picture, difference(plain.picture, ours.picture), best.picture)
        pictures[i // 2] += [enlarged(picture, SIDE // 2) for picture in shown]
        captions[i // 2] += [prompt, speeds[0], str(ours.apart), f"{speeds[1]}, {best.apart}"]
        figures = [round(run.seconds, 4) for run in (plain, ours, best)]
        figures += [round(run.speed, 3) for run in (ours, best)]
        rows.append([prompt, *figures, *astuple(ours.apart)])
        said.append([prompt, f"{plain.seconds:.2f}", f"{ours.seconds:.2f}", speeds[0], str(ours.apart)])
    means = [mean(row[column] for row in rows) for column in (1, 2)]
    said.append(["mean", *(f"{s:.2f}" for s in means), f"{means[0] / means[1]:.2f}x", ""])
    title = f"Agent attention on the embedded model: {requests[0].steps} steps, seed {args.seed}"
    headings = ["without", "with agent attention", _DIFFERENCE, f"tuned to {percent(DEMO_TOLERANCE)}"]
    page = sheet(pictures, headings * min(2, len(requests)), captions, title)
    made = record(model, requests[0], args.settings, prompts=prompts, tuning=tuning.text)
    image = save_picture(Path(args.out, "demo.png"), page, made)
    head = ["prompt", *(f"seconds {way}" for way in ways), "speed", "speed tuned", *_DISTANCES]
    table = save_table(Path(args.out, "demo.csv"), head, rows)
    print_table(["prompt", "seconds without", "seconds with", "speed", "distance"], said)
    print(f"\n{tuning}\n\nThe pictures: {image.resolve()}\nThe table:    {table.resolve()}")
    print("Try it yourself, with the panel of the WebUI: make playground")


def playground(args: argparse.Namespace) -> None:
    from .playground import serve  # needs gradio

    serve(args.port, args.open)


# Tunings


def tune(args: argparse.Namespace) -> None:
    """Tune a model, and write the tuning and its chart."""
    prompts = args.prompt or _PROMPTS.get(args.model, _OTHERS)
    model, *requests = opened(args, *prompts)
    path = target(args.out, "tuning", ".json")
    calls = [call for request in requests for call in recorded(model, request, args.moments, args.quiet)]
    with _progress(args.quiet) as progress:
        given = {"checkpoint": model.name, "of": FIRST, "methods": args.methods, "progress": progress}
        kept = make(model.unet, calls, args.tolerance, **given)
    tuning, drawn = kept.tuning, path.with_suffix(".svg")
    for file, text in ((path, tuning.to_json()), (drawn, standalone(chart(tuning, kept.presets)))):
        write_whole(file, text.encode())
    print(f"{tuning}\n\nThe tuning: {path}\nThe chart:  {drawn}")
    print(f'Use it:     python -m agentsd generate "{prompts[0]}" --model {args.model} --tuning {path}')


def recorded(model: Model, request: Request, moments: int, quiet: bool) -> list[RecordedCall]:
    """Draw a picture without agent attention, and record calls of the U-Net meanwhile."""
    with record_calls(model.unet, moments) as calls:
        draw(model, request, None, f"recording {request.prompt}", quiet)
    return calls


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar; yields what `agentsd.tune` calls."""
    with tqdm(desc="tuning", unit="call", leave=False, disable=quiet) as bar:

        def show(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        yield show


def loaded(path: str, unet: nn.Module) -> tuple[Tuning, AgentConfig]:
    """Load the tuning of a file and its settings for a U-Net; a TuningError says why it cannot be used."""
    with told(f"{path} cannot be read", OSError):
        tuning = Tuning.load(path)
    return tuning, tuning.config_for(unet)


def settings_for(args: argparse.Namespace, model: Model, request: Request) -> Callable[..., tuple[Any, AgentConfig]]:
    """Make a function from changes to a command line's settings to (the settings for a picture's file, the config).

    With a tuning, the settings are its text, and `tolerance` chooses from its frontier; what becomes of it at the size
    of the request is printed.
    """
    if not args.tuning:
        return lambda **changes: ({**args.settings, **changes}, to_config({**args.settings, **changes}))
    tuning, _ = loaded(args.tuning, model.unet)
    if advice := tuning.advice(*(side // model.factor for side in request.size)):
        print(advice)

    def chosen(**tolerance: float) -> tuple[Any, AgentConfig]:
        at = tuning.at(**tolerance) if tolerance else tuning
        return {**args.settings, **tolerance, "tuning": at.text}, at.config_for(model.unet)

    return chosen


# What would be patched


def info(args: argparse.Namespace) -> None:
    """Show what the settings would do to a model's layers, without running it or reading its weights."""
    bare, side, factor = bare_unet(args.model, args.download)
    unet = find_unet(bare)
    layout = layout_of(unet, args.model)
    config = loaded(args.tuning, unet)[1] if args.tuning else to_config(args.settings)
    found = []
    if not args.json:
        print(f"{args.model}: {len(layout.blocks)} transformer blocks")
    for size in args.size or [(side * factor, side * factor)]:
        height, width = latent = [side // factor for side in size]
        costs = {part: estimate(layout, config, height, width, part[0]) for part in config.parts()}
        share = sum((until - since) * cost.share for (since, until), cost in costs.items())
        if args.json:
            parts = [
                {"since": since, "until": until, "flops": cost.flops, "flops_left": cost.flops_left}
                | {"levels": [_as_record(level) for level in cost.levels]}
                for (since, until), cost in costs.items()
            ]
            found.append({"width": size[1], "height": size[0], "latent": latent, "share": share, "parts": parts})
            continue
        print(f"\n{size[1]}×{size[0]} pixels, a latent of {width}×{height}")
        for (since, until), cost in costs.items():
            changed = cost.flops_left != cost.flops or cost.changed
            print(f"\n  {since:.0%} to {until:.0%} of the diffusion:", "" if changed else "nothing is changed")
            print_table(HEAD, [_row(level) for level in cost.levels])
            print(f"  U-Net: {cost.flops / GIGA:.4g} GFLOPs, {cost.flops_left / GIGA:.4g} are left ({cost.share:.1%})")
        print(f"\n  the whole diffusion: {share:.1%} of the unpatched U-Net's FLOPs")
        for since, until in costs if args.layers else ():
            print(f"\n  layers, {since:.0%} to {until:.0%}:")
            for name, plan in Patch(unet, config).explain(height, width, since):
                print(f"    {name}: {'full attention' if plan is None else _what(plan)}")
    if args.json:
        print(json.dumps({"model": args.model, "sizes": found}, indent=1))


def _as_record(level: LevelEstimate) -> dict[str, Any]:
    about = {"downsample": level.downsample, "blocks": level.count, "channels": level.channels}
    plan = {name: getattr(level.plan, name) for name in ("action", "tokens", "queries", "agents", "reason", "note")}
    return {**about, **plan, "flops": level.flops, "flops_left": level.flops_left}


def _row(level: LevelEstimate) -> list[str]:
    plan = level.plan
    numbers = [level.downsample, level.count, level.channels, plan.tokens, plan.queries, plan.agents or "–"]
    flops = [f"{level.count * x / GIGA:.4g}" for x in (level.flops, level.flops_left)]
    return [f"  {level.size[1]}×{level.size[0]}", *map(str, numbers), *flops, _what(plan)]


def _what(plan: LayerPlan) -> str:
    if not plan.acts:
        return f"untouched: {plan.reason}"
    cells = f", cells of {plan.cell[1]}×{plan.cell[0]}" if plan.cell else ""
    return plan.method.phrase + cells + (f" ({plan.note})" if plan.note else "")
