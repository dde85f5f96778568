"""The page's script under node, in a small page of its own: tests/js."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("name", ["panel", "presets", "preview"])
def test_the_script(name: str):
    file = Path(__file__).parent / "js" / f"{name}.test.js"
    done = subprocess.run([NODE, file], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == file.read_text(encoding="utf-8").count('\ntest("') > 0
    assert {one["name"]: one["error"] for one in told if one["error"]} == {}
