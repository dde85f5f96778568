"""Our routes in the host's HTTP API, all under /agent-attention and behind the login of the host's own page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from fastapi import Body, FastAPI, HTTPException

from ..app.decision import Hint, Program, SamplingPass
from ..app.last_run import STATUS
from ..app.preview import page_data, preview, sentence
from ..attention.grid import Grid
from ..checks import Setting, SettingError, check_names, checked_sequence, reject
from ..settings import tunings

PREFIX = "/agent-attention"
SMALLEST, LARGEST = 64, 4096  # sides of an image in pixels


def _whole(name: str, default: int | None, low: int, high: int) -> Setting:
    return Setting(name, "whole", default, low=low, high=high)


# The page's state beside our controls: the host's that determine the passes, and those of its hires pass
_PAGE = (
    Setting("tab", "text", "txt2img", high=7),
    _whole("width", None, SMALLEST, LARGEST),
    _whole("height", None, SMALLEST, LARGEST),
    _whole("steps", 20, 1, 1000),
    _whole("batch_size", 1, 1, 1000),
    Setting("denoising", "number", 1.0),
    Setting("sampler", "text", "", high=100),
    Setting("scheduler", "text", "", high=100),
)
_HIRES = (
    Setting("scale", "number", 2.0, low=0.1, high=64),
    _whole("resize_x", 0, 0, LARGEST),
    _whole("resize_y", 0, 0, LARGEST),
    _whole("steps", 0, 0, 1000),
    Setting("checkpoint", "text", "", high=500),
)


def _checked(given: Any, rows: Sequence[Setting], *others: str) -> dict[str, Any]:
    """Check a part of a body, of these rows and others that are checked elsewhere."""
    if not isinstance(given, Mapping):
        raise reject("body", given, "a mapping")
    check_names(given, [*(row.name for row in rows), *others])
    return {row.name: row.check(given.get(row.name, row.default)) for row in rows}


def hires_size(width: int, height: int, scale: float, resize_x: int, resize_y: int) -> tuple[int, int]:
    """Compute the (width, height) of the hires pass from the WebUI's sliders, as the WebUI does."""
    if not resize_x and not resize_y:
        return int(width * scale), int(height * scale)
    return resize_x or resize_y * width // height, resize_y or resize_x * height // width


def passes_of(page: Mapping[str, Any], hires: Mapping[str, Any] | None, host: Program) -> list[SamplingPass]:
    """List the sampling passes of the image that would be generated, of checked parts of a body."""
    schedule, other = host.schedule(page["sampler"], page["scheduler"]), host.other_checkpoint()

    def made(of: str, width: int, height: int, checkpoint: str = "", steps: int = 0) -> SamplingPass:
        moments = host.moments(of, page["steps"], steps, page["denoising"], schedule)
        return SamplingPass(Grid.of_pixels(height, width), of, moments, checkpoint or other)

    size = page["width"], page["height"]
    if page["tab"] == "img2img" or hires is None:
        return [made(tunings.IMG2IMG if page["tab"] == "img2img" else tunings.FIRST, *size)]
    larger = hires_size(*size, hires["scale"], hires["resize_x"], hires["resize_y"])
    for name, side in zip(("width", "height"), larger, strict=True):
        _whole(f"{name} of the hires pass", None, SMALLEST, LARGEST).check(side)
    return [made(tunings.FIRST, *size), made(tunings.HIRES, *larger, hires["checkpoint"], hires["steps"])]


def last_run(task: Optional[str] = None) -> Any:  # noqa: UP045
    """Return the status of the last run, or of the host's request `task`."""
    return STATUS.of(task)


class Routes:
    """Handlers of the routes; `host` is the program that shows the panel."""

    def __init__(self, host: Program) -> None:
        self.host = host

    def preview(self, body: Any = Body(...)) -> dict[str, Any]:  # noqa: B008
        """Preview the settings; see `preview.preview`. A bad body is answered with 422 and a sentence."""
        try:
            page = _checked(body, _PAGE, "values", "hires", "overrides")
            hires = None if body.get("hires") is None else _checked(body["hires"], _HIRES)
            overrides = checked_sequence("overrides", body.get("overrides", ()), str, "a list of texts")
            host = self.host.with_options(overrides[:200])
            passes = passes_of(page, hires, host)
            if not isinstance(body.get("values"), Mapping):
                raise reject("values", body.get("values"), "a mapping")
        except SettingError as error:
            raise HTTPException(status_code=422, detail=sentence(Hint(str(error)))) from error
        return preview(body["values"], passes, 2 * page["batch_size"], host)  # cond and uncond of each image

    def add(self, app: FastAPI) -> None:
        """Add all routes to the host's application."""
        # gradio's own /config checks the cookie if a login is required
        config = (route for route in app.routes if getattr(route, "path", "") == "/config")
        login = next((list(route.dependencies) for route in config), [])
        for name, answer in (("page", page_data), ("status", last_run)):
            app.add_api_route(f"{PREFIX}/{name}", answer, dependencies=login)
        app.add_api_route(f"{PREFIX}/preview", self.preview, methods=["POST"], dependencies=login)
