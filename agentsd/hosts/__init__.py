"""Host models: their blocks and calls. Each family of U-Nets is one file here; transformers are all in one."""

from .arguments import find_timestep, output_tensor, read_size, read_timestep, read_tokens
from .base import Call, Handler, Seam, UnsupportedModelError, weight_of
from .sites import Site, downsamples, find_model, find_sites, find_unet
from .transformers import FAMILIES, JointCall, Transformer, family_of, progress_by, read_call

__all__ = ["FAMILIES", "Call", "Handler", "JointCall", "Seam", "Site", "Transformer", "UnsupportedModelError"]
__all__ += ["downsamples", "family_of", "find_model", "find_sites", "find_timestep", "find_unet", "output_tensor"]
__all__ += ["progress_by", "read_call", "read_size", "read_timestep", "read_tokens", "weight_of"]
