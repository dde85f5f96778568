"""Our routes of the host's HTTP API, all under /agent-attention."""

from __future__ import annotations

from typing import Any

from fastapi import Body, FastAPI

from agentsd.config import SettingError

from . import compat, measure, readout, session, settings
from .status import STATUS

PREFIX = "/agent-attention"


def add(app: FastAPI) -> None:
    """Add all routes to the host's application."""
    app.add_api_route(f"{PREFIX}/status", status, methods=["GET"])
    app.add_api_route(f"{PREFIX}/readout", page_data, methods=["GET"])
    app.add_api_route(f"{PREFIX}/measure", measure.JOB.as_dict, methods=["GET"])
    app.add_api_route(f"{PREFIX}/measure", begin_measuring, methods=["POST"])
    app.add_api_route(f"{PREFIX}/measure", measure.JOB.cancel, methods=["DELETE"])


def status() -> dict[str, Any]:
    """What became of the last run."""
    return {**STATUS.as_dict(), "first_downsample": compat.current_first_downsample()}


def page_data() -> dict[str, Any]:
    """What the page needs to know."""
    unet = compat.loaded_unet()
    notes = [] if unet is None else readout.advice(compat.is_sd2(), compat.upcasts())
    return readout.page_data(unet, notes)


def begin_measuring(values: dict = Body(...), passes: list = Body(...)) -> dict[str, str]:  # noqa: B008
    """Measure the settings `values` in `passes` (see `measure.tasks`); "error" says why not, or is empty."""
    unet = compat.loaded_unet()
    if unet is None:
        return {"error": "No Stable Diffusion model is loaded."}
    try:
        checked = settings.check(values)
        todo = measure.tasks(checked, passes, lambda values, hires: session.config_on(unet, values, hires=hires))
    except (SettingError, KeyError, TypeError, ValueError) as error:
        return {"error": str(error)}
    return {"error": measure.JOB.start(todo, compat.model_at_rest)}
