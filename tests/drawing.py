"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
