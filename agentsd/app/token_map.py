"""The token map: which tokens of the last image were merged, where its agents sat, and which cells a window opened.

The map shows the clusters and cells that were actually used: they are copied during generation, if recording is on, and
never recomputed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..attention.corrected import Axis
from ..attention.grid import Grid
from ..attention.merging import Clusters
from ..methods import LayerPlan
from ..patching.call import Answer
from .decision import fraction

RECORD = "Record tokens for the map"  # label of the checkbox that turns on recording
MOMENTS = 20  # in each pass, one U-Net call is kept per 1/MOMENTS of the diffusion
SMALLEST, LARGEST = 768, 1536  # longer side of a map, in pixels
FILL = 0.5  # how much of a merged token's colour covers the image
SHADE = 0.35  # how strongly the lines between cells darken it
OPEN = (255, 140, 0)  # colour of opened cells


@dataclass(frozen=True)
class Layer:
    """Record of one layer, for the first row of the batch."""

    name: str  # of the block in the U-Net
    size: tuple[int, int]  # (height, width) of its tokens
    plan: LayerPlan
    merged: np.ndarray | None = None  # merge cluster of each token (N,); None if no token was merged
    agents: np.ndarray | None = None  # agent cluster of each token (N,); None if agents are no means over clusters
    dst: np.ndarray | None = None  # destination tokens (N_dst,): dst[i] belongs to cluster i; None without clusters
    opened: np.ndarray | None = None  # share of the heads that open a cell (windows, cells); None if none was opened

    def agent_tokens(self) -> np.ndarray:
        """List the token at which each similarity agent sits: the destination of its cluster, or its only token."""
        if self.agents is None or self.dst is None:
            return np.empty(0, dtype=np.int64)
        tokens = np.empty(self.plan.agents, dtype=np.int64)
        tokens[self.agents] = np.arange(self.agents.size)
        tokens[: self.dst.size] = self.dst
        return tokens


@dataclass
class Call:
    """Record of one U-Net call."""

    hires: bool  # whether it belongs to the hires pass
    latent: tuple[int, int]  # (height, width)
    progress: float | None  # fraction of the diffusion done, 0–1; None if the call had no timestep
    layers: list[Layer] = field(default_factory=list)  # the changed ones, in U-Net order


class Recording:
    """Record of one generation, from which maps are drawn: indices on the CPU."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # the recorded U-Net calls, in order
        self.image: Image.Image | None = None  # the generated image, once it exists
        self.parts = False  # whether the U-Net was called on parts of the latent, which cannot be mapped

    def observer(self, hires: bool, latent: tuple[int, int] | None) -> Callable[[Answer], None]:
        """Make a `Patch.observer` that records a pass; `latent` is its (height, width), None if unknown."""
        moments: set[int | None] = set()
        seen, record = None, None

        def observe(answer: Answer) -> None:
            nonlocal seen, record
            if answer.call is not seen:  # a U-Net call has begun
                seen, record, progress = answer.call, None, answer.call.progress
                moment = None if progress is None else int(MOMENTS * progress)
                if latent not in (None, seen.latent):
                    self.parts = True
                elif moment not in moments:
                    moments.add(moment)
                    record = Call(hires, seen.latent, progress)
                    self.calls.append(record)
            if record is not None:
                record.layers.append(_layer_of(answer))

        return observe


def _layer_of(answer: Answer) -> Layer:
    matching, cells = answer.matching, None
    if answer.chosen:
        chosen = torch.cat(answer.chosen, dim=1).cpu().numpy()  # (windows, heads, opened)
        count = answer.plan.agents
        cells = np.stack([np.bincount(each.ravel(), minlength=count) for each in chosen]) / chosen.shape[1]
    if matching is None:
        return Layer(answer.name, answer.size, answer.plan, opened=cells)
    dst = None if matching.dst is None else matching.dst.cpu().numpy()
    clusters = _first_row(matching.merged), _first_row(matching.agents)
    return Layer(answer.name, answer.size, answer.plan, *clusters, dst, cells)


