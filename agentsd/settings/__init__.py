"""User-facing settings: the schema, the presets, the infotext. Imports neither torch, gradio nor a WebUI."""

from .schema import ARGUMENTS, BY_NAME, DEFAULTS, NAMES, SETTINGS, check, from_args, to_config, wants_record

__all__ = ["ARGUMENTS", "BY_NAME", "DEFAULTS", "NAMES", "SETTINGS"]
__all__ += ["check", "from_args", "to_config", "wants_record"]
