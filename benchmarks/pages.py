"""Sections of the documentation that programs write, so that pages say what the results say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def fill(page: Path, by: str, sections: Mapping[str, str]) -> None:
    """Write each section into the page, which marks its place; `by` is the program that writes it."""
    page.write_text(filled(page.read_text(encoding="utf-8"), by, sections), encoding="utf-8")


def filled(page: str, by: str, sections: Mapping[str, str]) -> str:
    """The page with each section between its two comments."""
    for name, text in sections.items():
        begin, end = f"<!-- {name}: written by {by} -->", f"<!-- end of {name} -->"
        if not page.count(begin) == page.count(end) == 1:
            raise ValueError(f"the page must hold {begin} and {end} once")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page
