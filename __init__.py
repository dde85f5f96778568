"""ComfyUI loads this folder as a node pack. WebUIs and pip know `agentsd` alone."""

if __package__:  # pytest imports this file by itself where the folder's name is no Python name
    from .agentsd.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
