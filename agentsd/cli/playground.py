"""A local page with the WebUI's panel, the embedded model, and a slider between before and after."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from html import escape
from pathlib import Path
from typing import Any

# set before gradio is imported, which reads this once
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL.Image import Image
from torch import nn

from ..app.decision import Decision, Program, SamplingPass, decide, evenly, is_left_out
from ..app.kept_tunings import Kept, PanelTunings, Store, make
from ..app.last_run import STATUS, PassReport
from ..app.tuning_chart import tabled
from ..checks import SettingError
from ..panel import controls
from ..panel.routes import Routes
from ..settings import schema
from ..settings.tunings import AUTO, FIRST
from ..tuning.record import RecordedCall, record_calls
from ..tuning.result import TuningCancelled, TuningError, headline
from .errors import CommandError
from .models import EMBEDDED, Model, Request, open_model
from .pictures import enlarged
from .runs import COLUMNS, Run, draw

HOST = "127.0.0.1"
TAB = "txt2img"  # the panel's script looks for the WebUI's elements
ROWS = 2  # cond and uncond
SCALE = 8  # pixels shown per position of the latent, as in Stable Diffusion
_FILES = Path(__file__).resolve().parents[2]
# Everything comes from this server, except what gradio's page generates itself.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)


_PROGRESS = gr.Progress()  # it finds the event under way


class Stopped(Exception):
    """The user has pressed Stop."""


class Playground(Program):
    """Actions of the page's controls."""

    def __init__(self, model: Model) -> None:
        self.model = model
        kept: dict[str, Any] = {}  # while the page is served
        self.tunings = Store(lambda section: kept)
        self.stop = threading.Event()  # set to stop drawing after the current step

    def draw(self, prompt: str, *inputs: Any, progress: Any = _PROGRESS) -> tuple[tuple[Image, Image] | None, str, str]:
        """Draw a picture without and with the settings: seed, steps, width, height, and the values of the table's rows.

        Returns the pictures, or None if drawing failed; the table of timings, or the error message, as HTML; and the
        panel's status line.
        """
        self.stop.clear()
        try:
            seed, steps, width, height, *values = inputs
            size = (int(height) // SCALE, int(width) // SCALE)
            request = self.model.complete(Request(prompt.strip(), int(seed or 0), int(steps), size=size))
            settings = schema.from_args([dict(zip(schema.NAMES, values, strict=True))])
            return self._draw_both(request, settings, progress)
        except (Stopped, TuningCancelled):
            told = "Stopped."
        except (CommandError, SettingError, TuningError) as error:
            told = str(error)
        return None, f'<p role="alert">{escape(told)}</p>', ""

    def _draw_both(
        self, request: Request, values: Mapping[str, Any], progress: Any
    ) -> tuple[tuple[Image, Image], str, str]:
        latent = request.size[0] // self.model.factor, request.size[1] // self.model.factor
        sampling = SamplingPass(latent, FIRST, evenly(request.steps))
        wanted = values["enabled"] and not is_left_out(values, hires=False)
        made = decide(values, sampling, ROWS, self) if wanted else None
        if made is not None and made.refused:
            raise CommandError(made.reason.text)
        STATUS.begin(wanted)

        def draw_one(label: str, made: Decision | None = None, **more: Any) -> Run:
            numbers = iter(range(1, request.steps + 1))

            def step() -> None:
                progress((next(numbers), request.steps), desc=label)
                if self.stop.is_set():
                    raise Stopped

            config, since = (None, None) if made is None else (made.config, None if made.tuning else values["since"])
            return draw(self.model, request, config, label, True, step=step, since=since, **more)

        tunes = wanted and values["tune"] > 0
        recorded: Any = record_calls(self.model.unet) if tunes else nullcontext([])
        with recorded as calls:
            plain = ours = draw_one("without")
        if tunes:
            STATUS.add(PassReport(name=str(sampling), tuned=self._tune(calls, values["tune"], progress)))
            made = decide({**values, "tuning": AUTO}, sampling, ROWS, self)
        if made is not None:
            report = PassReport(made)
            if made.patches:
                ours = draw_one("with agent attention", made, plain=plain, report=report)
                if made.key:
                    self.timings.add_calls(made.key, ours.seconds / request.steps, plain.seconds / request.steps)
            STATUS.add(report)
        pictures = (_shown(plain.picture), _shown(ours.picture))
        return pictures, _timings(plain, ours), "".join(f"<div>{escape(str(line))}</div>" for line in STATUS.lines())

    def _tune(self, calls: list[RecordedCall], tolerance: float, progress: Any) -> str:
        """Tune on the picture that was just drawn, and say what came of it."""

        def show(done: int, total: int, text: str) -> bool:
            progress((done, total), desc=text)
            return not self.stop.is_set()

        kept = make(self.model.unet, calls, tolerance, checkpoint=self.model.name, of=FIRST, progress=show)
        self.tunings.put(kept)
        return "; ".join([headline(kept.tuning), *kept.tuning.notes])

    def unet(self) -> nn.Module:
        return self.model.unet

    def checkpoint(self, what: str = "name") -> str:
        return self.model.name if what == "name" else ""

    def kept(self, sampling: SamplingPass) -> Kept | None:
        return self.tunings.find(self.model.name, sampling.of, sampling.latent)

    def even_if_slower(self, values: Mapping[str, Any]) -> bool:
        """What is drawn here is drawn to be looked at."""
        return True


def _shown(picture: Image) -> Image:
    return enlarged(picture, SCALE * max(picture.size))


def _timings(plain: Run, ours: Run) -> str:
    """Format seconds and distance as a table."""
    rows = [["without", *plain.row]] + ([["with", *ours.row]] if ours.plain else [])
    off = "" if ours.plain else "<p>With these settings agent attention is off: both pictures are the same.</p>"
    return tabled(("", *COLUMNS), rows) + off


@contextmanager
def _accordion(value: bool, label: str, elem_id: str) -> Iterator[Any]:
    """Stand in for the WebUI's InputAccordion: an accordion with a checkbox."""
    with gr.Accordion(label, open=True, elem_id=elem_id):
        # on, unlike in the WebUI: the playground is for seeing what it does
        yield gr.Checkbox(True, label="On", container=False, elem_id=f"{elem_id}-checkbox")


def build(playground: Playground) -> gr.Blocks:
    """Build the page."""
    prompts = playground.model.pipe.prompts
    with gr.Blocks(title="Agent attention", analytics_enabled=False) as page:
        gr.Markdown(
            "# Agent attention\nThe same picture, without and with agent attention. The model is a small one that "
            f"ships with the library; its pictures are shown {SCALE} times as large as it draws them, so that a size "
            "has as many tokens as in Stable Diffusion."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=380):
                about = {"label": "Prompt", "info": "One of these, or words of them in another order."}
                prompt = gr.Dropdown(
                    prompts, value=prompts[0], **about, allow_custom_value=True, elem_id=f"{TAB}_prompt"
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, elem_id=f"{TAB}_seed")
                    steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id=f"{TAB}_steps")
                with gr.Row():
                    width = gr.Slider(256, 1024, 512, step=64, label="Width", elem_id=f"{TAB}_width")
                    height = gr.Slider(256, 1024, 512, step=64, label="Height", elem_id=f"{TAB}_height")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id=f"{TAB}_generate")
                    stop = gr.Button("Stop", elem_id="playground_stop")
                panel = controls.build(TAB, _accordion, tunings=PanelTunings(playground))
            with gr.Column(scale=3, min_width=420):
                about = {"label": "Left: without. Right: with agent attention.", "elem_id": "playground_pictures"}
                pictures = gr.ImageSlider(type="pil", format="png", max_height=1024, **about)
                timings = gr.HTML("", elem_id="playground_timings")

        inputs = [prompt, seed, steps, width, height, *panel.controls.values()]
        shown = [pictures, timings, panel.status]
        go.click(playground.draw, inputs, shown, show_progress_on=[pictures], concurrency_limit=1)
        stop.click(playground.stop.set, queue=False, concurrency_limit=None)
    return page


