"""The token map: which tokens of the last image were merged, and where its agents sat.

What is drawn is what was used: the clusters are copied while the image is made, where that was asked for, and nothing
is computed again. Imports neither gradio nor the WebUI.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from ..config import MAX_TIMESTEP
from ..merging import Clusters
from ..methods import LayerPlan, method_of
from ..patch import Answer
from ..plan import downsample_of, grid_of

# The control that asks for a record
RECORD = "Record tokens for the map"
# Of each pass one call of the U-Net is kept for every 1/MOMENTS of the diffusion
MOMENTS = 20
SMALLEST, LARGEST = 768, 1536  # longer side of a map, in pixels
FILL = 0.5  # how much of a merged token's colour covers the image
SHADE = 0.35  # how much of the lines between cells covers it


@dataclass(frozen=True)
class Layer:
    """What was done in one layer to the first row of the batch.

    Attributes:
        name: of the block in the U-Net.
        size: (height, width) of its tokens.
        plan: what was done.
        merged: the cluster of each token (N,); None where no token was merged.
        agents: the same for the tokens that agents are made of; None where they are no clusters.
        dst: destination tokens (N_dst,): dst[i] belongs to cluster i; None where there are no clusters.
    """

    name: str
    size: tuple[int, int]
    plan: LayerPlan
    merged: np.ndarray | None = None
    agents: np.ndarray | None = None
    dst: np.ndarray | None = None

    def coloured(self) -> np.ndarray | None:
        """The clusters that the map colours: merged tokens, or what agents are made of where none were merged."""
        return self.agents if self.merged is None else self.merged

    def agent_tokens(self) -> np.ndarray:
        """The tokens at which similarity agents sit, one each: the destination of a cluster, or a token by itself."""
        if self.agents is None or self.dst is None:
            return np.empty(0, dtype=np.int64)
        where = np.empty(self.plan.agents, dtype=np.int64)
        where[self.agents] = np.arange(self.agents.size)
        where[: self.dst.size] = self.dst
        return where


@dataclass
class Call:
    """One call of the U-Net.

    Attributes:
        hires: whether it belongs to the hires pass.
        latent: (height, width) of the latent.
        progress: fraction of the diffusion done, 0–1; None where the U-Net was not told.
        layers: the layers that were changed, in the order of the U-Net.
    """

    hires: bool
    latent: tuple[int, int]
    progress: float | None
    layers: list[Layer] = field(default_factory=list)


class Recording:
    """What a map is drawn from: index lists of one generation, on the CPU.

    Attributes:
        calls: the calls of the U-Net that were kept, in their order.
        image: the image that was made; None before it is there.
        parts: whether the U-Net was called on parts of the latent, as tiles, of which no map can be made.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.image: Image.Image | None = None
        self.parts = False

    def observer(self, hires: bool, latent: tuple[int, int] | None) -> Callable[[Answer], None]:
        """Records one pass; for `agentsd.Patch.observer`.

        Args:
            hires: whether it is the hires pass.
            latent: (height, width) of its latent; None where it is not known.
        """
        kept: set[int | None] = set()
        last: tuple[object, Call | None] = (None, None)

        def observe(answer: Answer) -> None:
            nonlocal last
            if answer.moment is not last[0]:
                last = answer.moment, self._new_call(answer, hires, latent, kept)
            if last[1] is not None:
                last[1].layers.append(_copied(answer))

        return observe

    def _new_call(
        self, answer: Answer, hires: bool, latent: tuple[int, int] | None, kept: set[int | None]
    ) -> Call | None:
        if latent is not None and answer.latent != latent:
            self.parts = True
            return None
        progress = None if answer.timestep is None else (MAX_TIMESTEP - answer.timestep) / MAX_TIMESTEP
        moment = None if progress is None else int(MOMENTS * progress)
        if moment in kept:
            return None
        kept.add(moment)
        self.calls.append(Call(hires, answer.latent, progress))
        return self.calls[-1]


