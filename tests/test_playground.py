"""The playground in a browser, with a model of random weights."""

from __future__ import annotations

import re
import threading
import urllib.request

import pytest

pytest.importorskip("gradio", minversion="6", reason="needs gradio 6")
pytest.importorskip("uvicorn", reason="needs uvicorn")

import drawing
from fastapi.testclient import TestClient
from servers import chromium

from agentsd import get_patch
from agentsd.app.kept_tunings import PanelTunings
from agentsd.cli import playground
from agentsd.cli.models import EMBEDDED, Model
from agentsd.settings.schema import DEFAULTS, SETTINGS

ON = {**DEFAULTS, "enabled": True, "until": 1.0}
WAIT = 120_000  # milliseconds; a busy machine is slow to draw a page


@pytest.fixture(scope="module")
def model():
    return Model(EMBEDDED, drawing.stand_in())


def draw(page, prompt="red apple", steps=2, progress=lambda *given, **more: None, **changes):
    """Draw on a page, or on a new one of a model."""
    page = page if isinstance(page, playground.Playground) else playground.Playground(page)
    values = {**ON, **changes}
    return page.draw(prompt, 3, steps, 256, 256, *(values[row.name] for row in SETTINGS), progress=progress)


def test_before_and_after_are_the_models_pictures(model):
    (before, after), timings, status = draw(model)
    assert before.size == after.size == (256, 256)
    expected = model.pipe("red apple", seed=3, steps=2, height=32, width=32)[0]
    assert before.tobytes() == playground._shown(expected).tobytes()
    assert before.tobytes() != after.tobytes()
    assert "PSNR" in timings
    assert "1024 tokens → 64 agents in 3 layers" in status
    assert get_patch(model.unet) is None


def test_it_tunes_with_the_next_picture_and_uses_what_was_tuned(model, every_gain_counts):
    page = playground.Playground(model)
    assert "Nothing is tuned" in PanelTunings(page).results()
    (before, tuned), _, status = draw(page, steps=4, tune=0.5)
    assert "tuned to 50%" in status
    assert before.tobytes() != tuned.tobytes()
    assert "<svg" in PanelTunings(page).results()
    again, _, status = draw(page, steps=4, tuning="auto", how_close="5%")
    assert again[0].tobytes() == before.tobytes()
    assert "tuned, U-Net output within 5%" in status
    assert PanelTunings(page).forget().startswith("1 tuning of ")
    assert "Nothing is tuned" in PanelTunings(page).results()
    assert get_patch(model.unet) is None


@pytest.mark.parametrize(("changes", "at"), [({}, "without"), ({"tune": 0.5}, "method")])
def test_stop_ends_drawing_and_tuning_and_keeps_nothing(model, every_gain_counts, changes, at):
    page = playground.Playground(model)
    pictures, told, _ = draw(page, progress=lambda done, desc: page.stop.set() if at in desc else None, **changes)
    assert pictures is None
    assert "Stopped" in told
    assert "Nothing is tuned" in PanelTunings(page).results()
    assert get_patch(model.unet) is None


def test_switched_off_both_pictures_are_the_same(model):
    for changes in ({"enabled": False}, {"passes": "hires"}):
        (before, after), timings, status = draw(model, **changes)
        assert before.tobytes() == after.tobytes()
        assert "agent attention is off" in timings
        assert status == ""


def test_what_is_wrong_is_told_in_words(model):
    for prompt, changes, message in (
        ("<b>aple", {}, "does not know the word"),
        ("banana", {"since": 0.9, "until": 0.5}, "until must be above since"),
    ):
        pictures, told, _ = draw(model, prompt, **changes)
        assert pictures is None
        assert message in told
        assert "<b>" not in told


def test_the_routes_of_the_panels_script_answer(model):
    client = TestClient(playground.make_app(model))
    data = client.get("/agent-attention/page").json()
    assert [row["name"] for row in data["rows"]] == [row.name for row in SETTINGS]
    assert client.get("/agent-attention/status").json()["run"] >= 0
    values = {**ON, "min_tokens": 0}
    state = {"tab": "txt2img", "values": values, "width": 128, "height": 128, "denoising": 0.7, "hires": None}
    told = client.post("/agent-attention/preview", json=state).json()
    assert "256 tokens → 64 agents in 3 layers" in told["lines"][0]["text"]


def test_it_listens_on_this_machine_only():
    with playground.listening(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with playground.listening(port) as second:
            assert second.getsockname()[1] != port, "a port that is taken is passed over"


# In a browser


@pytest.fixture(scope="module")
def url(model):
    with playground.listening(0) as listener:
        server = playground.make_server(model)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_every_answer_forbids_to_load_anything_from_elsewhere(url):
    for path in ("/", "/agent-attention/status", "/nowhere"):
        try:
            answer = urllib.request.urlopen(url + path)
        except urllib.error.HTTPError as error:
            answer = error
        assert answer.headers["content-security-policy"] == playground.POLICY
    assert not re.search(r"https?:", playground.POLICY)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1400, "height": 1400})
    page.set_default_timeout(WAIT)
    page.problems, page.asked = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    page.wait_for_function("document.querySelector('#txt2img_agent_attention_summary')?.innerText.includes('agents')")
    yield page
    page.close()


def test_a_picture_is_drawn_both_ways_in_the_browser(page, url):
    told = page.inner_text("#txt2img_agent_attention_summary")
    assert "512×512: 4096 tokens → 256 agents in 3 layers" in told
    for name, value in (("width", 256), ("height", 256), ("steps", 2), ("agent_attention_agent_ratio", 0.75)):
        page.fill(f"#txt2img_{name} input[type=number]", str(value))
        page.press(f"#txt2img_{name} input[type=number]", "Enter")
    page.wait_for_function(
        "document.querySelector('#txt2img_agent_attention_summary').innerText.includes('1024 tokens → 256 agents')"
    )
    page.click("#txt2img_generate")
    page.wait_for_selector("#playground_timings table, #playground_timings [role=alert]")
    timings = page.inner_text("#playground_timings")
    assert "without" in timings
    assert "PSNR" in timings
    assert "1024 tokens → 256 agents in 3 layers" in page.inner_text("#txt2img_agent_attention_status")
    page.wait_for_function("document.querySelectorAll('#playground_pictures img').length >= 2")
    sizes = page.evaluate(
        "Promise.all([...document.querySelectorAll('#playground_pictures img')].map(async i =>"
        " (await i.decode(), [i.naturalWidth, i.naturalHeight])))"
    )
    assert sizes[:2] == [[256, 256], [256, 256]]
    page.uncheck("#txt2img_agent_attention-checkbox input")
    page.click("#txt2img_generate")
    page.wait_for_function("document.querySelector('#playground_timings').innerText.includes('agent attention is off')")
    assert page.problems == []
    assert [asked for asked in page.asked if not asked.startswith((url, "data:", "blob:"))] == []


def test_the_panel_is_that_of_the_webui(page):
    assert page.input_value("#txt2img_agent_attention_preset input") == "Balanced"
    page.click("#txt2img_agent_attention_more button")
    for row in SETTINGS:
        if row.name != "enabled":
            # what belongs to one run only is hidden, or folded away
            state = "attached" if row.local else "visible"
            page.wait_for_selector(f"#txt2img_agent_attention_{row.name}", state=state)
    page.uncheck("#txt2img_agent_attention_merge_attn input")
    page.wait_for_function(
        "document.querySelector('#txt2img_agent_attention_summary').innerText.includes('nothing happens')"
    )
