"""The node on small transformers of random weights, sampled by a real ComfyUI in its own Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from comfyui_host import OFFLINE, REPOSITORY, python_of

FAMILIES = ("Flux", "SD3")


@pytest.fixture(scope="module")
def results(root):
    script = Path(__file__).with_name("sample_transformers.py")
    command = [python_of(root), str(script), str(REPOSITORY), *FAMILIES]
    done = subprocess.run(command, cwd=root, env={**os.environ, **OFFLINE}, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_node_acts_and_leaves_the_model_alone_and_is_chained_with_who_overrides_attention(results, family):
    found = results[family]
    assert found["off"] == found["original"] == 0
    assert 1e-5 < found["closer"] < found["on"] < 0.1, found["report"]
    assert re.fullmatch(r"Agent Attention, 24×28 tokens of the image: \d+ corrected\.", found["report"])
    assert found["neighbour"] > 0.01
    assert found["with neighbour"] > 1e-5
    assert found["calls with node"], "what is attended to in full is the neighbour's"
    assert max(found["calls with node"]) < 24 * 28
    assert "louder" in found["report with neighbour"]


def test_what_would_be_wrong_is_refused_by_name(results):
    flux, sd3 = (results[family]["refused"] for family in FAMILIES)
    assert sd3.keys() == {"merge"}, "keys without rotary positions may be pooled"
    assert "text stands beside the image" in flux["merge"]
    assert "text stands beside the image" in sd3["merge"]
    assert "rotary positions" in flux["pool"]
