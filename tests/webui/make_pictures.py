"""Make the pictures of docs/user.md on a real AUTOMATIC1111 WebUI.

Usage: python tests/webui/make_pictures.py WEBUI_FOLDER docs/img

The checkpoint is the tests' small one with random weights: its images are noise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.extend(map(str, Path(__file__).resolve().parents[1:3]))

from host import Host
from page import SECONDS, Panel, browser, generate, open_settings, paste, size
from PIL import Image


def take(target: Any, path: Path, colours: int = 256, scale: float = 1.0) -> None:
    """A picture of an element, in a palette: a page of text needs no more."""
    target.page.wait_for_timeout(SECONDS)
    target.screenshot(path=path)
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((round(scale * picture.width), round(scale * picture.height)))
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


def pictures(page: Any, folder: Path, prompt: str) -> None:
    """The tour, step by step."""
    paste(page, prompt)
    panel = Panel(page)

    def min_tokens(number: int) -> None:
        panel.unfold("more")
        panel.set("min_tokens", number)
        panel.unfold("more", False)

    panel.switch(True)
    panel.choose("Balanced")
    size(page, 512, 512)
    take(panel.at(), folder / "panel.png")
    min_tokens(5000)
    take(panel.at("summary"), folder / "panel-hint.png")
    min_tokens(0)
    panel.choose("Paper")
    size(page, 256, 192)
    panel.unfold("map")
    panel.check("record")
    generate(page)
    page.wait_for_timeout(2 * SECONDS)
    take(panel.at("map"), folder / "panel-map.png", colours=48, scale=2 / 3)
    take(panel.at("status"), folder / "panel-last-run.png")
    panel.unfold("map", False)
    panel.choose("Balanced")
    panel.unfold("tuner")
    size(page, 256, 256)
    panel.set("how_close", "5%")
    panel.press("tune_next")
    generate(page)
    panel.at("tuned", "svg").wait_for(timeout=120 * SECONDS)
    take(panel.at("tuned"), folder / "panel-tune.png")
    open_settings(page)
    take(page.locator("#settings_agent_attention"), folder / "panel-settings.png")


def main(webui: str, folder: str) -> None:
    host = Host(Path(webui).resolve(), "a1111", "tinysd1")
    try:
        host.install()
        (host.root / "ui-config.json").write_text("{}")
        with host.running():
            prompt = host.txt2img(width=64, height=64, steps=10).infotext
            with browser(host.url, device_scale_factor=1.5) as page:
                pictures(page, Path(folder), prompt)
    finally:
        host.uninstall()


if __name__ == "__main__":
    main(*sys.argv[1:])
