"""The token map: which tokens of the last image were merged, and where its agents sat.

The map shows the clusters that were actually used: they are copied during generation, if recording is on, and never
recomputed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from ..attention.grid import Grid
from ..attention.merging import Clusters
from ..methods import LayerPlan
from ..patching.call import Answer
from .decision import fraction

# Label of the checkbox that turns on recording
RECORD = "Record tokens for the map"
# In each pass, one U-Net call is kept per 1/MOMENTS of the diffusion
MOMENTS = 20
SMALLEST, LARGEST = 768, 1536  # longer side of a map, in pixels
FILL = 0.5  # how much of a merged token's colour covers the image
SHADE = 0.35  # how strongly the lines between cells darken it


@dataclass(frozen=True)
class Layer:
    """Record of one layer, for the first row of the batch."""

    name: str  # of the block in the U-Net
    size: tuple[int, int]  # (height, width) of its tokens
    plan: LayerPlan
    merged: np.ndarray | None = None  # merge cluster of each token (N,); None if no token was merged
    agents: np.ndarray | None = None  # agent cluster of each token (N,); None if agents are no means over clusters
    dst: np.ndarray | None = None  # destination tokens (N_dst,): dst[i] belongs to cluster i; None without clusters

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

        def begun(answer: Answer) -> Call | None:
            """Record the U-Net call that has begun, unless its moment is recorded."""
            if latent is not None and answer.latent != latent:
                self.parts = True
                return None
            progress = answer.call.progress
            moment = None if progress is None else int(MOMENTS * progress)
            if moment in moments:
                return None
            moments.add(moment)
            self.calls.append(Call(hires, answer.latent, progress))
            return self.calls[-1]

        def observe(answer: Answer) -> None:
            nonlocal seen, record
            if answer.call is not seen:
                seen, record = answer.call, begun(answer)
            if record is not None:
                record.layers.append(_layer_of(answer))

        return observe


def _layer_of(answer: Answer) -> Layer:
    matching = answer.matching
    if matching is None:
        return Layer(answer.name, answer.size, answer.plan)
    dst = None if matching.dst is None else matching.dst.cpu().numpy()
    clusters = _first_row(matching.merged), _first_row(matching.agents)
    return Layer(answer.name, answer.size, answer.plan, *clusters, dst)


def _first_row(clusters: Clusters | None) -> np.ndarray | None:
    """Copy the cluster of each token of row 0 (N,), whose clusters are numbered from 0."""
    if clusters is None:
        return None
    dtype = np.uint16 if clusters.count <= 2**16 else np.int32
    return clusters.index[: clusters.shape[1]].cpu().numpy().astype(dtype)


# Drawing


@dataclass(frozen=True)
class _Raster:
    """Placement of a token grid on a map, in pixels of the map."""

    size: tuple[int, int]  # (height, width) of the grid in tokens
    side: tuple[float, ...]  # (height, width) of a token
    origin: tuple[float, ...]  # (top, left) of the first token; outside the map if the image is a crop
    shape: tuple[int, int]  # (height, width) of the map

    def places(self, axis: int) -> np.ndarray:
        """Return the token row (axis 0) or column (axis 1) of each row or column of pixels."""
        middle = np.arange(self.shape[axis]) + 0.5
        return np.clip((middle - self.origin[axis]) // self.side[axis], 0, self.size[axis] - 1).astype(np.int64)

    def middle(self, axis: int, first: float, last: float) -> float:
        """Return the middle of tokens `first` to `last`, excluding `last`, as far as they lie on the image."""
        low, high = (self.origin[axis] + edge * self.side[axis] for edge in (first, last))
        return (max(low, 0.0) + min(high, float(self.shape[axis]))) / 2


def _raster(layer: Layer, latent: tuple[int, int], shape: tuple[int, int]) -> _Raster:
    """Place the layer's tokens on a map.

    A layer at level d has one token per d × d positions of the latent; the last one may extend beyond it. An image with
    another aspect ratio than the latent is its middle: the host crops it between the first and the hires pass.
    """
    scale = max(shape[0] / latent[0], shape[1] / latent[1])
    origin = tuple((side - scale * length) / 2 for side, length in zip(shape, latent, strict=True))
    level = Grid(*latent).level_of(layer.size)
    if Grid(*latent).at(level) == layer.size:
        side: tuple[float, ...] = (scale * level, scale * level)
    else:  # something shrinks the latent inside the U-Net
        side = tuple(scale * length / count for length, count in zip(latent, layer.size, strict=True))
    return _Raster(layer.size, side, origin, shape)


def draw(image: Image.Image, layer: Layer, latent: tuple[int, int]) -> Image.Image:
    """Draw the map of one layer over the image.

    Tokens of one colour belong to one cluster; unclustered tokens stay grey, and so does the image underneath, so that
    no colour comes from it. Dots are agents, or sampled keys; thin lines bound their cells. `latent` is the
    (height, width) of that which the layer belongs to.
    """
    longer = max(image.size)  # tokens are to be distinguishable, on a page that is no larger than needed
    factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    canvas = image.convert("RGB").resize(
        [max(1, round(factor * side)) for side in image.size], Image.Resampling.LANCZOS
    )
    raster = _raster(layer, latent, (canvas.height, canvas.width))
    rows, columns = raster.places(0), raster.places(1)
    index = layer.agents if layer.merged is None else layer.merged
    pixels: np.ndarray = np.asarray(canvas if index is None else canvas.convert("L").convert("RGB"), dtype=np.float32)
    if index is not None:
        pixels = _coloured(pixels, index.reshape(layer.size)[rows][:, columns], index)
    if layer.plan.cell is not None:
        rows, columns = rows // layer.plan.cell[0], columns // layer.plan.cell[1]
        lines = _edges(rows[:, None] * (columns.max() + 1) + columns[None, :])
        pixels = pixels * (1 - SHADE * lines[..., None])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    radius, brush = max(2.0, 0.3 * min(raster.side)), ImageDraw.Draw(picture)
    for top, left, bottom, right in layer.plan.method.marks(layer.plan, *layer.size, layer.agent_tokens().tolist()):
        y, x = raster.middle(0, top, bottom), raster.middle(1, left, right)
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
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


def caption(call: Call, number: int) -> str:
    """Describe the map of layer `number` (from 1) of a call in a few sentences."""
    layer = call.layers[number - 1]
    plan, (height, width) = layer.plan, layer.size
    progress = "" if call.progress is None else f", {fraction(call.progress)} of the diffusion done"
    told = [
        f"{'Hires' if call.hires else 'First'} pass{progress}. Layer {number} of {len(call.layers)}: "
        f"{place(call, number)}, {width}×{height} tokens."
    ]
    if layer.merged is not None:
        told.append(
            f"{plan.tokens} tokens were merged into {plan.queries}: those of one colour into one; those left grey "
            f"stayed by themselves."
        )
    told.append(plan.method.caption(plan))
    if layer.merged is None and layer.agents is not None:
        told.append("Tokens of one colour were averaged into one agent; a token left grey is one itself.")
    if layer.merged is None:
        told.append("No token was merged.")
    return " ".join(filter(None, told))


def place(call: Call, number: int) -> str:
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


def view(recording: Recording | None, call: int, layer: int, outcome: str, foreign: bool = False) -> View:
    """Show the map of one layer at one call; both numbers count from 1 and are clamped to the available range.

    `outcome` is the status line of the last run, which gives the reason if nothing was changed; `foreign` says that
    somebody else made the image than the one who looks at the map.
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
    text = f"{FOREIGN} {caption(record, layer)}" if foreign else caption(record, layer)
    return View(draw(recording.image, shown, record.latent), text, shown.name, call, calls, layer, layers)
