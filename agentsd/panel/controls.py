"""The panel, made from the table of settings. Knows gradio, and no WebUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import gradio as gr

from ..settings.presets import CUSTOM, PRESETS, preset_of
from ..settings.table import ARGUMENTS, BY_NAME, DEFAULTS, SETTINGS, Row
from ..settings.table import RECORD as RECORD_NAME
from .tokenmap import RECORD, View

# Controls that share a line, by their group's number
_LINES = (
    ("ratio", "agent_ratio"),
    ("k_scale2", "k_shortcut"),
    ("fp32",),
    ("agent_source", "method"),
    ("since", "until", "hires_until"),
    ("after", "passes"),
    ("max_downsample", "min_tokens", "max_agents"),
    ("sx", "sy", "seed"),
    ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"),
    ("rules",),
)
_LINE = {name: i for i, line in enumerate(_LINES) for name in line}


@dataclass(frozen=True)
class Panel:
    """What was built.

    Attributes:
        controls: the control of each setting by name, in the table's order; "enabled" is the accordion's checkbox.
        summary: the line that says what the settings mean at the current size.
        status: the line that says what became of the last run.
        record: the checkbox that asks for the token map's record; None where the panel has no token map.
    """

    controls: Mapping[str, Any]
    summary: Any
    status: Any
    record: Any = None

    @property
    def inputs(self) -> list[Any]:
        """What a generation is given, in the order of `agentsd.settings.ARGUMENTS`; only with a token map."""
        return [self.record if name == RECORD_NAME else self.controls[name] for name in ARGUMENTS]

    def tidy(self) -> None:
        """Give each control's default its own type again, which a saved ui-config may have lost.

        The host casts what it reads from an infotext to that type: a 0 saved for 0.0 would turn 0.4 into 0.
        """
        for name, control in self.controls.items():
            row = BY_NAME[name]
            try:
                control.value = row.checked(control.value)
            except ValueError:
                control.value = row.default


def element_id(tab: str, name: str = "") -> str:
    """The id of a control, of "summary" or of "status"; without a name, of the accordion."""
    return f"{tab}_agent_attention" + (f"_{name}" if name else "")


def build(
    tab: str,
    accordion: Callable[..., AbstractContextManager],
    token_map: Callable[[int, int], View] | None = None,
) -> Panel:
    """Build the panel inside the current gradio blocks.

    Args:
        tab: prefix of the elements' ids: "txt2img" or "img2img".
        accordion: makes an accordion that is an input, such as the WebUI's InputAccordion.
        token_map: gives the last run's token map, as `tokenmap.view` does; without it the panel has none.
    """
    enabled = BY_NAME["enabled"]
    with accordion(enabled.default, label=enabled.label, elem_id=element_id(tab)) as switch:
        controls = {"enabled": switch}
        preset, sync = _preset(tab)
        summary = gr.HTML("", elem_id=element_id(tab, "summary"), elem_classes=["agent-attention-summary"])
        controls.update(_lines(tab, [row for row in SETTINGS if not row.folded and row is not enabled]))
        with gr.Accordion("More settings", open=False, elem_id=element_id(tab, "more")):
            controls.update(_lines(tab, [row for row in SETTINGS if row.folded]))
        _measure(tab)
        record = None if token_map is None else _token_map(tab, token_map)
        status = gr.HTML("", elem_id=element_id(tab, "status"), elem_classes=["agent-attention-status"])
    _connect(tab, preset, sync, [controls[row.name] for row in SETTINGS if row is not enabled])
    return Panel({row.name: controls[row.name] for row in SETTINGS}, summary, status, record)


def _preset(tab: str) -> tuple[Any, Any]:
    """The choice of a preset, and a hidden button by which the page sets it."""
    preset = gr.Dropdown(
        choices=[*PRESETS, CUSTOM],
        value=preset_of(DEFAULTS),
        label="Preset",
        info="Settings by intention. Changing one of them makes it Custom.",
        elem_id=element_id(tab, "preset"),
    )
    sync = gr.Button("", elem_id=element_id(tab, "sync"), elem_classes=["agent-attention-hidden"])
    # what it shows follows from the other controls: nothing to save
    preset.do_not_save_to_config = sync.do_not_save_to_config = True
    return preset, sync


def _connect(tab: str, preset: Any, sync: Any, controls: list[Any]) -> None:
    """Have the page's script fill the controls; the server is not asked."""
    both = [preset, *controls]
    for listen, call in ((preset.input, "choose"), (sync.click, "sync")):
        # gradio appends the outputs' values to the inputs'
        code = f"(...values) => agentAttentionReadout.{call}('{tab}', values.slice(0, {len(both)}))"
        listen(fn=None, inputs=both, outputs=both, **{_JS: code})


