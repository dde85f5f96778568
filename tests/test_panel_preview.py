"""The panel's preview, what it says for every pass, and the routes by which a page asks; without a WebUI."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which gradio brings")

from blocks import golden_unet, sdxl_like_unet
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from tuned_models import KEPT, TEXT

from agentsd import costs
from agentsd.app.decision import Hint, Program, SamplingPass
from agentsd.app.preview import ACTS, NOTE, NOTHING, WRONG, page_data, preview
from agentsd.panel.routes import LARGEST, SMALLEST, Routes, hires_size
from agentsd.settings import schema
from agentsd.settings.presets import CUSTOM, PRESETS


def a_pass(side=512, steps=20, of="first", strength=1.0):
    return SamplingPass((side // 8, side // 8), of, Program().moments(of, steps, 0, strength))


def img2img(strength, steps=20):
    return a_pass(512, steps, "img2img", strength)


HERE, HIRES = a_pass(), a_pass(1024, 20, "hires", 0.5)


class Host(Program):
    """A program that shows the panel."""

    def __init__(self, unet=None, obstacle=None, advice=(), kept=()):
        self._unet, self._obstacle, self._advice, self._kept = unet, obstacle, list(advice), kept

    def unet(self):
        return self._unet

    def kept(self, sampling):
        wanted = sampling.of, sampling.latent
        return next((kept for kept in self._kept if (kept.of, kept.tuning.size) == wanted), None)

    def obstacle(self, sampling):
        return self._obstacle if not sampling.hires else None

    def advice(self, values):
        return self._advice


def said(values=None, *passes, host=None):
    """(text, hint) of each line; the last line of all, that no model is loaded, is left out."""
    lines = preview(values or {}, passes or (HERE,), 2, host or Host())["lines"]
    return [(line["text"], line["hint"]) for line in lines if "No model is loaded" not in line["text"]]


def test_the_defaults_at_512():
    [(text, hint)] = said()
    layout, config = costs.layouts()["SD 1"], schema.to_config(schema.check({"enabled": True}))
    gain = 1 / costs.estimate(layout, config, 64, 64).share
    expected = rf"Expected: about {gain:.2f}× faster by FLOPs, at most (1\.\d\d)×\."
    told = re.fullmatch(rf"512×512: 4096 tokens → 256 agents in 5 layers, in all 20 steps\. {expected}", text)
    assert float(told[1]) > gain > 1
    assert hint == ""


SIMILARITY = {"method": "agent", "agent_source": "similarity", "ratio": 0.4}
LATE = {"until": 0.6}
NOTHING_HAPPENS = "nothing happens."
SAID = [  # settings, the pass, words, the hint
    ({"method": "merge", "ratio": 0.4}, HERE, "4096 tokens → 2458 merged in 5 layers, in all 20 steps.", ""),
    ({"method": "agent", "ratio": 0.4}, HERE, "4096 tokens → 256 agents (2458 queries) in 5 layers, in all 20", ""),
    ({"rules": "downsample=2 max_downsample=2 method=pool | blocks=middle_block.* full"}, HERE,
        "4096 tokens → 256 agents in 5 layers, 1024 tokens → 64 pooled keys in 5 layers, in all 20 steps.", ""),
    ({"rules": "until=0.5 full"}, HERE, "4096 tokens → 256 agents in 5 layers, in 10 of 20 steps.", ""),
    ({"merge_attn": False, "merge_mlp": True, "ratio": 0.4}, HERE, "tokens merged outside self-attention, in all 20",
        "Self-attention is left alone: self-attention is left out. Change “Merge self-attention”."),
    ({"method": "corrected", "max_agents": 9, "merge_mlp": True, "ratio": 0.4}, HERE,
        "tokens merged outside self-attention, in all 20 steps.",
        "Self-attention is left alone: at most 9 agents would be too few to correct. Change “Maximum agents”."),
    ({**SIMILARITY, "agent_ratio": 0.5}, HERE, "2458 merged",
        "No agents: 2048 agents are too many for 2458 queries (fewer than half are needed). "
        "Change “Agent ratio” or “Ratio”."),
    ({**SIMILARITY, "agent_ratio": 0.0}, HERE, "2458 merged", ""),  # it was asked for
    # img2img makes a step more than its strength times the steps
    (LATE, img2img(0.5), ", in 3 of 11 steps.", ""),
    (LATE, img2img(0.75, 4), ", in 2 of 4 steps.", ""),
    (LATE, img2img(1.0, 1), ", in 1 of 1 steps.", ""),
    (LATE, img2img(0.25), NOTHING_HAPPENS,
        "0.74 of the diffusion is done when this pass begins, and agents end at 0.6. Change “Until”."),
    ({**LATE, "after": "token merging"}, img2img(0.25), "2458 merged",
        "Agents end before this pass begins, so only what comes afterwards is done. Change “Until”."),
    ({"since": 0.1, "until": 0.2}, a_pass(steps=4), "in 0 of 4 steps.",
        "No step lies between From and Until. Change “From” or “Until”."),
    ({"min_tokens": 5000}, HERE, NOTHING_HAPPENS,
        "4096 tokens are fewer than the minimum of 5000. Change “Minimum tokens”."),
    ({"merge_attn": False}, HERE, NOTHING_HAPPENS, "Self-attention is left out. Change “Merge self-attention”."),
    ({"since": 0.7, "until": 0.6}, HERE, NOTHING_HAPPENS, "Until must be above From (0.7), got 0.6."),
    ({"passes": "hires"}, HERE, NOTHING_HAPPENS, "Only the hires pass is chosen, and there is none. Change “Passes”."),
    ({"method": "agent", "agent_ratio": 0.1}, HERE, NOTHING_HAPPENS,
        "4096 agents are too many for 4096 queries (fewer than half are needed). Change “Agent ratio”."),
    ({"method": "pool", "sx": 1, "sy": 1}, HERE, NOTHING_HAPPENS,
        "Cells of 1×1 pool nothing. Change “Cell width” or “Cell height”."),
    ({"method": "merge"}, HERE, NOTHING_HAPPENS, "No token is merged. Change “Ratio”."),
    ({"method": "corrected", "max_agents": 9}, HERE, NOTHING_HAPPENS,
        "At most 9 agents would be too few to correct. Change “Maximum agents”."),
    ({"rules": "downsample=1 full"}, HERE, NOTHING_HAPPENS, "Full attention was asked for. Change “Rules”."),
    ({"method": "agent", "min_tokens": 0}, a_pass(64), "64 tokens → 4 agents in 5 layers, in all 20 steps. No gain",
        "Nothing is gained from layers of 64 tokens. Change “Minimum tokens”."),
    ({"method": "agent", "min_tokens": 0}, a_pass(128), "No gain in time is expected.",
        "Nothing is gained from layers of 256 tokens. Change “Minimum tokens”."),
    ({"min_tokens": 512}, a_pass(64), NOTHING_HAPPENS, "Nothing is to be gained from layers of 64 tokens."),
]  # fmt: skip


@pytest.mark.parametrize(("values", "sampling", "words", "hint"), SAID)
def test_what_is_done_and_why_not_more(values, sampling, words, hint):
    told = preview(values, [sampling], 2, Host())
    line = told["lines"][0]
    assert line["text"].startswith(f"{sampling}: ")
    assert words in line["text"]
    assert line["hint"] == hint
    assert (line["state"] == NOTHING) == (words == NOTHING_HAPPENS or "No gain" in words or "in 0 of" in words)


def test_what_the_model_has_counts_and_another_checkpoint_is_said():
    [_, (text, _)] = said({}, replace(HIRES, checkpoint="other.safetensors"), host=Host(golden_unet()))
    assert text == "Hires 1024×1024: made with other.safetensors, so figures are those of the loaded checkpoint."
    host = Host(sdxl_like_unet())
    hint = "Layers at level 2 are further down than level 1. Change “Layers down to”."
    assert said({"max_downsample": "1"}, host=host) == [("512×512: nothing happens.", hint)]
    [(text, _)] = said({"max_downsample": "auto"}, host=host)
    assert "1024 tokens → 64 agents" in text


def test_both_passes_and_what_keeps_one_from_us():
    first, second = said({}, HERE, HIRES)
    assert first[0].startswith("512×512: 4096 tokens")
    assert second[0].startswith("Hires 1024×1024: 16384 tokens → 512 agents in 5 layers")
    [(text, _)] = said({"passes": "hires"}, HERE, HIRES)
    assert text.startswith("Hires 1024×1024"), "a pass that is left out is not worth a line"
    host = Host(obstacle=Hint("HyperTile is on", ("Settings → HyperTile",)))
    hint = "HyperTile is on. Change “Settings → HyperTile”."
    assert said({}, HERE, HIRES, host=host) == [("512×512: nothing happens.", hint), second]


def test_a_bad_value_and_an_order_to_tune_are_said():
    told = preview({"min_tokens": -5}, [HERE], 2, Host())
    assert told["preset"] == CUSTOM
    hint = f"Minimum tokens must be a whole number from 0 to {2**24}, got -5."
    assert told["lines"] == [{"text": "", "hint": hint, "state": WRONG}]
    [(text, _)] = said({"tune": 0.005}, HERE, HIRES)
    assert text == "The next image is made without Agent Attention and tuned on, to within 0.5%."


def test_no_model_is_said_and_a_model_is_read():
    unloaded = preview({}, [HERE], 2, Host())
    assert unloaded["lines"][-1]["text"] == "No model is loaded yet: figures are those of SD 1."
    assert unloaded["model"] is False, "so the page asks again"
    assert preview({}, [HERE], 2, Host(golden_unet()))["model"] is True
    host = Host(golden_unet(), advice=[Hint("32 bits are advised", ("fp32",))])
    lines = preview({}, [HERE], 2, host)["lines"]
    assert "4096 tokens → 256 agents in 3 layers" in lines[0]["text"]
    assert lines[-1] == {"text": "", "hint": "32 bits are advised. Change “FP32 precision”.", "state": NOTE}


def test_the_preset_is_named_and_the_page_is_told_of_every_control():
    for name in [*PRESETS, CUSTOM]:
        assert preview(PRESETS.get(name, {"ratio": 0.33}), [HERE], 2, Host())["preset"] == name
    data = page_data()
    assert [row["name"] for row in data["rows"]] == list(schema.NAMES)
    assert set(data["presets"]) == set(PRESETS)
    assert all(data["help"][name] == schema.BY_NAME[name].tooltip for name in schema.NAMES)


def test_the_hires_size_is_the_webuis():
    sizes = {(1.55, 0, 0): (793, 1190), (2, 1000, 0): (1000, 1500), (2, 0, 1000): (666, 1000), (2, 90, 80): (90, 80)}
    assert {sliders: hires_size(512, 768, *sliders) for sliders in sizes} == sizes


# Tunings


def test_a_tuning_says_what_was_reached():
    tuned = {**PRESETS["Tuned"], "how_close": "2%"}
    told = preview(tuned, [HERE], 2, Host(kept=[KEPT]))
    line, greyed = told["lines"][0], set(told["idle"])
    assert greyed >= {"method", "seed", "min_tokens", "rules"}
    assert not greyed & {"fp32", "passes", "tuning", "how_close"}
    assert line["text"] == "512×512: tuned, U-Net output within 2% (deviation 1.7% measured). 1.60× measured."
    assert line["state"] == ACTS
    none = replace(KEPT, tuning=replace(KEPT.tuning, frontier=KEPT.tuning.frontier[1:]))
    (line,) = preview({**tuned, "how_close": "0.5%"}, [HERE], 2, Host(kept=[none]))["lines"][:1]
    assert line["text"] == "512×512: nothing happens."
    assert line["hint"] == "Nothing is faster within 0.5%, so full attention stays. Change “How close”."
    assert line["state"] == NOTHING


def test_a_pass_without_a_tuning_says_which_preset_applies():
    [(first, _), (second, _)] = said(PRESETS["Tuned"], HERE, HIRES, host=Host(kept=[KEPT]))
    assert first.startswith("512×512: tuned")
    instead = "Hires 1024×1024: not tuned on this checkpoint at this size, so Balanced applies: 16384 tokens → 512"
    assert second.startswith(instead)
    assert "so Custom applies" in said({"tuning": "auto", "method": "pool"})[0][0]


def test_a_plan_for_another_model_does_not_apply():
    [(_, hint)] = said({"tuning": TEXT}, host=Host(golden_unet()))
    assert "for another model" in hint, "as the run says"
    # as long as no model is loaded, it may
    assert said({"tuning": TEXT}) == [("512×512: tuned, U-Net output within 2%.", "")]


# The routes

STATE = {"tab": "txt2img", "values": {"until": 1.0}, "width": 512, "height": 512, "denoising": 0.5, "hires": None}
SLIDERS = {"scale": 2.0, "resize_x": 0, "resize_y": 0}
ROUTES = [("GET", "page"), ("GET", "status"), ("POST", "preview")]


def client(app=None):
    app = app or FastAPI()
    Routes(Host(golden_unet())).add(app)
    return TestClient(app)


BAD = [
    ({"width": SMALLEST - 1}, "width"),
    ({"width": None}, "width"),
    ({"height": 1e999}, "height"),
    ({"height": "tall"}, "height"),
    ({"denoising": 1.5}, "denoising"),
    ({"steps": 0}, "steps"),
    ({"batch_size": 10**9}, "batch_size"),
    ({"passes": [{"width": 64}]}, "passes"),  # an unknown field
    ({"hires": {**SLIDERS, "widht": 5}}, "widht"),
    ({"hires": {**SLIDERS, "scale": 16}}, f"from {SMALLEST} to {LARGEST}"),
    ({"hires": {**SLIDERS, "scale": 1e9}}, "scale"),
    ({"values": [1, 2]}, "values"),
]


def test_a_bad_body_is_named():
    page = client()
    for changes, said in BAD:
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
