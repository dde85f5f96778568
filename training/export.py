"""Export the averaged weights of a run in float16, with vocabulary and normalisation, into the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from agentsd.embedded.model import WEIGHTS, read_json, vocabulary_of


def export(run: Path, out: Path) -> None:
    """Write `model.safetensors`, `vocabulary.json` and the normalisation in `config.json` from `full.pt` in `run`."""
    state = torch.load(run / "full.pt", weights_only=False)["ema"]
    save_file({k: v.half().contiguous() for k, v in state.items()}, out / "model.safetensors")
    (out / "vocabulary.json").write_text(json.dumps(vocabulary_of(read_json("prompts.json"))) + "\n")
    config = read_json("config.json")
    config["latents"] = json.loads((run / "norm.json").read_text())
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder of train.py")
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder of the exported files (default: the package's own)"
    )
    export(**vars(parser.parse_args()))
