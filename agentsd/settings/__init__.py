"""User-facing settings: the table, the presets, the infotext. Imports neither torch, gradio nor a WebUI."""

from .table import ARGUMENTS, BY_NAME, DEFAULTS, NAMES, SETTINGS, Row, check, from_args, to_config, wants_record

__all__ = [
    "ARGUMENTS",
    "BY_NAME",
    "DEFAULTS",
    "NAMES",
    "SETTINGS",
    "Row",
    "check",
    "from_args",
    "to_config",
    "wants_record",
]