# gradio 6 would squeeze a slider's description beside its number
_STYLE = """
#playground_timings table { width: 100%; border-collapse: collapse; }
#playground_timings :is(th, td) { padding: 4px 8px; text-align: right; }
#playground_timings :is(th, td):is(:first-child, :last-child) { text-align: left; }
#txt2img_agent_attention .head { display: grid; grid-template-columns: 1fr auto; }
#txt2img_agent_attention .head label { display: contents; }
#txt2img_agent_attention .head .info-text { grid-row: 2; grid-column: 1 / -1; }
"""


def make_app(model: Model) -> FastAPI:
    """Make an application of the page and its routes."""
    playground = Playground(model)
    app = FastAPI(openapi_url=None)
    Routes(playground).add(app)
    options: dict[str, Any] = {"footer_links": [], "enable_monitoring": False, "ssr_mode": False}
    script, style = _FILES / "javascript" / "agent_attention.js", _FILES / "style.css"
    if script.is_file():  # in a checkout, but not in an installed package
        # the function that the WebUI provides to scripts; ours polls for the panel's controls, which gradio makes later
        host = "<script>function gradioApp() { return document; }</script>"
        options["head"] = f"{host}<script>{script.read_text(encoding='utf-8')}</script>"
        options["css"] = style.read_text(encoding="utf-8") + _STYLE
    return gr.mount_gradio_app(app, build(playground), path="", server_name=HOST, **options)


def make_server(model: Model) -> uvicorn.Server:
    """Make a server of the page, under the policy."""
    headers = [("Content-Security-Policy", POLICY)]
    return uvicorn.Server(uvicorn.Config(make_app(model), log_level="warning", headers=headers))


def serve(port: int = 7860, browser: bool = False) -> None:
    """Serve the page to this machine until Ctrl-C, at another port if the port is in use, and open a browser on it."""
    server = make_server(open_model(EMBEDDED))
    with listening(port) as listener:
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        print(f"The playground is at {url} (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(url)
        server.run(sockets=[listener])


def listening(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError:
        return socket.create_server((HOST, 0))
