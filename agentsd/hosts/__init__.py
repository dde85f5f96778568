"""Host models: their U-Nets, blocks and calls. Each family of models is one file of this folder."""

from __future__ import annotations

from .arguments import find_timestep, output_tensor, read_size, read_timestep, read_tokens
from .base import Call, ExampleCall, Handler, Host, Seam, UnsupportedModelError, is_block, weight_of
from .families import HOSTS, downsamples, example_call, host_of
from .sites import Site, find_sites, find_unet

__all__ = [
    "HOSTS",
    "Call",
    "ExampleCall",
    "Handler",
    "Host",
    "Seam",
    "Site",
    "UnsupportedModelError",
    "downsamples",
    "example_call",
    "find_sites",
    "find_timestep",
    "find_unet",
    "host_of",
    "is_block",
    "output_tensor",
    "read_size",
    "read_timestep",
    "read_tokens",
    "weight_of",
]