_GRADIO_3 = gr.__version__.startswith("3.")
# gradio 4 has renamed it
_JS = "_js" if _GRADIO_3 else "js"
# and drops what happens while an answer is awaited, unless it is told to answer the last of it
_LAST = {} if _GRADIO_3 else {"trigger_mode": "always_last"}


def _measure(tab: str) -> None:
    """Buttons and table of a measurement, which the page's script brings to life."""
    with gr.Accordion("Measure", open=False, elem_id=element_id(tab, "measuring")):
        with gr.Row():
            gr.Button("Measure at this size", elem_id=element_id(tab, "measure"))
            gr.Button("Cancel measuring", elem_id=element_id(tab, "measure_cancel"), interactive=True)
        gr.HTML("", elem_id=element_id(tab, "measured"), elem_classes=["agent-attention-measured"])


def _token_map(tab: str, show: Callable[[int, int], View]) -> Any:
    """The token map's controls; gives the checkbox that asks for a record."""

    def named(name: str, **more: Any) -> dict[str, Any]:
        return {"elem_id": element_id(tab, name), **more}

    with gr.Accordion("Token map", open=False, elem_id=element_id(tab, "map")):
        info = "Which tokens were merged and where the agents sat is kept of each image you make, until the next one."
        record = gr.Checkbox(False, label=RECORD, info=info, **named("record"))
        button = gr.Button("Show the token map", **named("map_show"))
        with gr.Row():
            moment = gr.Slider(1, 2, 1, step=1, label="Map moment", visible=False, **named("map_moment"))
            layer = gr.Slider(1, 2, 1, step=1, label="Map layer", visible=False, **named("map_layer"))
        text = gr.HTML("", **named("map_text", elem_classes=["agent-attention-status"]))
        image = gr.Image(type="pil", interactive=False, show_label=False, visible=False, **named("map_image"))
    chosen, shown = [moment, layer], [image, text, moment, layer]

    def refresh(call: float, number: float) -> list[Any]:
        return _map_updates(show(int(call or 1), int(number or 1)))

    button.click(refresh, chosen, shown, show_progress="hidden")
    for slider in chosen:
        slider.input(refresh, chosen, shown, show_progress="hidden", **_LAST)
    for part in (record, button, *shown):
        part.do_not_save_to_config = True
    return record


def _map_updates(view: View) -> list[Any]:
    """What image, text and the two sliders of the token map become."""

    def slider(value: int, count: int) -> Any:
        return gr.update(value=value, maximum=max(2, count), visible=view.image is not None and count > 1)

    return [
        gr.update(value=view.image, visible=view.image is not None),
        f'<div role="status">{escape(view.text)}</div>',
        slider(view.call, view.calls),
        slider(view.layer, view.layers),
    ]


def _lines(tab: str, rows: list[Row]) -> dict[str, Any]:
    controls = {}
    for _, line in groupby(sorted(rows, key=lambda row: _LINE.get(row.name, len(_LINES))), lambda r: _LINE.get(r.name)):
        with gr.Row():
            controls.update({row.name: _control(tab, row) for row in line})
    return controls


def _control(tab: str, row: Row) -> Any:
    common = {"value": row.default, "label": row.label, "info": row.help, "elem_id": element_id(tab, row.name)}
    if row.kind == "flag":
        return gr.Checkbox(**common)
    if row.kind == "choice":
        return gr.Dropdown(choices=list(row.choices), **common)
    if row.kind == "text":
        return gr.Textbox(max_lines=4, **common)
    if row.kind == "number":
        return gr.Number(minimum=row.low, maximum=row.high, precision=0, **common)
    return gr.Slider(minimum=row.low, maximum=row.high, step=row.step, **common)
