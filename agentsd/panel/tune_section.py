"""The panel's section Tune: how close, with the next image, what was found."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from ..app.kept_tunings import PanelTunings
from ..settings.schema import BY_NAME, fraction_of

TUNE, DONT_TUNE = "Tune with the next image", "Don't tune with the next image"
FORGET, FORGET_ALL = "Forget this tuning", "Forget all of this checkpoint"
SURE = "Really forget all of this checkpoint?"
REFUSED = (
    "Nothing can be tuned here: {}. What was tuned elsewhere works: paste the infotext of its image, or fill in Tuning "
    "(More settings)."
)
HIDDEN, QUIET = {"elem_classes": ["agent-attention-hidden"]}, {"show_progress": "hidden"}


def order(make: Callable[..., Any], control: Callable[..., Any], tunes: bool) -> tuple[dict[str, Any], Any]:
    """Make the controls of an order to tune, by the names of their settings, and its button; hidden without `tunes`."""
    how_close = control(BY_NAME["how_close"], **({} if tunes else HIDDEN))
    button = make(gr.Button, "tune_next", TUNE, **({} if tunes else HIDDEN))
    value = control(BY_NAME["tune"], **HIDDEN)  # the page's script reads it, so it has to be drawn
    value.do_not_save_to_config = True

    def ordered(how_close: str, value: float) -> tuple[float, Any]:
        """Order a tuning with the next image, or take the order back."""
        return (0.0, gr.update(value=TUNE)) if value else (fraction_of(how_close), gr.update(value=DONT_TUNE))

    def changed(how_close: str, value: float) -> float:
        return fraction_of(how_close) if value else 0.0

    button.click(ordered, [how_close, value], [value, button], **QUIET)
    how_close.input(changed, [how_close, value], value, **QUIET)
    return {"how_close": how_close, "tune": value}, button


def results(make: Callable[..., Any], tunings: PanelTunings, value: Any, button: Any) -> None:
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
        titles = tunings.titles()
        return gr.update(choices=titles, value=next(iter(titles), None))

    def shown(said: str = "") -> str:
        """Show the tunings anew, below what was done."""
        return (f"<p>{escape(said)}</p>" if said else "") + tunings.results()

    def really(label: str) -> tuple[Any, ...]:
        """Ask once, then forget."""
        sure = label == SURE
        return shown(tunings.forget() if sure else ""), gr.update(value=FORGET_ALL if sure else SURE)

    def exported(title: str) -> Any:
        path = tunings.export(title or "")
        return gr.update(value=path, visible=path is not None)

    found.change(listed, None, which, **QUIET)
    forget.click(lambda title: shown(tunings.forget(title) if title else ""), which, found, **QUIET)
    forget_all.click(really, forget_all, [found, forget_all], **QUIET)
    export.click(exported, which, file, **QUIET)
    upload.upload(lambda given: shown(tunings.load(given.name)), upload, found, **QUIET)
    done.click(lambda: (shown(), 0.0, gr.update(value=TUNE)), None, [found, value, button], **QUIET)
