"""Host models: their blocks and calls. Each family of U-Nets is one file here; transformers are all in one."""

from .arguments import find_timestep, output_tensor, read_size, read_timestep, read_tokens
from .base import Call, Handler, Seam, UnsupportedModelError, weight_of
from .diffusers import progress_by
from .families import HOSTS, downsamples, example_call
from .sites import Site, find_model, find_sites, find_unet
from .transformers import FAMILIES, JointCall, Transformer, family_of

__all__ = ["HOSTS", "Call", "Handler", "Seam", "Site", "UnsupportedModelError", "downsamples", "example_call"]
__all__ += ["find_sites", "find_timestep", "find_unet", "output_tensor", "progress_by", "read_size", "read_timestep"]
__all__ += ["FAMILIES", "JointCall", "Transformer", "family_of", "find_model", "read_tokens", "weight_of"]
