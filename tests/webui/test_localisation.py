"""The panel in a real AUTOMATIC1111 WebUI under a localisation file: words change, nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from host import Host
from page import SECONDS, Panel, browser, generate, number, size
from test_browser import ALL, CHANGED

from agentsd.panel.controls import element_id
from agentsd.settings import infotext
from agentsd.settings.schema import SETTINGS

NAME = "agent-attention-tests"
# letters of their own for every label, as a file for another language has
WORDS = {row.label: f"«{row.label}»" for row in SETTINGS}
BESIDES = {"Preset": "«Preset»", "More settings": "«More»", "Token map": "«Map»"}


@pytest.fixture(scope="module")
def localised(a1111: Host) -> Iterator[Host]:
    """The same checkout under a localisation file, which it reads when its page is built."""
    file = a1111.root / "localizations" / f"{NAME}.json"
    help_text = {row.help: f"«{row.name}»" for row in SETTINGS}
    file.write_text(json.dumps({**WORDS, **BESIDES, **help_text}))
    try:
        with a1111.options(localization=NAME):
            a1111.reload_ui()
            yield a1111
    finally:
        file.unlink()
        a1111.reload_ui()


@pytest.fixture(scope="module")
def page(localised: Host):
    with browser(localised.url) as page:
        yield page


def test_every_label_is_translated(page, panel: Panel):
    panel.open()
    shown = page.locator(f"#{element_id('txt2img')}").inner_text()
    for row in SETTINGS:
        if row.name != "tune":  # hidden
            assert WORDS[row.label] in shown, row.name
    for words in BESIDES.values():
        assert words in page.locator(f"#{element_id('txt2img')}").evaluate("e => e.textContent"), words


def test_help_and_sentences_name_the_translated_labels(page, panel: Panel):
    panel.open()
    size(page, 512, 512)
    panel.set("min_tokens", 5000)
    assert "“«Minimum tokens»”" in panel.said("4096 tokens are fewer than the minimum of 5000")
    panel.set("min_tokens", 0)
    assert page.locator(f"#{element_id('txt2img', 'until')}").first.get_attribute("title") == "«until»"


def test_presets_generation_and_infotext_stay_as_they_are(page, panel: Panel):
    panel.open()
    panel.choose("Paper")
    assert panel.get("agent_source") == "similarity"
    for name, value in CHANGED.items():
        if name != "enabled":
            panel.set(name, value)
    size(page, 128, 128)
    number(page, "txt2img_steps", 2)
    text = generate(page)
    assert infotext.read(text.split(f"{infotext.KEY}: ")[1].split(",")[0]) == ALL
    page.wait_for_timeout(SECONDS)
    assert "128×128" in panel.text("status")
