"""Python time of the patch's hooks: microseconds that a patched U-Net's call takes beyond an unpatched one's.

    python -m benchmarks.hooks

The U-Nets have the blocks of SD 1.5 and SDXL, and next to no arithmetic: their layers return what they are given. What
a patched call takes longer is the hooks alone, with the patch idle, and answering every self-attention with a method
that does nothing. Processor time; medians of the differences within interleaved rounds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import agentsd
from agentsd.costs import layouts
from agentsd.hosts.single import BasicTransformerBlock
from agentsd.methods import LayerPlan, Method, SelfAttention, register, unregister

SIDE = 8


class _Attention(nn.Module):
    """LDM's call of self-attention, without the attention."""

    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return x


class AttnProcessor2_0:  # agentsd knows diffusers' processors by the names of their classes
    def __call__(self, attn: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states


class _DiffusersAttention(_Attention):
    """diffusers' call: through a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = AttnProcessor2_0()

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, attention_mask=attention_mask)


class _Image(nn.Module):
    """The module around some blocks."""

    def __init__(self, blocks: int, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(attention()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return x


class UNet(nn.Module):
    """Images with as many blocks as those of a layout, and nothing else."""

    def __init__(self, layout: str, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        names = (block.name.rsplit(".transformer_blocks", 1)[0] for block in layouts()[layout].blocks)
        counts: dict[str, int] = {}
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        self.images = nn.ModuleList(_Image(blocks, attention) for blocks in counts.values())

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        for image in self.images:
            x = image(x)
        return x


class Nothing(Method):
    """Answers self-attention with its input."""

    name = "nothing"

    def plan(self, settings: Any, height: int, width: int, r: int) -> LayerPlan:
        return LayerPlan(self.action, height * width, height * width)

    def attend(self, attention: SelfAttention) -> Tensor:
        return attention.x

    def flops(self, plan: LayerPlan, channels: int) -> int:
        return 0


@dataclass(frozen=True)
class Way:
    """Settings to patch with."""

    label: str
    settings: dict[str, Any]


WAYS = (
    Way("idle", {"ratio": 0.0, "agent_source": "grid", "stages": (agentsd.Stage(1.0, None),)}),
    Way("too small a layer", {"ratio": 0.0, "agent_source": "grid", "min_tokens": 10**6}),
    Way("every layer answered", {"method": "nothing", "ratio": 0.0, "max_downsample": 8}),
)


@contextmanager
def method(cls: type[Method]) -> Iterator[None]:
    """Register a method for the length of a `with` block."""
    register(cls)
    try:
        yield
    finally:
        unregister(cls.action)


def added(unet: UNet, way: Way, rounds: int, calls: int = 20) -> float:
    """Processor seconds that a call takes longer when patched: the median over interleaved rounds of `calls` calls."""
    x, t = torch.zeros(1, 1, SIDE, SIDE), torch.tensor([500])

    def seconds() -> float:
        start = time.thread_time()
        for _ in range(calls):
            unet(x, t)
        return (time.thread_time() - start) / calls

    differences = []
    for _ in range(rounds):
        plain = seconds()
        with agentsd.patched(unet, **way.settings):
            unet(x, t)  # plans are made in the first call
            differences.append(seconds() - plain)
            assert not agentsd.get_patch(unet).notes, agentsd.get_patch(unet).notes
    return median(differences)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds of 20 calls (default 50)")
    parser.add_argument(
        "--compiler", action="store_true", help="with torch.compile's modules loaded, as diffusers does"
    )
    options = parser.parse_args(argv)
    if options.compiler:
        importlib.import_module("torch._dynamo")
    loaded = "torch._dynamo" in sys.modules
    print(f"PyTorch {torch.__version__}, {options.rounds} rounds, compiler {'loaded' if loaded else 'not loaded'}\n")
    print("| U-Net | blocks | " + " | ".join(f"{way.label}, µs" for way in WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    with torch.inference_mode(), method(Nothing):
        for name, label, attention in tqdm(
            [
                ("SD 1", "SD 1.5, LDM", _Attention),
                ("SD 1", "SD 1.5, diffusers", _DiffusersAttention),
                ("SDXL", "SDXL, sgm", _Attention),
                ("SDXL", "SDXL, diffusers", _DiffusersAttention),
            ]
        ):
            unet = UNet(name, partial(attention))
            figures = " | ".join(f"{1e6 * added(unet, way, options.rounds):.0f}" for way in WAYS)
            print(f"| {label} | {layouts()[name].layers} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
