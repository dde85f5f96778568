"""generate, compare, sweep, demo, tune and info."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL.Image import Image
from torch import nn
from tqdm import tqdm

from ..app.kept_tunings import PresetPoint
from ..app.tuning_chart import chart, standalone
from ..checks import SettingError
from ..config import AgentConfig
from ..costs import Layout, LevelEstimate, estimate, share_of_run
from ..hosts import find_unet
from ..hosts.layout import layout_of
from ..methods import LayerPlan
from ..patching.patch import Patch
from ..settings import check, to_config
from ..settings.presets import PRESETS
from ..tuning.record import RecordedCall, record_calls
from ..tuning.replay import compare as compare_configs
from ..tuning.result import Tuning, TuningError
from ..tuning.tuner import tune as tune_model
from ..words import percent
from .errors import CommandError
from .models import EMBEDDED, Model, Request, bare_unet, open_model
from .options import AXES, TOLERANCE
from .pictures import (
    AMPLIFIED,
    Distance,
    difference,
    distance,
    enlarged,
    print_table,
    save_picture,
    save_table,
    sheet,
    target,
    write_whole,
)
from .runs import Run, draw, infotext_of, record, warm_up

SIDE = 256  # longer side, in pixels, to which small pictures are enlarged
# Recognisable at a glance, with distinct shapes and colours
FAVOURITES = ("red apple", "avocado", "sunglasses face", "panda", "rose", "american football", "frog", "rainbow")
# What the demo's tuned pictures are tuned to, and on how many timesteps of the first picture
DEMO_TOLERANCE, DEMO_MOMENTS = 0.01, 4
# Presets that are compared with the tuning; those for a hires pass or another model say nothing here.
_COMPARED = ("Fast", "Balanced", "Faithful")
_PROMPTS = {EMBEDDED: ("red apple", "panda")}
_OTHERS = ("a photo of a cat",)
GIGA = 1e9
HEAD = ("", "down", "blocks", "channels", "tokens", "queries", "agents", "GFLOPs", "left", "self-attention")
_TOLD = ("action", "tokens", "queries", "agents", "reason", "note")


def opened(args: argparse.Namespace, *prompts: str) -> tuple[Any, ...]:
    """Open the model of a command line, and complete its requests, each prompt with another seed."""
    logging.getLogger("agentsd").setLevel(logging.WARNING)  # the notes of the patch are printed below
    model = open_model(args.model, download=args.download, config=args.config, device=args.device, dtype=args.dtype)
    more = (args.steps, args.guidance, args.negative, args.size)
    return model, *(model.complete(Request(prompt, args.seed + i, *more)) for i, prompt in enumerate(prompts))


def generate(args: argparse.Namespace) -> None:
    """Draw one picture."""
    model, request = opened(args, args.prompt)
    values, config = settings_for(args, model, request)()
    run = draw(model, request, None if args.off else config, request.prompt, args.quiet)
    seconds = {"seconds": round(run.seconds, 3), "unet_seconds": round(run.unet_seconds, 3)}
    made = record(model, request, None if args.off else values, **seconds)
    path = save_picture(target(args.out, request.stem), enlarged(run.picture, SIDE), made, infotext_of(made))
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
    path = save_picture(target(args.out, f"compare-{request.stem}"), page, made, infotext_of(made))
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
    model, request = opened(args, args.prompt)
    folder = target(args.out, f"sweep-{request.stem}", "")
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
        captions = [["", *map(caption, row)] for row in rows]
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
    tuning = tuned(model, recorded(model, requests[0], DEMO_MOMENTS, args.quiet), DEMO_TOLERANCE, quiet=args.quiet)
    ways = {"without": None, "with": to_config(args.settings), "tuned": tuning.config_for(model.unet)}
    warm_up(model, requests[0], ways.values(), args.quiet)

    pictures, captions, said = [], [], []
    rows: list[list[Any]] = []
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
    headings = ["without", "with agent attention", f"difference, {AMPLIFIED}x", f"tuned to {percent(DEMO_TOLERANCE)}"]
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


# Tunings


def tune(args: argparse.Namespace) -> None:
    """Tune a model, and write the tuning and its chart."""
    prompts = args.prompt or _PROMPTS.get(args.model, _OTHERS)
    model, *requests = opened(args, *prompts)
    path = target(args.out, "tuning", ".json")
    calls = [call for request in requests for call in recorded(model, request, args.moments, args.quiet)]
    tuning = tuned(model, calls, args.tolerance, args.methods, args.quiet)
    configs = {name: to_config(check({"enabled": True, **PRESETS[name]})) for name in _COMPARED}
    with _progress("comparing presets", args.quiet) as progress:
        found = compare_configs(model.unet, calls[:: len(prompts)], configs, progress=progress)
    points = [PresetPoint(name, one.deviation, 1 / one.time) for name, one in found.items()]
    drawn = path.with_suffix(".svg")
    for file, text in ((path, tuning.to_json()), (drawn, standalone(chart(tuning, points)))):
        write_whole(file, text.encode())
    print(tuning)
    print(f"\nThe tuning: {path}\nThe chart:  {drawn}")
    print(f'Use it:     python -m agentsd generate "{prompts[0]}" --model {args.model} --tuning {path}')


def recorded(model: Model, request: Request, moments: int, quiet: bool) -> list[RecordedCall]:
    """Draw a picture without agent attention, and record calls of the U-Net meanwhile."""
    with record_calls(model.unet, moments) as calls:
        draw(model, request, None, f"recording {request.prompt}", quiet)
    return calls


def tuned(
    model: Model, calls: list[RecordedCall], tolerance: float, methods: Any = None, quiet: bool = False
) -> Tuning:
    """Tune a model under a progress bar."""
    with _progress("tuning", quiet) as progress:
        try:
            return tune_model(model.unet, calls, tolerance, methods=methods, progress=progress)
        except SettingError as error:
            raise CommandError(str(error)) from error


@contextmanager
def _progress(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar; yields what `agentsd.tune` calls."""
    with tqdm(desc=label, unit="call", leave=False, disable=quiet) as bar:

        def show(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        yield show


def loaded(path: str, unet: nn.Module) -> Tuning:
    """Load the tuning of a file for a U-Net; a CommandError says why it cannot be used."""
    try:
        tuning = Tuning.load(path)
        tuning.config_for(unet)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except TuningError as error:
        raise CommandError(str(error)) from error
    return tuning


def settings_for(
    args: argparse.Namespace, model: Model, request: Request
) -> Callable[..., tuple[dict[str, Any], AgentConfig]]:
    """Make a function from changes to a command line's settings to (the settings for a picture's file, the config).

    With a tuning, the settings are its text, and `tolerance` chooses from its frontier; what becomes of it at the size
    of the request is printed.
    """
    if not args.tuning:
        return lambda **changes: ({**args.settings, **changes}, to_config({**args.settings, **changes}))
    tuning = loaded(args.tuning, model.unet)
    if advice := tuning.advice(*(side // model.factor for side in request.size)):
        print(advice)

    def chosen(**changes: Any) -> tuple[dict[str, Any], AgentConfig]:
        at = tuning.at(changes[TOLERANCE.name]) if changes else tuning
        return {**args.settings, **changes, "tuning": at.text}, at.config_for(model.unet)

    return chosen


# What would be patched


def info(args: argparse.Namespace) -> None:
    """Show what the settings would do to a model's layers, without running it or reading its weights."""
    bare, side, factor = bare_unet(args.model, args.download)
    unet = find_unet(bare)
    layout = layout_of(unet, args.model)
    config = loaded(args.tuning, unet).config_for(unet) if args.tuning else to_config(args.settings)
    sizes = args.size or [(side * factor, side * factor)]
    if args.json:
        found = [_as_record(layout, config, size, factor) for size in sizes]
        print(json.dumps({"model": args.model, "sizes": found}, indent=1))
        return
    print(f"{args.model}: {len(layout.blocks)} transformer blocks")
    for size in sizes:
        height, width = (side // factor for side in size)
        print(f"\n{size[1]}×{size[0]} pixels, a latent of {width}×{height}")
        for since, until in config.parts():
            cost = estimate(layout, config, height, width, since)
            changed = cost.flops_left != cost.flops or cost.layers
            print(f"\n  {since:.0%} to {until:.0%} of the diffusion:", "" if changed else "nothing is changed")
            print_table(HEAD, [_row(level) for level in cost.levels])
            print(f"  U-Net: {cost.flops / GIGA:.4g} GFLOPs, {cost.flops_left / GIGA:.4g} are left ({cost.share:.1%})")
        share = share_of_run(layout, config, height, width)
        print(f"\n  the whole diffusion: {share:.1%} of the unpatched U-Net's FLOPs")
        for since, until in config.parts() if args.layers else ():
            print(f"\n  layers, {since:.0%} to {until:.0%}:")
            for name, plan in Patch(unet, config).explain(height, width, since):
                print(f"    {name}: {'full attention' if plan is None else _what(plan)}")


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


def _as_record(layout: Layout, config: AgentConfig, size: tuple[int, int], factor: int) -> dict[str, Any]:
    height, width = (side // factor for side in size)
    parts: list[dict[str, Any]] = []
    for since, until in config.parts():
        cost = estimate(layout, config, height, width, since)
        parts.append({"since": since, "until": until, "flops": cost.flops, "flops_left": cost.flops_left, "levels": []})
        for level in cost.levels:
            about = {"downsample": level.downsample, "blocks": level.count, "channels": level.channels}
            plan = {name: getattr(level.plan, name) for name in _TOLD}
            parts[-1]["levels"].append({**about, **plan, "flops": level.flops, "flops_left": level.flops_left})
    share = share_of_run(layout, config, height, width)
    return {"width": size[1], "height": size[0], "latent": [height, width], "share": share, "parts": parts}