def _copied(answer: Answer) -> Layer:
    matching = answer.matching
    if matching is None:
        return Layer(answer.name, answer.size, answer.plan)
    dst = None if matching.dst is None else matching.dst.cpu().numpy()
    clusters = _first_row(matching.merged), _first_row(matching.agents)
    return Layer(answer.name, answer.size, answer.plan, *clusters, dst)


def _first_row(clusters: Clusters | None) -> np.ndarray | None:
    """The cluster of each token of row 0 (N,), whose clusters are numbered from 0."""
    if clusters is None:
        return None
    small = np.uint16 if clusters.count <= 2**16 else np.int32
    return clusters.index[: clusters.shape[1]].cpu().numpy().astype(small)


# Drawing


@dataclass(frozen=True)
class _Raster:
    """How a grid of tokens lies on a map, in pixels of the map.

    Attributes:
        size: (height, width) of the tokens.
        side: (height, width) of a token.
        origin: (top, left) of the first token, outside the map where the image is a part of what was computed.
        shape: (height, width) of the map.
    """

    size: tuple[int, int]
    side: tuple[float, float]
    origin: tuple[float, float]
    shape: tuple[int, int]

    def places(self, axis: int) -> np.ndarray:
        """The token that each row (axis 0) or column (axis 1) of pixels lies in."""
        middle = np.arange(self.shape[axis]) + 0.5
        return np.clip((middle - self.origin[axis]) // self.side[axis], 0, self.size[axis] - 1).astype(np.int64)

    def middle(self, axis: int, first: float, last: float) -> float:
        """The middle of tokens `first` up to, but without, `last`, as far as they lie on the image."""
        low, high = (self.origin[axis] + edge * self.side[axis] for edge in (first, last))
        return (max(low, 0.0) + min(high, float(self.shape[axis]))) / 2


def _raster(layer: Layer, latent: tuple[int, int], shape: tuple[int, int]) -> _Raster:
    """Where the layer's tokens lie on a map.

    A layer at level d has one token for d × d positions of the latent, the last of which may reach beyond it. An image
    of another aspect ratio than the latent's is its middle: the host crops so between the first and the hires pass.
    """
    scale = max(shape[0] / latent[0], shape[1] / latent[1])
    origin = tuple((side - scale * length) / 2 for side, length in zip(shape, latent, strict=True))
    level = downsample_of(latent, layer.size)
    if grid_of(latent, level) == layer.size:
        side = (scale * level, scale * level)
    else:  # something shrinks the latent inside the U-Net
        side = tuple(scale * length / count for length, count in zip(latent, layer.size, strict=True))
    return _Raster(layer.size, side, origin, shape)


def draw(image: Image.Image, layer: Layer, latent: tuple[int, int]) -> Image.Image:
    """The map of one layer, over the image.

    Tokens of one colour belong to one cluster; those of a cluster of their own stay grey, as the image then is, so that
    no colour is the image's. Dots are agents, or the few keys, and thin lines their cells.

    Args:
        image: the image that was made.
        layer: what was done.
        latent: (height, width) of the latent that the layer belongs to.
    """
    canvas = _canvas(image)
    raster = _raster(layer, latent, (canvas.height, canvas.width))
    rows, columns = raster.places(0), raster.places(1)
    index = layer.coloured()
    pixels = np.asarray(canvas if index is None else canvas.convert("L").convert("RGB"), dtype=np.float32)
    if index is not None:
        pixels = _coloured(pixels, index.reshape(layer.size)[rows][:, columns], index)
    if layer.plan.cell is not None:
        pixels = _with_lines(pixels, rows // layer.plan.cell[0], columns // layer.plan.cell[1])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    _dots(drawn, layer, raster)
    return drawn


def _canvas(image: Image.Image) -> Image.Image:
    """The image in a size at which its tokens can be told apart, and no larger than a page needs."""
    longer = max(image.size)
    factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    size = tuple(max(1, round(factor * side)) for side in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _coloured(pixels: np.ndarray, clusters: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Cover the pixels (H, W, 3) of merged tokens with their cluster's colour; `clusters` is (H, W)."""
    members = np.bincount(index)
    colours = _palette(members.size)
    strength = np.where(members > 1, FILL, 0.0)[clusters]
    strength[_edges(clusters) & (strength > 0)] = 1.0
    return pixels + strength[..., None] * (colours[clusters] - pixels)


def _palette(count: int) -> np.ndarray:
    """(count, 3): strong colours in no order, the same each time."""
    drawn = np.random.default_rng(0).random((count, 3))
    low, high = np.array([0.0, 0.65, 0.75]), np.array([1.0, 1.0, 1.0])
    return 255 * np.array([colorsys.hsv_to_rgb(*colour) for colour in low + (high - low) * drawn], dtype=np.float32)


def _edges(labels: np.ndarray) -> np.ndarray:
    """The pixels whose right or lower neighbour has another label."""
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return edges


def _with_lines(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Darken the lines between cells, given the cell of each row and column of pixels."""
    strength = SHADE * _edges(rows[:, None] * (columns.max() + 1) + columns[None, :])
    return pixels * (1 - strength[..., None])


def _dots(drawn: Image.Image, layer: Layer, raster: _Raster) -> None:
    where = _agent_places(layer, raster)
    radius = max(2.0, 0.3 * min(raster.side))
    brush = ImageDraw.Draw(drawn)
    for y, x in where:
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")


def _agent_places(layer: Layer, raster: _Raster) -> list[tuple[float, float]]:
    """(y, x) of each agent on the map."""
    marks = method_of(layer.plan.action).marks(layer.plan, *layer.size, layer.agent_tokens())
    return [(raster.middle(0, top, bottom), raster.middle(1, left, right)) for top, left, bottom, right in marks]


# Words


def caption(call: Call, number: int) -> str:
    """What the map of layer `number` (from 1) of a call shows, in a few sentences."""
    layer = call.layers[number - 1]
    height, width = layer.size
    progress = "" if call.progress is None else f", {call.progress:.0%} of the diffusion done"
    where = f"{'Hires' if call.hires else 'First'} pass{progress}. Layer {number} of {len(call.layers)} ({layer.name})"
    return f"{where}, {width}×{height} tokens. {' '.join(filter(None, _explained(layer)))}"


def _explained(layer: Layer) -> Iterator[str]:
    plan = layer.plan
    if layer.merged is not None:
        yield (
            f"{plan.tokens} tokens were merged into {plan.queries}: those of one colour into one; those left grey "
            f"stayed by themselves."
        )
    yield method_of(plan.action).caption(plan)
    if layer.merged is None and layer.agents is not None:
        yield "Tokens of one colour were averaged into one agent; a token left grey is one itself."
    if layer.merged is None:
        yield "No token was merged."


@dataclass(frozen=True)
class View:
    """What the panel shows.

    Attributes:
        image: the map; None where there is nothing to show.
        text: what it shows, or why there is nothing.
        call: which of `calls` it is, from 1.
        calls: number of calls to choose from.
        layer: which of `layers` it is, from 1.
        layers: number of layers to choose from.
    """

    image: Image.Image | None
    text: str
    call: int = 1
    calls: int = 1
    layer: int = 1
    layers: int = 1


UNRECORDED = f"No record was kept of the last image's tokens. Tick “{RECORD}”, press Generate, and come back."


def view(recording: Recording | None, call: int, layer: int, outcome: str) -> View:
    """The map of one layer at one call, each counted from 1 and taken into the range that there is.

    Args:
        recording: of the last generation; None where it was not recorded.
        call: which call.
        layer: which of the layers that were changed in it.
        outcome: what became of the last run, in words: the reason where nothing was changed.
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
    chosen = recording.calls[call - 1]
    layers = len(chosen.layers)
    layer = min(max(1, layer), layers)
    drawn = draw(recording.image, chosen.layers[layer - 1], chosen.latent)
    return View(drawn, caption(chosen, layer), call, calls, layer, layers)
