"""Sections of the documentation that are read off the code: run this to write them; test_release.py holds them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agentsd.cli.parser import make_parser  # noqa: E402
from agentsd.settings.schema import SETTINGS  # noqa: E402
from benchmarks.results import filled, table  # noqa: E402

BY = "tests/pages.py"


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def settings() -> str:
    """The controls, in the order of the panel."""
    rows = []
    for row in sorted((row for row in SETTINGS if row.name != "enabled"), key=lambda row: row.place):
        if row.kind == "choice":
            values = ", ".join(map(str, row.choices))
        else:
            values = {"flag": "on, off", "text": "text"}.get(row.kind) or f"{row.low:g} to {row.high:.15g}"
        default = row.format(row.default) or "empty"
        rows.append((f"**{row.label}**", f"`{row.name}`", cell(f"{values}; {default}"), cell(row.tooltip)))
    lines = table(("control", "in the API", "values; default", "what it does"), rows)
    lines[1] = "|---|---|---|---|"
    return "\n".join(lines)


def options() -> str:
    """The options of each command, without those of agent attention, which all that draw share."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, parser in commands.choices.items():
        rows = [row for action in parser._actions for row in option(action)]
        parts += [f"**`agentsd {name}`**: {cell(parser.description)}", "", *table(("option", "what it does"), rows), ""]
        parts[-len(rows) - 2] = "|---|---|"
    return "\n".join(parts).rstrip()


def option(action: argparse.Action) -> Iterator[tuple[str, str]]:
    """The row of an option; none for help, and for the settings of agent attention."""
    if action.dest in ("help", "debug") or action.dest.startswith("setting_"):
        return
    metavar = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if action.choices:
        metavar = ",".join(map(str, action.choices))
    given = [*action.option_strings[-1:], *([str(metavar)] if metavar and action.nargs != 0 else [])]
    default = str(action.default)
    yield f"`{' '.join(given)}`", cell((action.help or "").replace("%(default)s", default).replace("%%", "%"))


PAGES = {"docs/user.md": {"settings": settings}, "docs/cli.md": {"options": options}}


def made(page: str) -> str:
    """A page with its sections as the code has them now."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return filled(text, BY, {name: write() for name, write in PAGES[page].items()})


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(made(page), encoding="utf-8")
