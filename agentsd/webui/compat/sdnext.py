"""SD.Next: diffusers pipelines, options of its own, and batches where others announce passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from modules import script_callbacks

from ...app.decision import Hint, SamplingPass, Schedule
from .a1111 import HYPERTILE, WebUI, _module

PLACE = ("Settings → Pipeline Modifiers",)
MERGING = {"ToMe": "tome_ratio", "ToDo": "todo_ratio"}
SD2_WIDTH = 1024  # channels of SD 2's text encoder, read off the U-Net's cross-attention


class SDNext(WebUI):
    """SD.Next.

    Its hires pass has no callback: while the host makes it, `p.is_hr_pass` is true. `p` is the object that the
    sampling uses, which is another one than the callbacks' where the host makes only the hires pass again.
    """

    announces_passes = False

    @classmethod
    def is_running(cls) -> bool:
        return hasattr(script_callbacks, "on_after_process")

    def _checkpoint_named(self, title: str) -> str:
        # what the host's own search does not find here it looks for online, and downloads
        known = getattr(_module("sd_checkpoint"), "checkpoint_aliases", {})
        return str(getattr(known.get(title), "name", title))

    def task(self) -> str:
        return ""  # its page forgets the id when the request is done, so no run could be told to be its own

    def is_hires(self, p: Any) -> bool:
        from modules import processing_callbacks

        return super().is_hires(processing_callbacks.p or p)

    def schedule(self, sampler: str, scheduler: str) -> Schedule:
        return Schedule()  # to make a sampler is to give it to the model, whose image may be half done

    def obstacle(self, sampling: SamplingPass) -> Hint | None:
        def chosen(name: str) -> Any:
            own = getattr(self.p, name, None)
            return self.option(name) if own is None else own

        method = self.option("token_merging_method")
        if (self.option(MERGING.get(method, "")) or 0) > 0:
            return Hint(f"the WebUI's own token merging ({method}) is on", PLACE)
        tiled = chosen("hypertile_unet_enabled") and (sampling.hires or not chosen("hypertile_hires_only"))
        return Hint(HYPERTILE, PLACE) if tiled else None

    def is_sd2(self) -> bool:
        return getattr(getattr(self.unet(), "config", None), "cross_attention_dim", None) == SD2_WIDTH

    def pasted(self, reader: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
        # beside a bare value it takes the reader for a name, and fails for every field of the page
        return lambda entries: None if (value := reader(entries)) is None else gr.update(value=value)
