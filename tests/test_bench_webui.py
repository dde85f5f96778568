"""The WebUI benchmark on a stand-in for the WebUI: rounds, options that are restored, and images that failed."""

from __future__ import annotations

import base64
import io
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from benchmarks import webui

ACTED = {"calls": {"agents": 5, "untouched": 11}, "notes": {}, "obstacles": []}
WORDS = ["--steps", "3", "--hires", "0"]


def png(grey: int) -> str:
    """A picture as the WebUI answers it."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Stub:
    """A WebUI that records its requests."""

    def __init__(self, status: dict[str, Any] = ACTED) -> None:
        self.images: list[tuple[dict, dict]] = []
        self.set: dict[str, Any] = {"sd_model_checkpoint": "a checkpoint", webui.OPTIMIZATION: "Automatic"}
        self.status = status

    def call(self, path: str, body: Any = None) -> Any:
        if path.endswith("/txt2img"):
            self.images.append((body, dict(self.set)))
            on = body["alwayson_scripts"][webui.SCRIPT]["args"][0]["enabled"]
            return {"images": [png(90 if on else 100)]}
        return {"passes": [self.status]} if path.endswith("/status") else self.set

    @contextmanager
    def options(self, **wanted: Any):
        before, self.set = self.set, {**self.set, **wanted}
        yield
        self.set = before


def test_each_way_is_made_in_each_round_and_reaches_the_page(monkeypatch, tmp_path):
    stub, page = Stub(), tmp_path / "page.md"
    page.write_text("<!-- webui: written by benchmarks.webui -->\n<!-- end of webui -->\n")
    monkeypatch.setattr(webui, "WebUI", lambda url: stub)
    monkeypatch.setattr(webui, "PAGE", page)
    webui.main([*WORDS, "--ways", "host", "grid", "--rounds", "2", "--publish"])
    made = stub.images[2:]  # the first two warm up
    agents = [body["alwayson_scripts"][webui.SCRIPT]["args"][0] for body, _ in made]
    assert [bool(settings["enabled"]) for settings in agents] == [False, False, True, False, True, False]
    assert [options["token_merging_ratio"] for _, options in made] == [0, 0.5, 0, 0.5, 0, 0]
    assert {options[webui.OPTIMIZATION] for _, options in made} == {webui.FUSED}
    assert stub.set[webui.OPTIMIZATION] == "Automatic"
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| 512")]
    assert [(row[1], row[-1]) for row in rows] == [
        ("off", "0 |"),
        ("the host's token merging, .5", "0 |"),
        ("grid agents, 4×4 cells", "0.1 |"),
    ]
    assert all(row[4].count(",") == 1 for row in rows), "two rounds"


@pytest.mark.parametrize(
    ("status", "why"),
    [({**ACTED, "calls": {"untouched": 16}}, "did nothing"), ({**ACTED, "notes": {"a mask": 1}}, "stood down")],
)
def test_an_image_without_agents_is_no_result(monkeypatch, status, why):
    monkeypatch.setattr(webui, "WebUI", lambda url: Stub(status))
    with pytest.raises(RuntimeError, match=why):
        webui.main([*WORDS, "--rounds", "1"])
