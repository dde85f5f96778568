"""AUTOMATIC1111 started otherwise: behind a login, short of memory, beside the older extension.

AGENTSD_OLDER names a checkout of sd-webui-agentattention, whose package has the name of ours; the WebUI imports
extensions in the order of their folders' names.
"""

from __future__ import annotations

import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import PROBE, Host, acted
from page import SECONDS, Panel, browser, generate, size
from servers import HostError
from test_a1111 import HIRES
from test_tune import PLAN, SMALL

from agentsd.settings import infotext

USER, PASSWORD = "cat", "mouse"
STATE = {"tab": "txt2img", "values": {"passes": "hires"}, "width": 512, "height": 512, "denoising": 0.7, "hires": None}


@pytest.fixture(scope="module")
def guarded(a1111: Host) -> Iterator[Host]:
    with a1111.again("--gradio-auth", f"{USER}:{PASSWORD}") as host:
        yield host


def status(host: Host, path: str, body: Any = None, cookie: str = "") -> str:
    """The status of the answer, "200" if it is one."""
    try:
        host.call(path, body, Cookie=cookie)
    except HostError as error:
        return str(error)[:3]
    return "200"


def log_in(host: Host) -> str:
    body = f"username={USER}&password={PASSWORD}".encode()
    with urllib.request.urlopen(urllib.request.Request(f"{host.url}/login", body), timeout=60) as answer:
        return answer.headers["Set-Cookie"].split(";")[0]


def test_behind_a_login_every_route_asks_for_the_cookie(a1111: Host, guarded: Host):
    assert status(guarded, "/config") == "401"
    cookie = log_in(guarded)
    for name, body in (("page", None), ("status", None), ("preview", STATE)):
        path = f"/agent-attention/{name}"
        answers = [status(guarded, path, body, given) for given in ("", "access-token=guessed", cookie)]
        assert (*answers, status(a1111, path, body)) == ("401", "401", "200", "200"), name


def test_the_page_shows_the_preview_after_the_login(guarded: Host):
    token = log_in(guarded).partition("=")[2]
    cookie = {"name": "access-token-unsecure", "value": token, "domain": "127.0.0.1", "path": "/", "sameSite": "Lax"}
    cookie |= {"expires": -1, "httpOnly": True, "secure": False}
    with browser(guarded.url, storage_state={"cookies": [cookie], "origins": []}) as page:
        panel = Panel(page)
        panel.open()
        panel.said("512×512")


@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_where_the_u_net_comes_to_its_device_for_the_sampling(a1111: Host, flag: str):
    with a1111.again(flag) as host:
        host.call(PROBE + "/every-gain-counts", {})
        off, on = host.txt2img(), host.txt2img([{}])
        assert on.pixels != off.pixels
        assert acted(host.status()["passes"][0])
        made = host.txt2img([{"tune": 0.05}], **SMALL)
        assert made.pixels == host.txt2img(**SMALL).pixels
        assert made.written[infotext.TUNED].startswith(PLAN)
        used = host.txt2img([{"tuning": "auto", "how_close": 0.05}], **SMALL)
        assert used.infotext.count("tuning=first") == 1


# Beside the older extension

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
    """The same checkout with the older extension in a folder of this name."""
    if not OLDER:
        pytest.skip("AGENTSD_OLDER does not name a checkout of sd-webui-agentattention")
    target = a1111.root / "extensions" / request.param
    shutil.copytree(Path(OLDER), target, ignore=shutil.ignore_patterns(".git", "samples"))
    try:
        with a1111.again() as host:
            yield host
    finally:
        shutil.rmtree(target)


@pytest.mark.parametrize("beside", [LATE], indirect=True)
def test_imported_first_ours_works_says_so_and_serves_their_panel(a1111: Host, beside: Host):
    assert f"the extension {LATE} {SAID}: disable it in the Extensions tab" in beside.console()
    for body in ({}, HIRES):
        assert beside.txt2img(**body).pixels == a1111.txt2img(**body).pixels
        assert beside.txt2img([OURS], **body).pixels == a1111.txt2img([OURS], **body).pixels
    with browser(beside.url) as page:
        panel = Panel(page)
        panel.open()
        panel.said(SAID)
        assert page.evaluate(LOOKS) > 0
        panel.switch(False)
        size(page, 128, 128)
        off = generate(page)
        page.locator("#tab_txt2img .label-wrap", has_text="AgentAttention").first.click()
        page.locator("#aa_active input").first.check()
        on = generate(page)
    assert ("AgAt Active" in on, "AgAt Active" in off) == (True, False)
    assert "Traceback" not in beside.console()
    assert beside.state()["own_forwards"] == 0


@pytest.mark.parametrize("beside", [EARLY], indirect=True)
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
