"""The WebUI benchmark on a stand-in for the WebUI: rounds, resuming, and images that failed."""

from __future__ import annotations

import base64
import io
import json
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from benchmarks import webui

ACTED = {"calls": {"agents": 5, "untouched": 11}, "notes": {}, "obstacles": [], "pace": {"patched": 1.0}}


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


def run(monkeypatch, stub: Stub, *words: str) -> int:
    monkeypatch.setattr(webui, "WebUI", lambda url: stub)
    return webui.main(list(words))


def test_each_way_is_made_in_each_round(monkeypatch, tmp_path):
    stub = Stub()
    words = ["--steps", "3", "--hires", "0", "--ways", "off", "host", "grid", "--out", str(tmp_path / "webui")]
    run(monkeypatch, stub, *words, "--rounds", "2")
    made = stub.images[2:]  # the first two warm up
    agents = [body["alwayson_scripts"][webui.SCRIPT]["args"][0] for body, _ in made]
    assert [bool(settings["enabled"]) for settings in agents] == [False, False, True, False, True, False]
    assert [options["token_merging_ratio"] for _, options in made] == [0, 0.5, 0, 0.5, 0, 0]
    assert {options[webui.OPTIMIZATION] for _, options in made} == {webui.FUSED}
    assert stub.set[webui.OPTIMIZATION] == "Automatic"
    deviations = json.loads((tmp_path / "webui.json").read_text())["images"][0]["deviations"]
    assert deviations == pytest.approx({"off": 0.0, "host": 0.0, "grid": 0.1})


def test_latents_are_compared_by_one_image_more(monkeypatch, tmp_path):
    stub = Stub()
    stub.set[webui.DECODER] = "Full"
    words = ["--steps", "3", "--hires", "0", "--rounds", "1", "--out", str(tmp_path / "webui"), "--ways", "off", "grid"]
    run(monkeypatch, stub, *words, "--latents")
    assert [options[webui.DECODER] for _, options in stub.images] == 4 * ["Full"] + 2 * [webui.LINEAR]
    assert stub.set[webui.DECODER] == "Full"
    latents = json.loads((tmp_path / "webui.json").read_text())["images"][0]["latents"]
    # of 100 and 90 in 0…255, which is −1…1
    assert latents == pytest.approx({"off": 0.0, "grid": 10 / 27.5})
    page = tmp_path / "page.md"
    page.write_text("<!-- webui: written by benchmarks.webui -->\n<!-- end of webui -->\n")
    monkeypatch.setattr(webui, "PAGE", page)
    run(monkeypatch, stub, *words, "--latents", "--resume", "--publish")
    assert len(stub.images) == 6
    assert "grid agents, 4×4 cells" in page.read_text()
    assert len({line.count("|") for line in (tmp_path / "webui.md").read_text().splitlines() if "|" in line}) == 1


def test_only_what_is_missing_is_made(monkeypatch, tmp_path):
    words = ["--steps", "3", "--hires", "0", "--out", str(tmp_path / "webui"), "--ways", "off"]
    run(monkeypatch, Stub(), *words, "host", "--rounds", "1")
    stub = Stub()
    run(monkeypatch, stub, *words, "grid", "--rounds", "2", "--resume")
    assert len(stub.images) == 2 + 3
    rounds = json.loads((tmp_path / "webui.json").read_text())["images"][0]["rounds"]
    assert [set(seconds) for seconds in rounds] == [{"off", "host", "grid"}, {"off", "grid"}]
    assert "the host's token merging" in (tmp_path / "webui.md").read_text()


@pytest.mark.parametrize(
    ("status", "why"),
    [({**ACTED, "calls": {"untouched": 16}}, "did nothing"), ({**ACTED, "notes": {"a mask": 1}}, "stood down")],
)
def test_an_image_without_agents_is_no_result(monkeypatch, tmp_path, status, why):
    words = ["--steps", "3", "--hires", "0", "--rounds", "1", "--out", str(tmp_path / "webui")]
    with pytest.raises(RuntimeError, match=why):
        run(monkeypatch, Stub(status), *words)


def test_another_checkpoint_is_not_resumed(monkeypatch, tmp_path, capsys):
    words = ["--steps", "3", "--hires", "0", "--rounds", "1", "--out", str(tmp_path / "webui")]
    run(monkeypatch, Stub(), *words)
    other = Stub()
    other.set["sd_model_checkpoint"] = "another"
    with pytest.raises(SystemExit):
        run(monkeypatch, other, *words, "--resume")
    assert "a checkpoint" in capsys.readouterr().err
