"""The panel's routes: whole bodies are checked, and a login of the host's page is asked for."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which gradio brings")

from blocks import golden_unet
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from test_panel_preview import Host

from agentsd.panel.routes import LARGEST, SMALLEST, Routes

STATE = {"tab": "txt2img", "values": {"until": 1.0}, "width": 512, "height": 512, "denoising": 0.5, "hires": None}
HIRES = {"scale": 2.0, "resize_x": 0, "resize_y": 0}
ROUTES = [("GET", "page"), ("GET", "status"), ("POST", "preview")]


def client(host=None, app=None):
    app = app or FastAPI()
    Routes(host or Host(golden_unet())).add(app)
    return TestClient(app)


def ask(body, name="preview", **more):
    return client(**more).post(f"/agent-attention/{name}", json=body)


def test_the_preview_is_of_the_passes_that_would_be_made():
    lines = ask({**STATE, "hires": HIRES}).json()["lines"]
    assert [line["text"].split(":")[0] for line in lines] == ["512×512", "Hires 1024×1024"]
    lines = ask({**STATE, "tab": "img2img", "values": {"until": 0.4}}).json()["lines"]
    assert "0.47 of the diffusion is done when this pass begins" in lines[0]["hint"]


BAD = {
    "too wide": ({"width": 800_000}, "width"),
    "too narrow": ({"width": SMALLEST - 1}, "width"),
    "infinite": ({"height": 1e999}, "height"),
    "not a number": ({"height": "tall"}, "height"),
    "no size": ({"width": None}, "width"),
    "too much noise": ({"denoising": 1.5}, "denoising"),
    "no step": ({"steps": 0}, "steps"),
    "an endless batch": ({"batch_size": 10**9}, "batch_size"),
    "unknown field": ({"passes": [{"width": 64}]}, "passes"),
    "unknown hires slider": ({"hires": {**HIRES, "widht": 5}}, "widht"),
    "hires too large": ({"hires": {**HIRES, "scale": 16}}, f"from {SMALLEST} to {LARGEST}"),
    "hires far too large": ({"hires": {**HIRES, "scale": 1e9}}, "scale"),
    "values are no mapping": ({"values": [1, 2]}, "values"),
}


def test_a_bad_body_is_named():
    page = client()
    for changes, said in BAD.values():
        text = json.dumps({**STATE, **changes})
        answer = page.post("/agent-attention/preview", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert said in answer.text.lower()


def with_login() -> FastAPI:
    """A host whose page is behind a login, as gradio's is."""
    app = FastAPI()

    def login_check(request: Request) -> None:
        if request.cookies.get("access-token") != "secret":
            raise HTTPException(401, "Not authenticated")

    @app.get("/config", dependencies=[Depends(login_check)])
    def config() -> dict:
        return {}

    return app


@pytest.mark.parametrize(("method", "name"), ROUTES, ids=[" ".join(route) for route in ROUTES])
def test_a_login_is_asked_for_where_the_hosts_page_asks_for_it(method, name):
    body, page, path = {"json": STATE} if method == "POST" else {}, client(app=with_login()), f"/agent-attention/{name}"
    assert client().request(method, path, **body).status_code == 200
    assert page.request(method, path, **body).status_code == 401
    page.cookies.set("access-token", "secret")
    assert page.request(method, path, **body).status_code == 200
