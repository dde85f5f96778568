"""The panel, built from the table of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import groupby
from typing import Any

import gradio as gr

from ..app.kept_tunings import PanelTunings
from ..app.token_map import RECORD, View
from ..checks import Setting
from ..settings import schema
from ..settings.presets import CUSTOM, PRESETS, preset_of
from ..settings.schema import BY_NAME, SETTINGS, fraction_of

TUNE, DONT_TUNE = "Tune with the next image", "Don't tune with the next image"
FORGET, FORGET_ALL = "Forget this tuning", "Forget all of this checkpoint"
SURE = "Really forget all of this checkpoint?"
REFUSED = (
    "Nothing can be tuned here: {}. What was tuned elsewhere works: paste the infotext of its image, or fill in Tuning "
    "(More settings)."
)
HIDDEN, QUIET = {"elem_classes": ["agent-attention-hidden"]}, {"show_progress": "hidden"}
_FOLDED = 5  # lines from this one on are under "More settings"
_GRADIO_3 = gr.__version__.startswith("3.")
_JS = "_js" if _GRADIO_3 else "js"  # renamed in gradio 4
# since gradio 4, events during a pending call are dropped unless the last one is asked for
_LAST = {} if _GRADIO_3 else {"trigger_mode": "always_last"}


@dataclass(frozen=True)
class Panel:
    """Controls of a panel."""

    controls: Mapping[str, Any]  # of each setting, by name in the table's order; "enabled" is the accordion's checkbox
    status: Any  # the lines of the last run
    record: Any = None  # the checkbox that turns on recording; None if the panel has no token map

    @property
    def inputs(self) -> list[Any]:
        """Inputs of a generation, in the order of `agentsd.settings.ARGUMENTS`; requires a token map."""
        return [{**self.controls, schema.RECORD: self.record}[name] for name in schema.ARGUMENTS]

    def tidy(self) -> None:
        """Restore the type of each default: with a 0 saved for 0.0 the host would turn an infotext's 0.4 into 0."""
        for name, control in self.controls.items():
            try:
                control.value = BY_NAME[name].check(control.value)
            except ValueError:
                control.value = BY_NAME[name].default


def element_id(tab: str, name: str = "") -> str:
    """Return the element id of a control, "summary" or "status"; without a name, that of the accordion."""
    return f"{tab}_agent_attention" + (f"_{name}" if name else "")


def build(
    tab: str,
    accordion: Callable[..., AbstractContextManager],
    token_map: Callable[..., View] | None = None,
    tunings: PanelTunings | None = None,
) -> Panel:
    """Build the panel of a tab, "txt2img" or "img2img", inside the current gradio blocks.

    `accordion` makes one with a checkbox as its value, such as the WebUI's InputAccordion; `token_map` makes the map of
    the last run from (task, call, layer) and a place that is clicked, and without it the panel has none.
    """
    make, control, enabled = partial(_made, tab), partial(_control, tab), BY_NAME["enabled"]
    with accordion(enabled.default, label=enabled.label, elem_id=element_id(tab)) as switch:
        controls = {"enabled": switch}
        with gr.Row(elem_classes=["agent-attention-line"]):
            preset = make(gr.Dropdown, "preset", [*PRESETS, CUSTOM], value=preset_of(schema.DEFAULTS), label="Preset")
            sync = make(gr.Button, "sync", "", **HIDDEN)  # through which the page's script sets it
            ordered, button = _order(make, control, tunings is not None and not tunings.refusal)
            controls.update(ordered)
        make(gr.HTML, "summary", "", elem_classes=["agent-attention-summary"])
        others = [row for row in SETTINGS if row.name not in controls]
        controls.update(_lines(control, [row for row in others if row.place < (_FOLDED,)]))
        with gr.Accordion("More settings", open=False, elem_id=element_id(tab, "more")):
            controls.update(_lines(control, [row for row in others if row.place >= (_FOLDED,)]))
        if tunings is not None:
            with gr.Accordion("Tune", open=False, elem_id=element_id(tab, "tuner")):
                _results(make, tunings, controls["tune"], button)
        record = None if token_map is None else _token_map(tab, make, token_map)
        # the style sheet moves it to the top where it says that nothing was applied
        status = make(gr.HTML, "status", "", elem_classes=["agent-attention-status"])
    both = [preset, *(controls[row.name] for row in SETTINGS if row is not enabled)]
    for listen, call in ((preset.input, "choose"), (sync.click, "sync")):
        # the page's script fills them, without the server; gradio appends the outputs' values to the inputs'
        code = f"(...values) => agentAttentionReadout.{call}('{tab}', values.slice(0, {len(both)}))"
        listen(fn=None, inputs=both, outputs=both, **{_JS: code})
    return Panel({row.name: controls[row.name] for row in SETTINGS}, status, record)


