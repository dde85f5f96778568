"""The panel's section Tune: how close, with the next image, what was found.

The page's script presses `tune_done` when an image is there.
"""

from __future__ import annotations

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


class Section:
    """The controls of the section; where nothing can be tuned, they are hidden."""

    def __init__(self, ids: Any, tunings: PanelTunings | None) -> None:
        self._id, self.tunings = ids, tunings  # what makes an element id of a name, and the tunings, if of use
        self.tunes = tunings is not None and not tunings.refusal

    def order(self) -> dict[str, Any]:
        """Make the controls of an order to tune, by the names of their settings."""
        hidden = [] if self.tunes else ["agent-attention-hidden"]
        row, tune = BY_NAME["how_close"], BY_NAME["tune"]
        how_close = gr.Dropdown(
            list(row.choices), value=row.default, label=row.label, elem_id=self._id(row.name), elem_classes=hidden
        )
        self.button = gr.Button(TUNE, elem_id=self._id("tune_next"), elem_classes=hidden)
        # the page's script reads it, so it has to be drawn
        more = {"label": tune.label, "elem_id": self._id(tune.name), "elem_classes": ["agent-attention-hidden"]}
        self.value = gr.Slider(tune.low, tune.high, tune.default, step=tune.step, **more)

        def ordered(how_close: str, value: float) -> tuple[float, Any]:
            """Order a tuning with the next image, or take the order back."""
            return (0.0, gr.update(value=TUNE)) if value else (fraction_of(how_close), gr.update(value=DONT_TUNE))

        def changed(how_close: str, value: float) -> float:
            """Change the order that was given, if any."""
            return fraction_of(how_close) if value else 0.0

        controls = [how_close, self.value]
        self.button.click(ordered, controls, [self.value, self.button], show_progress="hidden")
        how_close.input(changed, controls, self.value, show_progress="hidden")
        self.button.do_not_save_to_config = self.value.do_not_save_to_config = True
        return {"how_close": how_close, "tune": self.value}

    def results(self) -> None:
        """Make what is folded: the tunings of the checkpoint."""
        if self.tunings is None:
            return
        with gr.Accordion("Tune", open=False, elem_id=self._id("tuner")):
            if self.tunes:
                self._tunings(self.tunings)
            else:
                gr.HTML(f"<p>{escape(REFUSED.format(self.tunings.refusal))}</p>", elem_id=self._id("tuned"))

    def _tunings(self, tunings: PanelTunings) -> None:
        # a function: asked for whenever the page loads
        results = gr.HTML(tunings.results, elem_id=self._id("tuned"), elem_classes=["agent-attention-tuned"])
        with gr.Row():
            which = gr.Dropdown(tunings.titles(), label="Kept tuning", elem_id=self._id("tune_which"), min_width=220)
            forget = gr.Button(FORGET, elem_id=self._id("tune_forget"))
            export = gr.Button("Export this tuning", elem_id=self._id("tune_export"))
        with gr.Row():
            upload = gr.UploadButton("Import a tuning", file_types=[".json"], elem_id=self._id("tune_import"))
            forget_all = gr.Button(FORGET_ALL, elem_id=self._id("tune_forget_all"))
        file = gr.File(visible=False, label="Exported", elem_id=self._id("tune_file"))
        done = gr.Button("", elem_id=self._id("tune_done"), elem_classes=["agent-attention-hidden"])

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

        quiet = {"show_progress": "hidden"}
        results.change(listed, None, which, **quiet)
        forget.click(lambda title: shown(tunings.forget(title) if title else ""), which, results, **quiet)
        forget_all.click(really, forget_all, [results, forget_all], **quiet)
        export.click(exported, which, file, **quiet)
        upload.upload(lambda given: shown(tunings.load(given.name)), upload, results, **quiet)
        done.click(lambda: (shown(), 0.0, gr.update(value=TUNE)), None, [results, self.value, self.button], **quiet)
        for control in (which, forget, export, upload, forget_all, file, done):
            control.do_not_save_to_config = True
