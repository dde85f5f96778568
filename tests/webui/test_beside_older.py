"""Beside the older extension sd-webui-agentattention, whose package has the name of ours.

AGENTSD_OLDER names its checkout; the WebUI imports extensions in the order of their folders' names.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host
from page import SECONDS, Panel, browser, generate, size
from test_forge import HIRES

OLDER = os.environ.get("AGENTSD_OLDER", "")
SAID = "has a package of the same name as ours, and its panel now runs on ours"
LATE, EARLY = "sd-webui-agentattention", "a-sd-webui-agentattention"
OURS = {"until": 1.0, "ratio": 0.4}
# calls into our script in a second: how often it looks for the panel
LOOKS = """() => new Promise(done => {
    const find = gradioApp;
    let count = 0;
    gradioApp = () => {
        if (new Error().stack.includes('agent_attention.js')) count += 1;
        return find();
    };
    setTimeout(() => { gradioApp = find; done(count); }, 1000);
})"""


@pytest.fixture(scope="module")
def beside(a1111: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    """The same checkout, started once more with the older extension in a folder of this name."""
    if not OLDER:
        pytest.skip("AGENTSD_OLDER does not name a checkout of sd-webui-agentattention")
    host, target = Host(a1111.root, a1111.kind, a1111.checkpoint), a1111.root / "extensions" / request.param
    host.log = a1111.root / f"agent-attention-tests-{request.param}.log"
    shutil.copytree(Path(OLDER), target, ignore=shutil.ignore_patterns(".git", "samples"))
    try:
        host.start()
        yield host
    finally:
        host.stop()
        shutil.rmtree(target)


ours_first = pytest.mark.parametrize("beside", [LATE], indirect=True)
theirs_first = pytest.mark.parametrize("beside", [EARLY], indirect=True)


@ours_first
def test_imported_first_ours_works_and_says_so(a1111: Host, beside: Host):
    assert f"the extension {LATE} {SAID}: disable it in the Extensions tab" in beside.console()
    for body in ({}, HIRES):
        assert beside.txt2img(**body).pixels == a1111.txt2img(**body).pixels
        assert beside.txt2img([OURS], **body).pixels == a1111.txt2img([OURS], **body).pixels


@ours_first
def test_imported_first_ours_says_so_in_the_panel(beside: Host):
    with browser(beside.url) as page:
        size(page, 512, 512)
        panel = Panel(page)
        panel.open()
        panel.said(SAID)
        assert page.evaluate(LOOKS) > 0


@ours_first
def test_imported_first_their_panel_runs_on_our_package(beside: Host):
    with browser(beside.url) as page:
        size(page, 128, 128)
        off = generate(page)
        page.locator("#tab_txt2img .label-wrap", has_text="AgentAttention").first.click()
        page.locator("#aa_active input").first.check()
        on = generate(page)
    assert "AgAt Active" in on
    assert "AgAt Active" not in off
    assert "Traceback" not in beside.console()
    assert beside.state()["own_forwards"] == 0


@theirs_first
def test_imported_first_theirs_is_told_of_and_nothing_waits_for_ever(beside: Host):
    console = beside.console()
    assert "Agent Attention can't start: another extension's package of the same name" in console
    assert "Disable that extension in the Extensions tab, then restart the WebUI." in console
    beside.txt2img(steps=1)
    asked: list[str] = []
    with browser(beside.url, panel=False) as page:
        page.on("request", lambda request: asked.append(request.url))
        end = time.monotonic() + 120
        while page.evaluate(LOOKS) and time.monotonic() < end:
            page.wait_for_timeout(5 * SECONDS)
        assert page.evaluate(LOOKS) == 0
    assert not [url for url in asked if "agent-attention" in url]
