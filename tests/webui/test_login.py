"""The extension's routes in a WebUI whose page is behind a login (--gradio-auth)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from host import Host
from page import Panel, browser

USER, PASSWORD = "cat", "mouse"
STATE = {"tab": "txt2img", "values": {"passes": "hires"}, "width": 512, "height": 512, "denoising": 0.7, "hires": None}
ROUTES = [("GET", "page"), ("GET", "status"), ("POST", "preview")]
every_route = pytest.mark.parametrize(("method", "name"), ROUTES, ids=[" ".join(route) for route in ROUTES])


@pytest.fixture(scope="module")
def guarded(a1111: Host) -> Iterator[Host]:
    """The same checkout, served once more behind a login."""
    host = Host(a1111.root, a1111.kind, a1111.checkpoint, flags=("--gradio-auth", f"{USER}:{PASSWORD}"))
    try:
        host.start()
        yield host
    finally:
        host.stop()


def ask(host: Host, method: str, path: str, cookie: str = "") -> int:
    """The status of the answer."""
    data = json.dumps(STATE).encode() if method == "POST" else None
    headers = {"Content-Type": "application/json", **({"Cookie": cookie} if cookie else {})}
    request = urllib.request.Request(host.url + path, data, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def log_in(host: Host) -> str:
    body = f"username={USER}&password={PASSWORD}".encode()
    with urllib.request.urlopen(urllib.request.Request(f"{host.url}/login", body), timeout=60) as answer:
        return answer.headers["Set-Cookie"].split(";")[0]


@every_route
def test_behind_a_login_a_route_asks_for_the_cookie(a1111: Host, guarded: Host, method: str, name: str):
    path = f"/agent-attention/{name}"
    assert ask(guarded, "GET", "/config") == 401
    assert ask(guarded, method, path) == 401
    assert ask(guarded, method, path, "access-token=guessed") == 401
    assert ask(guarded, method, path, log_in(guarded)) == 200
    assert ask(a1111, method, path) == 200, "where there is no login"


def test_the_page_shows_the_preview_after_the_login(guarded: Host):
    token = log_in(guarded).partition("=")[2]
    cookie = {"name": "access-token-unsecure", "value": token, "domain": "127.0.0.1", "path": "/", "sameSite": "Lax"}
    cookie |= {"expires": -1, "httpOnly": True, "secure": False}
    with browser(guarded.url, storage_state={"cookies": [cookie], "origins": []}) as page:
        panel = Panel(page)
        panel.open()
        panel.said("512×512")