def _token_map(tab: str, make: Callable[..., Any], show: Callable[..., View]) -> Any:
    """Make the controls of the token map, and return the checkbox that turns on recording."""
    with gr.Accordion("Token map", open=False, elem_id=element_id(tab, "map")):
        record = make(gr.Checkbox, "record", False, label=RECORD)
        button = make(gr.Button, "map_show", "Show the token map")
        with gr.Row():
            moment, layer = (
                make(gr.Slider, f"map_{name}", 1, 2, 1, step=1, label=f"Map {name}", visible=False)
                for name in ("moment", "layer")
            )
        text = make(gr.HTML, "map_text", "", elem_classes=["agent-attention-status"])
        image = make(gr.Image, "map_image", type="pil", interactive=False, show_label=False, visible=False)
        task = make(gr.Textbox, "map_task", "", visible=False)  # the page's last request, which its script fills in
    inputs, outputs = [task, moment, layer], [image, text, moment, layer]

    def refresh(task: str, call: float, number: float, *place: Any) -> list[Any]:
        view = show(task, int(call or 1), int(number or 1), *place)
        some = view.image is not None
        chosen = ((view.call, view.calls), (view.layer, view.layers))
        return [
            gr.update(value=view.image, visible=some),
            f'<div role="status" title="{escape(view.block)}">{escape(view.text)}</div>',
            *(gr.update(value=value, maximum=max(2, n), visible=some and n > 1) for value, n in chosen),
        ]

    def clicked(task: str, call: float, number: float, event: gr.SelectData) -> list[Any]:
        return refresh(task, call, number, event.index)

    own = {_JS: f"(...values) => agentAttentionReadout.ofTask('{tab}', values)", **QUIET}
    button.click(refresh, inputs, outputs, **own)
    image.select(clicked, inputs, outputs, **own)
    for slider in (moment, layer):
        slider.input(refresh, inputs, outputs, **own, **_LAST)
    return record


def _order(make: Callable[..., Any], control: Callable[..., Any], tunes: bool) -> tuple[dict[str, Any], Any]:
    """Make the controls of an order to tune, by the names of their settings, and its button; hidden without `tunes`."""
    shown = {} if tunes else HIDDEN
    how_close, button = control(BY_NAME["how_close"], **shown), make(gr.Button, "tune_next", TUNE, **shown)
    value = control(BY_NAME["tune"], **HIDDEN)  # the page's script reads it, so it has to be drawn
    value.do_not_save_to_config = True

    def ordered(how_close: str, value: float) -> tuple[float, Any]:
        """Order a tuning with the next image, or take the order back."""
        return (0.0, gr.update(value=TUNE)) if value else (fraction_of(how_close), gr.update(value=DONT_TUNE))

    button.click(ordered, [how_close, value], [value, button], **QUIET)
    how_close.input(lambda close, value: fraction_of(close) if value else 0.0, [how_close, value], value, **QUIET)
    return {"how_close": how_close, "tune": value}, button


def _results(make: Callable[..., Any], tunings: PanelTunings, value: Any, button: Any) -> None:
    """Make what is folded: the tunings of the checkpoint; `value` and `button` are those of the order."""
    if tunings.refusal:
        make(gr.HTML, "tuned", f"<p>{escape(REFUSED.format(tunings.refusal))}</p>")
        return
    # a function: asked for whenever the page loads
    found = make(gr.HTML, "tuned", tunings.results, elem_classes=["agent-attention-tuned"])
    with gr.Row():
        which = make(gr.Dropdown, "tune_which", tunings.titles(), label="Kept tuning", min_width=220)
        forget = make(gr.Button, "tune_forget", FORGET)
        export = make(gr.Button, "tune_export", "Export this tuning")
    with gr.Row():
        upload = make(gr.UploadButton, "tune_import", "Import a tuning", file_types=[".json"])
        forget_all = make(gr.Button, "tune_forget_all", FORGET_ALL)
    file = make(gr.File, "tune_file", visible=False, label="Exported")
    done = make(gr.Button, "tune_done", "", **HIDDEN)  # the page's script presses it when an image is there

    def listed() -> Any:
        return gr.update(choices=(titles := tunings.titles()), value=next(iter(titles), None))

    def shown(said: str = "") -> str:
        """Show the tunings anew, below what was done."""
        return (f"<p>{escape(said)}</p>" if said else "") + tunings.results()

    def really(label: str) -> tuple[Any, ...]:
        """Ask once, then forget."""
        sure = label == SURE
        return shown(tunings.forget() if sure else ""), gr.update(value=FORGET_ALL if sure else SURE)

    def exported(title: str) -> Any:
        return gr.update(value=(path := tunings.export(title or "")), visible=path is not None)

    found.change(listed, None, which, **QUIET)
    forget.click(lambda title: shown(tunings.forget(title) if title else ""), which, found, **QUIET)
    forget_all.click(really, forget_all, [found, forget_all], **QUIET)
    export.click(exported, which, file, **QUIET)
    upload.upload(lambda given: shown(tunings.load(given.name)), upload, found, **QUIET)
    done.click(lambda: (shown(), 0.0, gr.update(value=TUNE)), None, [found, value, button], **QUIET)


def _made(tab: str, kind: Callable[..., Any], name: str, *args: Any, **more: Any) -> Any:
    """Make an element that is no setting: the host saves nothing of it."""
    element = kind(*args, elem_id=element_id(tab, name), **more)
    element.do_not_save_to_config = True
    return element


def _lines(control: Callable[[Setting], Any], rows: list[Setting]) -> dict[str, Any]:
    controls = {}
    for _, line in groupby(sorted(rows, key=lambda row: row.place), lambda row: row.place[0]):
        with gr.Row(elem_classes=["agent-attention-line"]):
            controls.update({row.name: control(row) for row in line})
    return controls


def _control(tab: str, row: Setting, **more: Any) -> Any:
    # its help is a tooltip, which the page's script sets: see `preview.page_data`
    common = {"value": row.default, "label": row.label, "elem_id": element_id(tab, row.name), **more}
    if row.kind == "flag":
        return gr.Checkbox(**common)
    if row.kind == "choice":
        return gr.Dropdown(choices=list(row.choices), **common)
    if row.kind == "text":
        return gr.Textbox(max_lines=4, **common)
    if row.slider:
        return gr.Slider(minimum=row.low, maximum=row.high, step=row.step, **common)
    # without limits: gradio would refuse the whole generation and name no control, even while we are off
    return gr.Number(**common)
