"""The panel in a real AUTOMATIC1111 WebUI under a localisation file: words change, nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from host import Host
from page import Panel, browser, generate, size
from test_browser import ALL, EVERYTHING

from agentsd.settings import infotext
from agentsd.settings.schema import SETTINGS

NAME = "agent-attention-tests"
# letters of their own for every label, as a file for another language has
WORDS = {row.label: f"«{row.label}»" for row in SETTINGS}
BESIDES = {"Preset": "«Preset»", "More settings": "«More»", "Token map": "«Map»"}


@pytest.fixture
def page(a1111: Host) -> Iterator:
    """The same checkout under a localisation file, which it reads when its page is built."""
    file = a1111.root / "localizations" / f"{NAME}.json"
    help_text = {row.help: f"«{row.name}»" for row in SETTINGS}
    file.write_text(json.dumps({**WORDS, **BESIDES, **help_text}))
    try:
        with a1111.options(localization=NAME):
            a1111.reload_ui()
            with browser(a1111.url) as page:
                yield page
    finally:
        file.unlink()
        a1111.reload_ui()


def test_words_are_translated_and_all_else_stays_as_it_is(page, panel: Panel):
    shown = panel.at().inner_text()
    assert [row.name for row in SETTINGS if WORDS[row.label] not in shown] == ["tune"], "which is hidden"
    whole = panel.at().evaluate("e => e.textContent")
    assert all(words in whole for words in BESIDES.values())
    assert panel.at("until").get_attribute("title") == "«until»"
    size(page, 512, 512)
    panel.set("min_tokens", 5000)
    assert "“«Minimum tokens»”" in panel.said("4096 tokens are fewer than the minimum of 5000")
    panel.choose("Paper")
    assert panel.get("agent_source") == "similarity"
    for name, value in EVERYTHING.items():
        panel.set(name, value)
    size(page, 128, 128, steps=4)
    text = generate(page)
    assert infotext.read(text.split(f"{infotext.KEY}: ")[1].split(",")[0]) == ALL
    panel.said("128×128", "status")
