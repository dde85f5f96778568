"""ComfyUI loads this folder as a node pack. WebUIs and pip know `agentsd` alone."""

from .agentsd.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
