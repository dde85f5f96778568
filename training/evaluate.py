"""Retrieval accuracy: for how many prompts is the nearest training picture the prompt's own?

The distance is the root mean square difference of the RGB values in [0, 1], over white, at 64×64 pixels (see
`EmbeddedPipeline.nearest`). With --out the pictures are saved as one sheet, in the order of the prompts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from agentsd.embedded import load

COLUMNS = 10


def evaluate(steps: int, guidance: float, seed: int, batch: int, out: Path | None, threads: int) -> None:
    """Print the accuracy over all prompts, and the mean distance to the nearest picture."""
    torch.set_num_threads(threads)
    pipe = load()
    parts, start = [], time.perf_counter()
    for k in tqdm(range(0, len(pipe.prompts), batch)):
        parts.append(pipe.sample(pipe.prompts[k : k + batch], seed=seed + k, steps=steps, guidance=guidance))
    latents = torch.cat(parts)
    seconds = time.perf_counter() - start
    index, distance = pipe.nearest(latents)
    right = index == torch.arange(len(index))
    print(f"{int(right.sum())} of {len(index)} prompts retrieved; mean distance to the nearest {distance.mean():.3f}")
    pace = f"{seconds / len(index):.2f} s per picture in batches of {batch}, {threads} threads"
    print(f"{steps} steps, guidance {guidance}, seeds from {seed}; {pace}")
    missed = (~right).nonzero().flatten().tolist()
    print("missed:", ", ".join(f"{pipe.prompts[k]} -> {pipe.prompts[index[k]]}" for k in missed))
    if out is not None:
        sheet(pipe.decode(latents)).save(out)


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Put pictures of one size on one sheet, ten in a row."""
    w, h = pictures[0].size
    whole = Image.new("RGB", (COLUMNS * w, -(-len(pictures) // COLUMNS) * h), "white")
    for k, picture in enumerate(pictures):
        whole.paste(picture, (k % COLUMNS * w, k // COLUMNS * h))
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps (20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt; each has its own (0)")
    parser.add_argument("--batch", type=int, default=10, help="pictures made at once (10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--out", type=Path, help="PNG for the sheet of all pictures")
    evaluate(**vars(parser.parse_args()))
