"""Real WebUIs, started once for all tests. AGENTSD_WEBUI and AGENTSD_FORGE name their checkouts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from host import Host
from page import Panel, browser

CHECKPOINTS = ("tinysd1", "tinysd1b", "tinysd2v", "tinysdxl")


def _running(variable: str, kind: str, needed: tuple[str, ...]) -> Iterator[Host]:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name a WebUI checkout")
    models = Path(folder) / "models/Stable-diffusion"
    missing = [name for name in needed if not (models / f"{name}.safetensors").exists()]
    if missing:
        pytest.skip(f"{models} lacks {', '.join(missing)}; tests/webui/README.md says how to make them")
    host = Host(Path(folder).resolve(), kind, "tinysd1.safetensors")
    try:
        host.install()
        host.start()
        yield host
    finally:
        host.stop()
        host.uninstall()


@pytest.fixture(scope="session")
def a1111() -> Iterator[Host]:
    yield from _running("AGENTSD_WEBUI", "a1111", CHECKPOINTS)


@pytest.fixture(scope="module")
def page(a1111: Host) -> Iterator[Any]:
    """AUTOMATIC1111's page, opened once for a file of tests."""
    with browser(a1111.url) as page:
        yield page


@pytest.fixture
def panel(page) -> Panel:
    """The panel of its txt2img tab, as the test before has left it."""
    return Panel(page)


@pytest.fixture(scope="session")
def forge() -> Iterator[Host]:
    yield from _running("AGENTSD_FORGE", "forge", ("tinysd1", "tinysdxl"))
