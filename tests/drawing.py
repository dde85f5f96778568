"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

PROMPTS = ["red apple", "banana", "green frog", "rose"]
SMALL = ["--steps", "2", "--size", "16", "--quiet"]
# agents in the layers of tiny models too, which the defaults leave alone
GRID = ["--method", "agent", "--min-tokens", "0"]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def read_record(path: Path | str) -> dict[str, Any]:
    """Read the settings that a picture carries."""
    with Image.open(path) as picture:
        return json.loads(picture.text["agentsd"])


def stand_in() -> Any:
    """A pipeline as the embedded model's, of random weights, that knows the prompts above."""
    from diffusers import DDIMScheduler
    from tiny_pipelines import tiny_unet

    from agentsd.embedded.model import EmbeddedPipeline, TextEncoder, vocabulary_of

    torch.manual_seed(0)
    text, norm = TextEncoder(vocabulary_of(PROMPTS), 8, 32), {"mean": [0.5] * 4, "std": [0.3] * 4}
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return EmbeddedPipeline(tiny_unet(), scheduler, text, PROMPTS, norm)
