"""The WebUI's page in headless Chromium: what a person does with the panel."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from servers import chromium

from agentsd.panel.controls import element_id
from agentsd.settings.schema import BY_NAME, NAMES

SECONDS = 1000


class Panel:
    """The extension's panel in one tab of the page."""

    def __init__(self, page: Any, tab: str = "txt2img") -> None:
        self.page, self.tab = page, tab

    def at(self, name: str = "", inner: str = "") -> Any:
        """An element of the panel; without a name, the accordion around it."""
        return self.page.locator(f"#{element_id(self.tab, name)} {inner}".strip()).first

    def open(self) -> None:
        """Tick the box, which opens the panel, and unfold the rest."""
        self.switch(True)
        self.unfold("more")
        self.at("seed").wait_for(state="visible")

    def unfold(self, name: str, on: bool = True) -> None:
        """Open "more", "tuner" or "map", if it is folded, or fold it."""
        label = self.at(name, "> .label-wrap")
        if ("open" in (label.get_attribute("class") or "").split()) is not on:
            label.click()
        self.page.wait_for_timeout(300)

    def switch(self, on: bool) -> None:
        if self.get("enabled") is not on:
            self.at("", "> .label-wrap").click()
        self.page.wait_for_timeout(300)

    def set(self, name: str, value: Any) -> None:
        """Do what a person does to give a control this value."""
        kind = BY_NAME[name].kind
        if kind == "flag":
            self.check(name, value)
        elif kind == "choice":
            self._choose(name, re.compile(rf"(^|\s){re.escape(value)}\s*$"))
        else:
            self.type(name, str(value))
            self._field(name).blur()

    def check(self, name: str, on: bool = True) -> None:
        self.at(name, "input[type=checkbox]").set_checked(on)

    def type(self, name: str, text: str) -> None:
        """Type into a number's or a text's field, and stay there."""
        self._field(name).fill(text)

    def _field(self, name: str) -> Any:
        text = name in BY_NAME and BY_NAME[name].kind == "text"
        return self.at(name, "textarea" if text else "input[type=number]")

    def _choose(self, name: str, words: Any) -> None:
        self.at(name, "input").click()
        options = self.page.locator(f"#{element_id(self.tab, name)} li, ul.options li")
        options.filter(has_text=words).first.click()

    def slide(self, name: str, value: int) -> None:
        """Move one of the token map's sliders."""
        self.type(name, str(value))
        self._field(name).blur()
        self.page.wait_for_timeout(2 * SECONDS)

    def picture(self, name: str) -> Image.Image:
        """What an image of the panel shows."""
        return pixels(self.at(name, "img"))

    def press(self, name: str) -> None:
        """Press one of the panel's buttons."""
        self.at(name).click()

    def choose(self, preset: str) -> None:
        """Choose a preset."""
        self._choose("preset", preset)
        self.page.wait_for_timeout(700)

    def get(self, name: str) -> Any:
        """What a control shows, as its setting's canonical value."""
        row = BY_NAME[name]
        if name == "enabled":
            return self.page.locator(f"#{element_id(self.tab)}-visible-checkbox").is_checked()
        if row.kind == "flag":
            return self.at(name, "input[type=checkbox]").is_checked()
        if row.kind == "choice":
            return row.check(self.at(name, "input").input_value())
        return row.parse(self._field(name).input_value())

    def values(self) -> dict[str, Any]:
        return {name: self.get(name) for name in NAMES}

    def text(self, name: str) -> str:
        """The words of "summary", "status" or "map_text"."""
        return self.at(name).inner_text()

    def said(self, words: str, name: str = "summary") -> str:
        """Wait until an element of the panel has these words; all of its words then."""
        self._wait("([id, words]) => document.getElementById(id)?.innerText.includes(words)", name, words)
        return self.text(name)

    def shows(self, preset: str) -> None:
        """Wait until the preset's control says so."""
        self._wait("([id, name]) => document.querySelector(`#${id} input`).value === name", "preset", preset)

    def _wait(self, condition: str, name: str, words: str) -> None:
        self.page.wait_for_function(condition, arg=[element_id(self.tab, name), words], timeout=120 * SECONDS)


