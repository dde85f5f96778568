"""Images and tuning in an AUTOMATIC1111 short of memory, whose U-Net comes to its device for the sampling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host import Host
from test_tune import PLAN, SMALL

from agentsd.settings import infotext


@pytest.fixture(scope="module", params=["--medvram", "--lowvram"])
def saving(a1111: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    """The same checkout, started once more with less memory."""
    host = Host(a1111.root, a1111.kind, a1111.checkpoint, flags=(request.param,))
    try:
        host.start()
        yield host
    finally:
        host.stop()


def test_images_are_made_with_agents(saving: Host):
    off, on = saving.txt2img(), saving.txt2img([{}])
    assert on.pixels != off.pixels
    assert saving.status()["passes"][0]["calls"].keys() - {"untouched"}


def test_the_next_image_is_tuned_on(saving: Host):
    made = saving.txt2img([{"tune": 0.05}], **SMALL)
    assert made.pixels == saving.txt2img(**SMALL).pixels
    assert made.info["extra_generation_params"][infotext.TUNED].startswith(PLAN)
    assert saving.txt2img([{"tuning": "auto", "how_close": 0.05}], **SMALL).infotext.count("tuning=first") == 1
