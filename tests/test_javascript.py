"""The page's script under node, in a small page of its own: tests/js."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")
FILES = sorted(Path(__file__).parent.joinpath("js").glob("*.test.js"))
CASES = [
    (file, name)
    for file in FILES
    for name in re.findall(r'^test\("(.+)", async', file.read_text(encoding="utf-8"), re.MULTILINE)
]

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


@functools.cache
def outcomes(file: Path) -> dict[str, str]:
    """What went wrong in each of the file's tests; empty where nothing did."""
    done = subprocess.run([NODE, file], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["name"]: one["error"] for one in told}


@pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{file.name}: {name}" for file, name in CASES])
def test_the_script(file: Path, name: str):
    error = outcomes(file)[name]
    assert not error, error


def test_no_test_is_overlooked():
    assert {file.name: len(outcomes(file)) for file in FILES} == {
        file.name: sum(other == file for other, _ in CASES) for file in FILES
    }