def _first_row(clusters: Clusters | None) -> np.ndarray | None:
    """Copy the cluster of each token of row 0 (N,), whose clusters are numbered from 0."""
    if clusters is None:
        return None
    dtype = np.uint16 if clusters.count <= 2**16 else np.int32
    return clusters.index[: clusters.shape[1]].cpu().numpy().astype(dtype)


# Drawing


def _placed(layer: Layer, latent: tuple[int, int], shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Return where the first token begins along each axis of a map (height, width), and the side of a token, in pixels.

    A layer at level d has one token per d × d positions of the latent; the last one may extend beyond it. An image with
    another aspect ratio than the latent is its middle: the host crops it between the first and the hires pass.
    """
    grid, scale = Grid(*latent), max(shape[0] / latent[0], shape[1] / latent[1])
    level = grid.level_of(layer.size)
    if grid.at(level) == layer.size:
        sides = [float(level), float(level)]
    else:  # something shrinks the latent inside the U-Net
        sides = [length / count for length, count in zip(latent, layer.size, strict=True)]
    return [((shape[axis] - scale * latent[axis]) / 2, scale * sides[axis]) for axis in (0, 1)]


def draw(
    image: Image.Image, layer: Layer, latent: tuple[int, int], place: Sequence[float] | None = None
) -> Image.Image:
    """Draw the map of one layer over the image.

    Tokens of one colour belong to one cluster; unclustered tokens stay grey, and so does the image underneath, so that
    no colour comes from it. Dots are agents, or sampled keys; thin lines bound their cells. `latent` is the
    (height, width) of that which the layer belongs to. At a `place` (x, y) of the map, in pixels, the window is
    outlined, and the cells that it opens are tinted.
    """
    longer = max(image.size)  # tokens are to be distinguishable, on a page that is no larger than needed
    factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    sides = [max(1, round(factor * side)) for side in image.size]
    canvas = image.convert("RGB").resize(sides, Image.Resampling.LANCZOS)
    shape = canvas.height, canvas.width
    axes = list(zip(shape, layer.size, _placed(layer, latent, shape), strict=True))
    rows, columns = (  # the token of each row and column of pixels
        np.clip((np.arange(n) + 0.5 - origin) // side, 0, count - 1).astype(int) for n, count, (origin, side) in axes
    )
    rows = rows[:, None]
    index = layer.agents if layer.merged is None else layer.merged
    pixels: np.ndarray = np.asarray(canvas if index is None else canvas.convert("L").convert("RGB"), dtype=np.float32)
    if index is not None:
        pixels = _coloured(pixels, index.reshape(layer.size)[rows, columns], index)
    if layer.plan.cell is not None:
        y, x = map(Axis, layer.size, layer.plan.cell)
        cells = rows // y.cell * x.cells + columns // x.cell
        pixels = pixels * (1 - SHADE * _edges(cells)[..., None])
        if place is not None and layer.opened is not None:
            windows = rows // y.tile * x.windows + columns // x.tile
            window = windows[tuple(int(np.clip(at, 0, n - 1)) for at, n in zip(place[::-1], shape, strict=True))]
            tint = np.maximum(FILL * layer.opened[window][cells], _edges(windows == window))
            pixels = pixels + tint[..., None] * (np.array(OPEN) - pixels)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    radius, brush = max(2.0, 0.3 * min(side for _, _, (_, side) in axes)), ImageDraw.Draw(picture)
    for top, left, *ends in layer.plan.method.marks(layer.plan, *layer.size, layer.agent_tokens().tolist()):
        y0, x0 = (  # the middle of what lies on the image
            (max(origin + first * side, 0) + min(origin + last * side, n)) / 2
            for first, last, (n, _, (origin, side)) in zip((top, left), ends, axes, strict=True)
        )
        brush.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill="white", outline="black")
    return picture


def _coloured(pixels: np.ndarray, clusters: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Cover the pixels (H, W, 3) of merged tokens with their cluster's colour; `clusters` is (H, W)."""
    members = np.bincount(index)
    colours = _palette(members.size)
    strength = np.where(members > 1, FILL, 0.0)[clusters]
    strength[_edges(clusters) & (strength > 0)] = 1.0
    return pixels + strength[..., None] * (colours[clusters] - pixels)


def _palette(count: int) -> np.ndarray:
    """Draw saturated colours at random, the same each time: (count, 3)."""
    draws = np.random.default_rng(0).random((count, 3))
    low, high = np.array([0.0, 0.65, 0.75]), np.array([1.0, 1.0, 1.0])
    return 255 * np.array([colorsys.hsv_to_rgb(*colour) for colour in low + (high - low) * draws], dtype=np.float32)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels whose right or lower neighbour has another label."""
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return edges


# Words

_PARTS = {"input": "down", "down": "down", "middle": "middle", "mid": "middle", "output": "up", "up": "up"}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def caption(call: Call, number: int, place: Sequence[float] | None = None) -> str:
    """Describe the map of layer `number` (from 1) of a call, or of a `place` there, in a few sentences."""
    layer = call.layers[number - 1]
    plan, merged = layer.plan, layer.merged is not None
    averaged = not merged and layer.agents is not None
    progress = "" if call.progress is None else f", {fraction(call.progress)} of the diffusion done"
    which = "Click on a window to see which." if place is None else "Tinted: those of the outlined window."
    told = [f"{'Hires' if call.hires else 'First'} pass{progress}. Layer {number} of {len(call.layers)}:"]
    told.append(f"{place_of(call, number)}, {Grid(*layer.size)} tokens.")
    if merged:
        told.append(f"{plan.tokens} tokens were merged into {plan.queries}: those of one colour into one; those left")
        told.append("grey stayed by themselves.")
    told.append(plan.method.caption(plan))
    if layer.opened is not None:
        told.append(which)
    if averaged:
        told.append("Tokens of one colour were averaged into one agent; a token left grey is one itself.")
    if not merged:
        told.append("No token was merged.")
    return " ".join(filter(None, told))


def place_of(call: Call, number: int) -> str:
    """Say where layer `number` (from 1) of a call is in the U-Net, such as "down 1, first of two"."""
    places = []
    for layer in call.layers:
        part = _PARTS.get(layer.name.partition("_")[0], layer.name)
        level = Grid(*call.latent).level_of(layer.size).bit_length()
        places.append(part if part in ("middle", layer.name) else f"{part} {level}")
    own = places[number - 1]
    count, nth = places.count(own), places[:number].count(own)
    if count == 1:
        return own
    if count > len(_NUMBERS):
        return f"{own}, number {nth} of {count}"
    return f"{own}, {_ORDINALS[nth - 1]} of {_NUMBERS[count - 1]}"


@dataclass(frozen=True)
class View:
    """Contents of the panel's token map."""

    image: Image.Image | None  # the map; None if there is nothing to show
    text: str  # caption of the map, or the reason why there is none
    block: str = ""  # name of the layer's block in the U-Net
    call: int = 1  # number of the call shown, from 1 to `calls`
    calls: int = 1
    layer: int = 1  # number of the layer shown, from 1 to `layers`
    layers: int = 1


UNRECORDED = f"No record was kept of the last image's tokens. Tick “{RECORD}”, press Generate, and come back."
FOREIGN = "This image was made by another page or the API."


def view(
    recording: Recording | None,
    call: int,
    layer: int,
    outcome: str,
    foreign: bool = False,
    place: Sequence[float] | None = None,
) -> View:
    """Show the map of one layer at one call; both numbers count from 1 and are clamped to the available range.

    `outcome` is the status line of the last run, which gives the reason if nothing was changed; `foreign` says that
    somebody else made the image than the one who looks at the map; `place` is where that one clicked: see `draw`.
    """
    if recording is None:
        return View(None, UNRECORDED)
    if recording.image is None:
        return View(None, f"The last run ended without an image. {outcome}".strip())
    if not recording.calls:
        why = "The U-Net was called on parts of the image, of which no map can be made." if recording.parts else outcome
        return View(None, f"There is nothing to show. {why}".strip())
    calls = len(recording.calls)
    call = min(max(1, call), calls)
    record = recording.calls[call - 1]
    layers = len(record.layers)
    layer = min(max(1, layer), layers)
    shown = record.layers[layer - 1]
    text = f"{FOREIGN} " * foreign + caption(record, layer, place)
    return View(draw(recording.image, shown, record.latent, place), text, shown.name, call, calls, layer, layers)
