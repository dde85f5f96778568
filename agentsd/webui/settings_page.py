"""Our section of the host's settings page, and the log level that it sets. Imports no WebUI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..settings.presets import PRESETS

SECTION = ("agent_attention", "Agent Attention")
PRESET, LEVEL, STATUS_LINE = "agent_attention_preset", "agent_attention_log_level", "agent_attention_status_line"
CLOSENESS, EVEN_IF_SLOWER = "agent_attention_closeness", "agent_attention_even_if_slower"
AS_SAVED = "as saved"
LEVELS = ("warning", "info", "debug")
_HANDLER = "agent attention"
# a single line without tags, since translations match whole texts
_ABOUT = (
    "To change what the panel starts with, set its controls, press Apply in Settings → Defaults and restart the WebUI. "
    "A preset chosen below overrides them each time the page loads; How close, FP32 precision, Minimum tokens and "
    "Partition seed belong to no preset and keep your defaults."
)


def register(opts: Any, option: Callable[..., Any], text: Any = None, category: Any = None) -> None:
    """Add our section to the host's options, by its `OptionInfo`, and its `OptionHTML` and categories if it has any."""
    import gradio as gr

    if category is not None:
        category(*SECTION)
    rows = {
        "agent_attention_about": text(_ABOUT) if text else option(_ABOUT, "", gr.HTML),
        PRESET: option(
            AS_SAVED, "Agent Attention: preset when the page loads", gr.Dropdown, {"choices": [AS_SAVED, *PRESETS]}
        ).info("“as saved” leaves the controls at your defaults"),
        LEVEL: option("info", "Agent Attention: messages in the console", gr.Radio, {"choices": list(LEVELS)}).info(
            "info: a line for each patched pass; debug: also the library's messages; warning: neither"
        ),
        STATUS_LINE: option(True, "Agent Attention: show the last run in the panel").info("also shown in the console"),
        CLOSENESS: option(True, "Agent Attention: say how close attention was to full attention").info(
            "compares 32 tokens of every patched layer in one of five U-Net calls; no pixel depends on it"
        ),
        EVEN_IF_SLOWER: option(False, "Agent Attention: use it even where it was measured to be slower here"),
    }
    for name, row in rows.items():
        row.section, row.category_id = SECTION, SECTION[0]
        opts.add_option(name, row)
    opts.onchange(LEVEL, lambda: set_level(getattr(opts, LEVEL, "info")))


def set_level(level: str) -> None:
    """Send our messages of `level` and above to the console, once each; the library's own only at "debug"."""
    logger = logging.getLogger("agentsd")
    if not any(handler.name == _HANDLER for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.name = _HANDLER
        handler.setFormatter(logging.Formatter("[Agent Attention] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    level = level if level in LEVELS else "info"
    logging.getLogger("agentsd.panel").setLevel(level.upper())
    logger.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
