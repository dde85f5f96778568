"""A prediction of speed, from counts and published rates, for machines that nothing was measured on.

    seconds = max(Σ matrix FLOPs / rate + Σ attention FLOPs / rate + bytes / bandwidth,  kernels · seconds a launch)

Counted are the FLOPs of `agentsd.costs`, the kernels that a call launches, and the bytes that pass through memory
outside of matrix products and fused attention. A rate is the published peak times the share of it that such kernels
attain. On a card the device works while the host launches, so the slower of the two decides; on a CPU they add up.

It is a model, good to tell from which image size on a method pays, and no measurement: docs/performance.md has the
table, and how far it is from what was measured on a CPU. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .attention.grid import cells
from .config import AgentConfig
from .costs import Estimate, Layout, LevelEstimate, estimate
from .methods import method_of

# Head widths that fused attention has kernels for; others are padded to the next.
_WIDTHS = (32, 64, 96, 128, 192, 256)
# Queries that one block of a fused attention kernel answers.
_QUERIES = 128
# A gain or loss below this share is noise.
NOISE = 0.02


@dataclass(frozen=True)
class Device:
    """A device, as the model sees it. Rates are those that kernels attain, not peaks.

    Attributes:
        name: what people call it.
        matrix: FLOPs a second of matrix products and convolutions.
        attention: FLOPs a second of fused attention.
        memory: bytes a second that pass through its memory.
        weights: bytes a second at which weights are read.
        launch: seconds that the host takes for a kernel.
        units: multiprocessors, which small kernels leave idle; 0 for a CPU, where host and device are one.
    """

    name: str
    matrix: float
    attention: float
    memory: float
    weights: float
    launch: float
    units: int = 0

    def attention_seconds(self, rows: int, heads: int, width: int, queries: int, keys: int) -> float:
        """Seconds of fused attention of `queries` to `keys`, for `rows` of a batch and `heads` of `width` channels."""
        flops = 4 * rows * heads * width * queries * keys
        if not self.units:
            return flops / self.attention
        padded = next((w for w in _WIDTHS if w >= width), width)
        busy = min(1.0, rows * heads * cells(queries, _QUERIES) / self.units)
        return flops / self.attention * (padded / width) / busy


def card(name: str, peak: float, bandwidth: float, units: int, attention: float = 0.5) -> Device:
    """Make a card of published rates.

    Matrix products and convolutions are taken to attain 0.6 of the peak, memory 0.85, and the host to launch a kernel
    in 8 µs, Python included: assumptions.

    Args:
        name: its name.
        peak: FLOPs a second of its tensor cores, float16 with float32 sums, dense.
        bandwidth: bytes a second.
        units: multiprocessors.
        attention: share of the peak that fused attention attains at widths it has a kernel for: half on Ampere and Ada,
            0.35 on Hopper (Dao, arXiv 2307.08691, and Shah et al., arXiv 2407.08608).
    """
    return Device(name, 0.6 * peak, attention * peak, 0.85 * bandwidth, 0.85 * bandwidth, 8e-6, units)


# NVIDIA's white papers and data sheets of GA102 and GA106, AD102 and AD103, A100, H100 and H200.
_RTX_3060, _RTX_4090 = card("RTX 3060", 25.5e12, 360e9, 28), card("RTX 4090", 165e12, 1008e9, 128)
_H100 = card("H100", 989e12, 3350e9, 132, attention=0.35)
# Those that docs/performance.md has tables of.
CARDS = (_RTX_3060, _RTX_4090, _H100)
# By the names that drivers report. A card that is not here is not predicted: a neighbour in name may differ by half.
_BY_NAME = {
    "NVIDIA GeForce RTX 3060": _RTX_3060,
    "NVIDIA GeForce RTX 3080": card("RTX 3080", 59.5e12, 760e9, 68),
    "NVIDIA GeForce RTX 3090": card("RTX 3090", 71e12, 936e9, 82),
    "NVIDIA GeForce RTX 4080": card("RTX 4080", 97.5e12, 717e9, 76),
    "NVIDIA GeForce RTX 4090": _RTX_4090,
    "NVIDIA A100-SXM4-40GB": card("A100", 312e12, 1555e9, 108),
    "NVIDIA A100-PCIE-40GB": card("A100", 312e12, 1555e9, 108),
    "NVIDIA A100-SXM4-80GB": card("A100", 312e12, 2039e9, 108),
    "NVIDIA A100 80GB PCIe": card("A100", 312e12, 1935e9, 108),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": card("H200", 989e12, 4800e9, 132, attention=0.35),
}
# Two cores of an AMD EPYC, bfloat16, by docs/bench: matrix products and attention of one layer (bench-layer.json, 4096
# tokens), seconds an operator of a U-Net with hardly any work (bench-idle.json), weights by the smallest image (64×64).
# Memory is the one rate that was chosen, so that the table fits.
CPU = Device("2 cores of an AMD EPYC", 361e9, 126e9, 20e9, 7e9, 38e-6)


@dataclass(frozen=True)
class Counts:
    """What was counted of an unpatched U-Net beside FLOPs.

    Attributes:
        kernels: kernels of a call.
        elements: elements that pass through memory outside of matrix products and attention, per position of the latent
            and row of the batch.
        parameters: number of weights.
        heads: heads of each self-attention; 0 for as many as are 64 wide.
    """

    kernels: int
    elements: int
    parameters: int
    heads: int = 0


COUNTS = {
    "SD 1": Counts(689, 180_600, 859_520_964, heads=8),
    "SD 2": Counts(689, 180_600, 865_910_724),
    "SDXL": Counts(1855, 323_200, 2_567_463_684),
}


def counts_of(layout: Layout) -> Counts:
    """Return the counts of a known layout, or those of the known one with the nearest number of blocks."""
    known = COUNTS.get(layout.name)
    return known or COUNTS["SDXL" if layout.layers > 40 else "SD 1"]


def seconds(
    device: Device,
    layout: Layout,
    config: AgentConfig | None,
    height: int,
    width: int,
    *,
    rows: int = 2,
    itemsize: int = 2,
    progress: float | None = None,
) -> float:
    """Predict the seconds of one forward pass of a U-Net.

    Args:
        device: the device.
        layout: the U-Net.
        config: the settings; None for an unpatched one.
        height: rows of the latent (image height / 8).
        width: columns of the latent.
        rows: rows of the batch; 2 for cond and uncond.
        itemsize: bytes of an element; 2 for half precision.
        progress: fraction of the diffusion done, 0–1; needed only where settings vary over the diffusion.
    """
    counts, cost = counts_of(layout), estimate(layout, config, height, width, progress)
    layers = [_layer(device, level, counts, rows) for level in cost.levels]
    matrix = rows * (cost.flops_left - sum(level.count * layer.attention_flops for level, layer in _zip(cost, layers)))
    elements = rows * counts.elements * height * width + sum(
        level.count * layer.elements for level, layer in _zip(cost, layers)
    )
    kernels = counts.kernels + sum(level.count * layer.kernels for level, layer in _zip(cost, layers))
    busy = matrix / device.matrix + sum(level.count * layer.seconds for level, layer in _zip(cost, layers))
    busy += itemsize * elements / device.memory + itemsize * counts.parameters / device.weights
    launching = kernels * device.launch
    return max(busy, launching) if device.units else busy + launching


@dataclass(frozen=True)
class _Layer:
    """What self-attention of one layer adds: FLOPs of fused attention for one row, and their seconds for all rows."""

    attention_flops: int
    seconds: float
    elements: float
    kernels: int


def _layer(device: Device, level: LevelEstimate, counts: Counts, rows: int) -> _Layer:
    method, C = method_of(level.plan.action), level.channels
    heads = counts.heads or max(1, C // 64)
    steps = method.steps(level.plan)
    return _Layer(
        sum(4 * queries * keys * C for queries, keys in steps),
        sum(device.attention_seconds(rows, heads, C // heads, *step) for step in steps),
        rows * method.traffic(level.plan) * level.plan.tokens * C,
        method.kernels(level.plan),
    )


def _zip(cost: Estimate, layers: list[_Layer]) -> Iterable[tuple[LevelEstimate, _Layer]]:
    return zip(cost.levels, layers, strict=True)


def speedup(device: Device, layout: Layout, config: AgentConfig, height: int, width: int, **how: float) -> float:
    """Predict how many times as fast a patched forward pass is; arguments as in `seconds`."""
    return seconds(device, layout, None, height, width, **how) / seconds(device, layout, config, height, width, **how)


def device_named(name: str) -> Device | None:
    """Return the device that a driver calls `name`; None if its rates are not known."""
    return _BY_NAME.get(name)


def speedup_of_run(
    device: Device, layout: Layout, config: AgentConfig, height: int, width: int, start: float = 0.0, **how: float
) -> float:
    """Predict how many times as fast a pass is, averaged over timesteps, which is close to that over steps.

    Args:
        device: the device.
        layout: the U-Net.
        config: the settings, with their stages and rules.
        height: rows of the latent.
        width: columns of the latent.
        start: progress at which the pass begins, 0–1: 1 − denoising strength.
        how: `rows` and `itemsize`, as in `seconds`.
    """
    if start >= 1.0:
        return 1.0
    parts = [(until - max(since, start), since) for since, until in config.parts() if until > start]
    taken = sum(
        length * seconds(device, layout, config, height, width, progress=since, **how) for length, since in parts
    )
    return (1.0 - start) * seconds(device, layout, None, height, width, **how) / taken


def pays_from(device: Device, layout: Layout, config: AgentConfig, sides: Iterable[int], **how: float) -> int | None:
    """Predict the smallest side in pixels, out of `sides`, at and above which patching is faster; None if none is."""
    best = None
    for side in sorted(sides, reverse=True):
        if speedup(device, layout, config, side // 8, side // 8, **how) <= 1 + NOISE:
            break
        best = side
    return best
