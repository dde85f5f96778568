"""Our section of the host's settings page, and what it says about the console.

Imports gradio, and no WebUI: the host's options are handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from .presets import PRESETS

SECTION = ("agent_attention", "Agent Attention")
PRESET, LEVEL, STATUS_LINE = "agent_attention_preset", "agent_attention_log_level", "agent_attention_status_line"
AS_SAVED = "as saved"
LEVELS = ("warning", "info", "debug")
_HANDLER = "agent attention"


def register(opts: Any, option: Callable[..., Any]) -> None:
    """Add our options to the host's.

    Args:
        opts: the host's options.
        option: makes one (`modules.shared.OptionInfo`).
    """
    choices = {"choices": [AS_SAVED, *PRESETS]}
    rows = {
        PRESET: option(AS_SAVED, "Agent Attention: preset when the page loads", gr.Dropdown, choices, section=SECTION),
        LEVEL: option(
            "info", "Agent Attention: messages in the console", gr.Radio, {"choices": list(LEVELS)}, section=SECTION
        ),
        STATUS_LINE: option(True, "Agent Attention: show the last run in the panel", section=SECTION),
    }
    for name, row in rows.items():
        opts.add_option(name, row)
    opts.onchange(LEVEL, lambda: set_level(getattr(opts, LEVEL, "info")))


def set_level(level: str) -> None:
    """Send our messages of `level` and above to the console, once, whatever the host does with its own.

    The library's own messages repeat at every pass, and come only at "debug".
    """
    logger = logging.getLogger("agentsd")
    if not any(handler.name == _HANDLER for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.name = _HANDLER
        handler.setFormatter(logging.Formatter("[Agent Attention] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    level = level if level in LEVELS else "info"
    logging.getLogger("agentsd.webui").setLevel(level.upper())
    logger.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
