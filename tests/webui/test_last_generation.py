"""What AUTOMATIC1111 keeps of its last generation (params.txt, for the arrow under an empty prompt), and two tabs."""

from __future__ import annotations

import pytest
from host import Host
from page import Panel, number, paste, reload, size, wait_for_panel
from test_a1111 import HIRES, entry
from test_browser import ALL, CHANGED

from agentsd.settings import infotext

AGENTS = {"method": "agent", "until": 1}
KINDS = {
    "one pass": {},
    "hires fix": HIRES,
    "two batches": {"n_iter": 2, "batch_size": 2},
    "img2img": {"denoising_strength": 0.7},
}


def kept(host: Host) -> str:
    """The host's last infotext."""
    return (host.root / "params.txt").read_text()


def make(host: Host, agents: list | None, body: dict):
    if "enable_hr" not in body and "denoising_strength" in body:
        return host.img2img(host.txt2img(steps=1).images[0], agents, **body)
    return host.txt2img(agents, **body)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_our_entry_while_we_are_on(a1111: Host, kind: str):
    made = make(a1111, [AGENTS], KINDS[kind])
    assert f"{infotext.KEY}: {infotext.write(entry(made))}" in kept(a1111)
    make(a1111, None, KINDS[kind])
    assert infotext.KEY not in kept(a1111)


def test_it_has_that_of_a_plots_last_cell(a1111: Host):
    plot = a1111.plot(("[Agent Attention] Method", "agent, pool"), steps=1, agents=[{"until": 1}])
    assert "method=pool" in plot.info["infotexts"][-1]
    assert "method=pool" in kept(a1111)


@pytest.mark.parametrize("action", ["interrupt", "skip", "raise"])
def test_it_has_our_entry_after_a_sampling_that_did_not_end(a1111: Host, action: str):
    a1111.arm(action, step=3)
    if action == "raise":
        with pytest.raises(RuntimeError, match="forced failure"):
            a1111.txt2img([AGENTS])
    else:
        a1111.txt2img([AGENTS])
    assert f"{infotext.KEY}: " in kept(a1111)


def test_it_has_no_entry_where_the_pass_was_left_alone(a1111: Host):
    with a1111.options(token_merging_ratio=0.5):
        a1111.txt2img([AGENTS])
        assert infotext.KEY not in kept(a1111)
    a1111.txt2img([{**AGENTS, "ratio": 7}])
    assert infotext.KEY not in kept(a1111)


def test_the_arrow_under_an_empty_prompt_brings_the_settings_back(a1111: Host, page, panel: Panel):
    a1111.txt2img([CHANGED], width=64, height=64, steps=1)
    reload(page)
    paste(page, "")
    panel.open()
    assert panel.values() == ALL


def test_two_tabs_tell_of_their_own_runs(a1111: Host, page, panel: Panel):
    """Both press Generate at about the same time: the host makes one image after the other."""
    page_of_another = page.context.browser.new_page(viewport={"width": 1400, "height": 1300})
    page_of_another.goto(a1111.url, wait_until="domcontentloaded")
    wait_for_panel(page_of_another)
    panels = {256: panel, 192: Panel(page_of_another)}
    for side, one in panels.items():
        one.open()
        one.choose("Paper")
        one.set("min_tokens", 0)
        number(one.page, "txt2img_steps", 4)
        size(one.page, side, side)
    for one in panels.values():
        one.page.locator("#txt2img_generate").click()
    for side, one in panels.items():
        one.said(f"{side}×{side}", "status")
    page_of_another.close()
