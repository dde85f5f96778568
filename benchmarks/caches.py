"""Speed and deviation of whole pictures: agent attention, a cache over steps, and both, on the embedded model.

A cache repeats at some steps what it computed before. Two kinds are measured, written here in a few lines so that
nothing but this repository is needed: "deep" computes only the outermost stages of the U-Net at those steps (as
DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858), "step" none of it (the simplest of what TeaCache and EasyCache do).
All runs are interleaved; each round has a prompt of its own.

    python -m benchmarks.caches                    # the table of docs/diffusers.md: some four minutes on two cores
    python -m benchmarks.caches --rounds 1         # a quick look
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import agentsd

PROMPTS = ("red apple", "house", "snail", "rocket")
OURS: Mapping[str, Mapping[str, Any]] = {
    "grid agents 4×4, until .6": {
        "agent_source": "grid",
        "ratio": 0.0,
        "agent_ratio": 0.9375,
        "stages": agentsd.early(0.6),
    },
    "corrected 4×4": {"method": "corrected", "ratio": 0.0, "agent_ratio": 0.9375},
}


def deep_stages(unet: nn.Module) -> list[nn.Module]:
    """All stages of a diffusers U-Net but the outermost ones."""
    return [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]


def reuse(module: nn.Module, every: int) -> Callable[[], None]:
    """Have a module compute in one of `every` calls and repeat its output in the others; returns how to undo it."""
    forward, state = module.forward, {"calls": 0, "output": None}

    def cached(*args: Any, **kwargs: Any) -> Any:
        if state["calls"] % every == 0:
            state["output"] = forward(*args, **kwargs)
        state["calls"] += 1
        return state["output"]

    module.forward = cached
    return lambda: delattr(module, "forward")


@contextmanager
def reusing(modules: list[nn.Module], every: int) -> Iterator[None]:
    """As `reuse`, in a `with` block."""
    undo = [reuse(module, every) for module in modules]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def ways(unet: nn.Module) -> dict[str, Callable[[], Any]]:
    """By name, what to do around a picture."""
    caches = {
        "deep cache, every 2nd": (deep_stages(unet), 2),
        "deep cache, every 3rd": (deep_stages(unet), 3),
        "step cache, every 2nd": ([unet], 2),
    }

    @contextmanager
    def both(cache: tuple[list[nn.Module], int], settings: Mapping[str, Any]) -> Iterator[None]:
        with reusing(*cache), agentsd.patched(unet, **settings):
            yield

    found: dict[str, Callable[[], Any]] = {"nothing": lambda: reusing([], 1)}
    found |= {name: lambda s=settings: agentsd.patched(unet, **s) for name, settings in OURS.items()}
    for name, cache in caches.items():
        found[name] = lambda c=cache: reusing(*c)
        settings = OURS["corrected 4×4"]
        found[f"{name} + corrected 4×4"] = lambda c=cache, s=settings: both(c, s)
    return found


def measure(
    pipe: Any, rounds: int, steps: int, side: int, prompts: Sequence[str] = PROMPTS
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, relative deviation of the final latent) of each round, by way."""
    out: dict[str, list[tuple[float, float]]] = {}
    prompts = (list(prompts) * rounds)[:rounds]
    everything = ways(pipe.unet)
    for around in everything.values():  # warm up
        with around():
            pipe.sample(prompts[0], steps=1, height=side, width=side)
    with tqdm(total=len(prompts) * len(everything), unit="picture") as bar:
        for seed, prompt in enumerate(prompts):
            plain = None
            for name, around in everything.items():
                with around():
                    start = time.perf_counter()
                    latent = pipe.sample(prompt, seed=seed, steps=steps, height=side, width=side)
                    seconds = time.perf_counter() - start
                plain = latent if plain is None else plain
                out.setdefault(name, []).append((seconds, ((latent - plain).norm() / plain.norm()).item()))
                bar.update()
    return out


def markdown(measured: Mapping[str, list[tuple[float, float]]]) -> str:
    """The table. Speed-ups are medians of the rounds' ratios, deviations means."""
    lines = ["| | seconds | speed-up | deviation |", "|---|---|---|---|"]
    plain = [seconds for seconds, _ in measured["nothing"]]
    for name, rows in measured.items():
        ratio = median(p / seconds for p, (seconds, _) in zip(plain, rows, strict=True))
        seconds, deviation = median(s for s, _ in rows), mean(d for _, d in rows)
        lines.append(f"| {name} | {seconds:.1f} | {ratio:.2f}× | {deviation:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pictures of each row (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--side", type=int, default=64, help="height and width of the latent (default: 64)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    from agentsd.embedded import load

    print(markdown(measure(load(), args.rounds, args.steps, args.side)))


if __name__ == "__main__":
    main()