def pixels(img: Any) -> Image.Image:
    """What an image of the page shows."""
    data = img.evaluate(
        """async img => {
            await img.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
            canvas.getContext('2d').drawImage(img, 0, 0);
            return canvas.toDataURL('image/png');
        }"""
    )
    return Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))


@contextmanager
def browser(url: str, panel: bool = True, **context: Any) -> Iterator[Any]:
    """A page of the WebUI, drawn with our `panel` or without; afterwards none of our lines may have failed in it."""
    with chromium() as running:
        page = running.new_page(**{"viewport": {"width": 1400, "height": 1300}, **context})
        page.set_default_timeout(120 * SECONDS)  # a busy machine draws slowly
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded", timeout=120 * SECONDS)
        wait_for_panel(page, panel)
        yield page
        assert not [error for error in errors if "gent" in error]


def wait_for_panel(page: Any, panel: bool = True) -> None:
    """Wait until gradio has drawn the page and the host's scripts have seen it."""
    page.wait_for_selector("#txt2img_prompt textarea", timeout=400 * SECONDS)  # SD.Next on a busy machine
    if panel:
        page.wait_for_selector(f"#{element_id('txt2img')}-visible-checkbox", state="attached", timeout=60 * SECONDS)
    page.wait_for_timeout(3 * SECONDS)


def go_to(page: Any, tab: str) -> None:
    """Open one of the host's tabs by the words on it."""
    page.locator("#tabs button", has_text=tab).first.click()


def send(page: Any, infotext: str, image: Image.Image, folder: Path, tab: str = "txt2img") -> None:
    """Load an image with this infotext in the tab PNG Info, and send it to another tab."""
    file, data = folder / "sent.png", PngInfo()
    data.add_text("parameters", infotext)
    image.save(file, pnginfo=data)
    go_to(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(str(file))
    page.wait_for_timeout(3 * SECONDS)
    page.locator(f"#tab_pnginfo #{tab}_tab").click()
    page.wait_for_timeout(3 * SECONDS)


def reload(page: Any) -> None:
    page.reload(wait_until="domcontentloaded")
    wait_for_panel(page)


def number(page: Any, element: str, value: float) -> None:
    """Type a number into one of the host's own fields."""
    field = page.locator(f"#{element} input[type=number]").first
    field.fill(str(value))
    field.blur()


def size(page: Any, width: int, height: int, tab: str = "txt2img", steps: int | None = None) -> None:
    for name, value in (("width", width), ("height", height), ("steps", steps)):
        if value is not None:
            number(page, f"{tab}_{name}", value)


def open_settings(page: Any, section: str = "Agent Attention") -> None:
    """Open a section of the host's settings page."""
    go_to(page, "Settings")
    page.locator("#settings button", has_text=section).first.click()
    page.wait_for_timeout(SECONDS)


def paste(page: Any, text: str, tab: str = "txt2img") -> None:
    """Put an infotext into the prompt and press the arrow under it."""
    page.locator(f"#{tab}_prompt textarea").fill(text)
    page.wait_for_timeout(300)
    page.locator(f"#{tab}_tools #paste").click()
    page.wait_for_timeout(3 * SECONDS)


def generate(page: Any, tab: str = "txt2img") -> str:
    """Press Generate; the infotext under the image."""
    told = f"document.querySelector('#html_info_{tab}').innerText.includes('Steps:')"
    page.locator(f"#{tab}_generate").click()
    page.wait_for_timeout(SECONDS)
    page.locator(f"#{tab}_interrupt").wait_for(state="hidden", timeout=600 * SECONDS)
    page.wait_for_function(told, timeout=60 * SECONDS)
    return page.locator(f"#html_info_{tab}").first.inner_text()
