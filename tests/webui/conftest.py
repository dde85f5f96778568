"""Real WebUIs, started once for all tests. Variables name their checkouts; without its variable a WebUI is skipped."""

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

# the variable of each WebUI, and the models that its tests need; it is started with the first
CHECKOUTS = {
    "a1111": ("AGENTSD_WEBUI", ("tinysd1", "tinysd1b", "tinysd2v", "tinysdxl")),
    "forge": ("AGENTSD_FORGE", ("tinysd1", "tinysdxl")),
    "reforge": ("AGENTSD_REFORGE", ("tinysd1",)),
    "sdnext": ("AGENTSD_SDNEXT", ("tiny-sd",)),
}


def _running(kind: str) -> Iterator[Host]:
    variable, needed = CHECKOUTS[kind]
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name a WebUI checkout")
    host = Host(Path(folder).resolve(), kind, needed[0])
    missing = [name for name in needed if not host.has(name)]
    if missing:
        pytest.skip(f"{host.models} lacks {', '.join(missing)}; tests/webui/README.md says how to make them")
    try:
        host.install()
        with host.running():
            yield host
    finally:
        host.uninstall()


@pytest.fixture(scope="session")
def a1111() -> Iterator[Host]:
    yield from _running("a1111")


@pytest.fixture(scope="session", params=["forge", "reforge"])
def forge(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Forge and its fork, one after the other."""
    yield from _running(request.param)


@pytest.fixture(scope="session")
def sdnext() -> Iterator[Host]:
    yield from _running("sdnext")


@pytest.fixture
def leaves_no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the WebUI that the test uses; see `Host.no_trace`."""
    name = next(name for name in ("a1111", "forge", "sdnext") if name in request.fixturenames)
    with request.getfixturevalue(name).no_trace():
        yield


@pytest.fixture(scope="module")
def page(a1111: Host) -> Iterator[Any]:
    """AUTOMATIC1111's page, opened once for a file of tests."""
    with browser(a1111.url) as page:
        yield page


@pytest.fixture
def panel(page) -> Panel:
    """The panel of its txt2img tab, opened."""
    panel = Panel(page)
    panel.open()
    return panel
