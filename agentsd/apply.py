"""The library's face: patch a model, ask for its patch, remove it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from .checks import SettingError, check_names
from .config import SETTINGS, AgentConfig
from .hosts import UnsupportedModelError, find_model, progress_by
from .patching.call import KVContext
from .patching.joint import make_patch
from .patching.patch import Patch, alone, patch_of
from .schedule import Moment
from .tuning.fingerprint import adapters_of
from .tuning.result import Tuning, as_tuning

log = logging.getLogger("agentsd")

Model = TypeVar("Model")


def apply_patch(
    model: Model,
    *reference: Any,
    tuning: Tuning | str | PathLike[str] | None = None,
    progress: Moment | None = None,
    **settings: Any,
) -> Model:
    """Apply agent attention to a Stable Diffusion model, in place, replacing an existing patch; return the model.

    Args:
        model: an LDM or sgm model (with `.model.diffusion_model`), a diffusers pipeline, a U-Net, or a transformer of
            diffusers (SD 3, Flux and others).
        *reference: AgentSD's settings in its order, `ratio` to `merge_mlp`.
        tuning: a result of `agentsd.tune` for this model, its text, or the path of its file. It has settings of its
            own, beside which none may be given.
        progress: maps the U-Net's timestep to the fraction of the diffusion that is done, 0–1; see `progress_of_sigma`.
            None: by the pipeline's scheduler as it is now; without one, timesteps are training steps from 1000 to 0.
            Of a transformer, it is given the share of noise in thousandths, and None is linear in that.
        **settings: the settings of `AgentConfig`, which documents their meanings and ranges.

    Raises, before the model is changed:
        SettingError: a setting is unknown or outside its range.
        OSError: the file of a tuning cannot be read.
        TuningError: the tuning is damaged, or for another model.
        UnsupportedModelError: the model has no transformer blocks, or is a transformer that is not known.
    """
    _make(model, *reference, tuning=tuning, progress=progress, **settings)[1].install()
    return model


def _make(
    model: Any, *reference: Any, tuning: Any = None, progress: Moment | None = None, **settings: Any
) -> tuple[nn.Module, Patch]:
    check_names(settings, SETTINGS)
    names = SETTINGS[: SETTINGS.index("merge_mlp") + 1]
    if len(reference) > len(names):
        raise TypeError(f"settings without a name are {', '.join(names)} in this order, got {reference}")
    unet, config = find_model(model), AgentConfig(*reference, **settings)
    if tuning is not None:
        if given := [name for name in SETTINGS if getattr(config, name) != getattr(AgentConfig, name)]:
            raise SettingError(f"a tuning has settings of its own, got {', '.join(given)} as well")
        made = as_tuning(tuning)
        config = made.config_for(unet)
        if doubts := made.doubts(adapters=adapters_of(unet)):
            log.warning("a tuning is used for what it was not made on: %s", doubts)
    return unet, make_patch(unet, config, progress=progress or progress_by(model, unet))


def patch_unet(
    unet: nn.Module, config: AgentConfig, kv_context: KVContext | None = None, progress: Moment | None = None
) -> Patch:
    """Patch a U-Net or transformer with a config, replacing an existing patch; see `Patch` for the arguments."""
    patch = make_patch(unet, config, kv_context, progress=progress)  # may raise, before anything has been changed
    patch.install()
    return patch


def get_patch(model: Any) -> Patch | None:
    """Return the patch on the model, if any."""
    try:
        return patch_of(find_model(model))
    except UnsupportedModelError:
        return None


def remove_patch(model: Model) -> Model:
    """Remove the patch from the model, if there is one, and return the model."""
    if (patch := get_patch(model)) is not None:
        patch.remove()
    return model


@contextmanager
def patched(model: Model, *args: Any, **settings: Any) -> Iterator[Model]:
    """Patch the model for the length of a `with` block; takes the arguments of `apply_patch`.

    An earlier patch on the model is restored afterwards.
    """
    with alone(*_make(model, *args, **settings)):
        yield model
