"""A small text-to-image model that ships with the library; needs diffusers, safetensors and pillow."""

from agentsd.embedded.model import EmbeddedPipeline, load

__all__ = ["EmbeddedPipeline", "load"]
