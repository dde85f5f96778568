"""Our routes in the host's HTTP API, all under /agent-attention and behind the login of the host's own page."""

from __future__ import annotations

from typing import Any, Optional

from fastapi import Body, FastAPI, HTTPException
from pydantic import VERSION, BaseModel, Field, ValidationError

from ..app.decision import Program, SamplingPass
from ..app.last_run import STATUS
from ..app.preview import page_data, preview
from ..attention.grid import Grid
from ..settings import tunings

PREFIX = "/agent-attention"
SMALLEST, LARGEST = 64, 4096  # sides of an image in pixels
MOST_STEPS = 1000
LONGEST = 60  # characters of a value to repeat in an error message
_PYDANTIC_1 = VERSION.startswith("1.")


def hires_size(width: int, height: int, scale: float, resize_x: int, resize_y: int) -> tuple[int, int]:
    """Compute the (width, height) of the hires pass from the WebUI's sliders, as the WebUI does."""
    if not resize_x and not resize_y:
        return int(width * scale), int(height * scale)
    if not resize_y:
        return resize_x, resize_x * height // width
    if not resize_x:
        return resize_y * width // height, resize_y
    return resize_x, resize_y


class HiresSliders(BaseModel, extra="forbid"):
    """The host's controls of the hires pass."""

    scale: float = Field(2.0, ge=0.1, le=64)
    resize_x: int = Field(0, ge=0, le=LARGEST)
    resize_y: int = Field(0, ge=0, le=LARGEST)
    steps: int = Field(0, ge=0, le=MOST_STEPS)
    checkpoint: str = Field("", max_length=500)


class PanelState(BaseModel, extra="forbid"):
    """State of the page: our controls by name, and the host's controls that determine the passes."""

    # pydantic 1 and Python 3.9 do not support "X | None" here
    tab: str = Field("txt2img", max_length=7)
    values: dict[str, Any]
    width: int = Field(..., ge=SMALLEST, le=LARGEST)
    height: int = Field(..., ge=SMALLEST, le=LARGEST)
    steps: int = Field(20, ge=1, le=MOST_STEPS)
    batch_size: int = Field(1, ge=1, le=1000)
    denoising: float = Field(1.0, ge=0.0, le=1.0)
    sampler: str = Field("", max_length=100)
    scheduler: str = Field("", max_length=100)
    hires: Optional[HiresSliders] = None  # noqa: UP045
    overrides: list[str] = Field([], max_length=200)

    def passes(self, host: Program) -> list[SamplingPass]:
        """List the sampling passes of the image that would be generated.

        Raises:
            ValueError: the size of the hires pass would be out of range.
        """
        schedule, other = host.schedule(self.sampler, self.scheduler), host.other_checkpoint()

        def made(of: str, width: int, height: int, checkpoint: str = "", steps: int = 0) -> SamplingPass:
            moments = host.moments(of, self.steps, steps, self.denoising, schedule)
            return SamplingPass(Grid.of_pixels(height, width), of, moments, checkpoint or other)

        if self.tab == "img2img":
            return [made(tunings.IMG2IMG, self.width, self.height)]
        passes = [made(tunings.FIRST, self.width, self.height)]
        if self.hires is not None:
            sliders = self.hires.scale, self.hires.resize_x, self.hires.resize_y
            width, height = hires_size(self.width, self.height, *sliders)
            if not (SMALLEST <= width <= LARGEST and SMALLEST <= height <= LARGEST):
                raise ValueError(f"sides of the hires pass must be from {SMALLEST} to {LARGEST}, got {width}×{height}")
            passes.append(made(tunings.HIRES, width, height, self.hires.checkpoint, self.hires.steps))
        return passes


def last_run(task: Optional[str] = None) -> Any:  # noqa: UP045
    """Return the status of the last run, or of the host's request `task`."""
    return STATUS.of(task)


class Routes:
    """Handlers of the routes; `host` is the program that shows the panel."""

    def __init__(self, host: Program) -> None:
        self.host = host

    def preview(self, body: Any = Body(...)) -> dict[str, Any]:  # noqa: B008
        """Preview the settings; see `preview.preview`. The body is a `PanelState`."""
        state = _read(body)
        host = self.host.with_options(state.overrides)
        try:
            passes = state.passes(host)
        except (ValueError, OverflowError) as error:  # pydantic 1 converts an infinity to an integer
            raise HTTPException(status_code=422, detail=str(error)) from error
        return preview(state.values, passes, 2 * state.batch_size, host)

    def add(self, app: FastAPI) -> None:
        """Add all routes to the host's application."""
        login = _login(app)
        for name, answer in (("page", page_data), ("status", last_run)):
            app.add_api_route(f"{PREFIX}/{name}", answer, dependencies=login)
        app.add_api_route(f"{PREFIX}/preview", self.preview, methods=["POST"], dependencies=login)


def _read(body: Any) -> PanelState:
    """Parse the state in a body; answer 422 with a sentence if it is invalid.

    FastAPI's own validation would repeat the input in its answer, which fails if that contains an infinity.
    """
    try:
        return PanelState.parse_obj(body) if _PYDANTIC_1 else PanelState.model_validate(body)
    except ValidationError as error:
        raise HTTPException(status_code=422, detail="; ".join(_sentence(e, body) for e in error.errors())) from error
    except (ValueError, OverflowError) as error:
        raise HTTPException(status_code=422, detail=str(error)) from error


def _sentence(error: Any, body: Any) -> str:
    value = body
    for key in error["loc"]:
        value = value.get(key) if isinstance(value, dict) else value
    return f"{'.'.join(map(str, error['loc'])) or 'body'}: {error['msg']}, got {repr(value)[:LONGEST]}"


def _login(app: FastAPI) -> list[Any]:
    """Return the dependencies of gradio's own /config route, which check the cookie if a login is required."""
    return next((list(route.dependencies) for route in app.routes if getattr(route, "path", "") == "/config"), [])
