"""What the documentation says of settings and commands is what the code says: `python tests/pages.py` writes it."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="the command line needs diffusers")

import pages

from agentsd.settings.presets import PRESETS


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_are_as_the_code_is(page):
    assert (pages.ROOT / page).read_text(encoding="utf-8") == pages.made(page)


def test_every_preset_is_described():
    text = (pages.ROOT / "docs/user.md").read_text(encoding="utf-8")
    assert not [name for name in PRESETS if f"| {name} |" not in text]
