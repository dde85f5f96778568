"""How the panel and the settings page lie in AUTOMATIC1111's page: nothing overflows, the keyboard reaches it all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from host import Host, with_record
from page import SECONDS, Panel, browser, open_settings, reload, size

from agentsd.panel.controls import element_id
from agentsd.settings.schema import BY_NAME, DEFAULTS, NAMES

PANEL = element_id("txt2img")
SETTINGS = "settings_agent_attention"
FOLDS = {"more": "seed", "tuner": "tune_which", "map": "record"}  # and something inside
# what stands out of the window or of the box itself, and text that its element cuts off
STANDS_OUT = """id => {
    const box = document.getElementById(id), right = Math.min(box.getBoundingClientRect().right, innerWidth) + 1;
    // what is for screen readers alone is a pixel wide
    const shown = [...box.querySelectorAll('*')].filter(e => e.offsetParent && e.getBoundingClientRect().width > 1
        && !e.parentElement.closest('.agent-attention-scroll')); // what is inside scrolls
    const cut = e => e.scrollWidth > e.clientWidth + 1 && e.tagName !== 'INPUT'
        && ['hidden', 'clip'].includes(getComputedStyle(e).overflowX);
    return shown.filter(e => e.getBoundingClientRect().right > right || cut(e))
        .map(e => [e.tagName, e.id, e.className, e.innerText]);
}"""
# contrast of a text with what lies behind it, as WCAG 2 defines it
CONTRAST = """id => {
    const light = ([r, g, b]) => [[r, .2126], [g, .7152], [b, .0722]].reduce((sum, [c, share]) =>
        sum + share * (c <= 10.31 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4), 0);
    const rgba = text => text.match(/[\\d.]+/g).map(Number);
    const element = document.getElementById(id), text = [element, ...element.querySelectorAll('div')].at(-1);
    let behind = text;
    while (behind && (rgba(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
    const ground = getComputedStyle(behind || document.body).backgroundColor;
    const both = [light(rgba(getComputedStyle(text).color)), light(rgba(ground))];
    return (Math.max(...both) + .05) / (Math.min(...both) + .05);
}"""


def unfold_everything(page: Any) -> Panel:
    """The panel with its folds open and a token map shown."""
    panel = Panel(page)
    panel.open()
    for name in FOLDS:
        panel.unfold(name)
    panel.press("map_show")
    panel.at("map_image", "img").wait_for(timeout=30 * SECONDS)
    return panel


@pytest.fixture(scope="module", autouse=True)
def _recorded(a1111: Host) -> None:
    """A wide last image with a record, made without the page."""
    paper = {"agent_source": "similarity", "ratio": 0.4, "until": 1.0}
    a1111.txt2img(with_record(paper), width=192, height=64, steps=2)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_the_panel_with_all_its_folds_open_and_the_settings_page(a1111: Host, width: int, theme: str):
    with browser(f"{a1111.url}/?__theme={theme}", viewport={"width": width, "height": 1000}) as page:
        unfold_everything(page)
        page.wait_for_function(f"document.getElementById('{element_id('txt2img', 'summary')}').innerText.length > 9")
        for name in ("summary", "status", "map_text"):
            assert page.evaluate(CONTRAST, element_id("txt2img", name)) >= 4.5, name
        for section in (PANEL, SETTINGS):
            assert page.evaluate(STANDS_OUT, section) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            open_settings(page)


def stops(page: Any, box: str, prefix: str, first: str) -> list[dict]:
    """Where Tab leads from the element `first`, as far as it stays in `box`.

    Returns:
        "id", "top" and "left" of the control at each stop: the element around it whose id begins with `prefix`.
    """
    page.locator(first).first.focus()
    found = []
    for _ in range(120):
        stop = page.evaluate(
            """([box, prefix]) => {
                const control = document.activeElement.closest(`[id^=${prefix}]`);
                if (!control || !control.closest(`#${box}`)) return null;
                const {top, left} = control.getBoundingClientRect();
                return {id: control.id, top: top + scrollY, left};
            }""",
            [box, prefix],
        )
        if stop is None:
            break
        found.append(stop)
        page.keyboard.press("Tab")
    return found


def in_reading_order(one: dict, other: dict) -> bool:
    """Whether the one stands above the other, or beside it on the left."""
    down = other["top"] - one["top"]
    return down > 5 or (down >= -5 and other["left"] >= one["left"])


def test_tab_goes_through_the_panel_in_reading_order_and_the_settings_page(page):
    unfold_everything(page)
    found = stops(page, PANEL, f"{PANEL}_", f"#{element_id('txt2img', 'preset')} input")
    # what orders a tuning is hidden: the page's script sets it
    wanted = {*DEFAULTS, "record", "map_show", *FOLDS, "map_moment", "map_layer"} - {"enabled", "tune"}
    assert wanted <= {stop["id"].removeprefix(f"{PANEL}_") for stop in found}
    assert [(a["id"], b["id"]) for a, b in pairwise(found) if not in_reading_order(a, b)] == []
    open_settings(page)
    found = stops(page, SETTINGS, "setting_", "#setting_agent_attention_preset input")
    wanted = {f"setting_agent_attention_{name}" for name in ("preset", "log_level", "status_line")}
    assert wanted <= {stop["id"] for stop in found}


def test_the_keyboard_alone_opens_the_panel_and_works_it(page):
    reload(page)
    size(page, 64, 64, steps=1)
    panel, keys = Panel(page), page.keyboard
    page.locator("#txt2img_prompt textarea").focus()

    def tab_to(name: str, inner: str, key: str = "Tab") -> None:
        for _ in range(200):
            keys.press(key)
            if panel.at(name, inner).evaluate("element => element === document.activeElement"):
                return
        pytest.fail(f"Tab does not lead to {name} {inner}")

    tab_to("", "> .label-wrap")
    keys.press("Enter")
    panel.at("preset").wait_for()
    assert panel.get("enabled")
    tab_to("preset", "input")
    keys.type("Fast")
    keys.press("Enter")
    panel.shows("Fast")
    for name, inner in FOLDS.items():
        tab_to(name, "> .label-wrap")
        for key, opened in (("Enter", True), ("Space", False)):
            keys.press(key)
            page.wait_for_timeout(SECONDS)
            assert panel.at(name, "> .label-wrap").get_attribute("aria-expanded") == str(opened).lower()
            assert panel.at(inner).is_visible() is opened
    tab_to("more", "> .label-wrap", "Shift+Tab")
    keys.press("Enter")
    tab_to("min_tokens", "input")
    keys.type("0")
    keys.press("Control+Enter")
    assert "64×64" in panel.said("Last run", "status")
    assert panel.get("min_tokens") == 0


def test_no_other_control_of_the_tab_has_one_of_our_labels(page):
    """Translations go by the words alone."""
    ours = [BY_NAME[name].label for name in NAMES if name != "enabled"]
    count = """label => [...document.querySelectorAll('#tab_txt2img span')]
        .filter(e => !e.children.length && e.textContent.trim() === label).length"""
    assert {label: page.evaluate(count, label) for label in ours} == dict.fromkeys(ours, 1)
