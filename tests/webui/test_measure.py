"""The Measure button on a real AUTOMATIC1111 WebUI."""

from __future__ import annotations

import threading
import time

import pytest
from host import Host
from page import SECONDS, Panel, browser, reload, size

from agentsd.panel.controls import element_id

ROUTE = "/agent-attention/measure"
STATE = {"tab": "txt2img", "width": 128, "height": 128, "denoising": 0.7, "hires": None}
ON = {**STATE, "values": {"until": 1.0, "min_tokens": 0}}


def finished(host: Host, seconds: float = 600.0) -> dict:
    end = time.monotonic() + seconds
    while host.call(ROUTE)["state"] == "running" and time.monotonic() < end:
        time.sleep(0.2)
    return host.call(ROUTE)


def test_it_measures_and_leaves_no_trace(a1111: Host):
    before = a1111.txt2img()
    assert a1111.call(ROUTE, ON)["error"] == ""
    told = finished(a1111)
    assert told["state"] == "done", told["text"]
    [row] = told["rows"]
    outcome = dict(zip(told["head"], row, strict=True))
    assert outcome["Size"] == "128×128"
    for column, unit in (("Without", "ms"), ("With", "ms"), ("Speed-up", "×")):
        assert float(outcome[column].removesuffix(unit)) > 0
    assert told["min_tokens"] >= 0
    shown = a1111.call("/agent-attention/preview", ON)["lines"][0]["text"]
    assert f"measured: {outcome['Without'].split()[0]} → " in shown
    assert a1111.txt2img().pixels == before.pixels
    assert "measured 128×128" in a1111.console()


def test_it_refuses_while_an_image_is_made(a1111: Host):
    making = threading.Thread(target=lambda: a1111.txt2img(width=256, height=256, steps=20))
    making.start()
    try:
        end = time.monotonic() + 30
        while a1111.call("/sdapi/v1/progress?skip_current_image=true")["progress"] == 0 and time.monotonic() < end:
            time.sleep(0.1)
        assert a1111.call(ROUTE, ON)["error"] == ""
        told = finished(a1111)
    finally:
        making.join()
    assert told["state"] == "busy"
    assert "being generated" in told["text"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": {"ratio": -1}}, "ratio"),
        ({"values": {"until": 0.5}, "tab": "img2img", "denoising": 0.3}, "no pass is changed"),
    ],
)
def test_what_cannot_be_measured_is_answered_with_the_reason(a1111: Host, changes, reason):
    assert reason in a1111.call(ROUTE, {**STATE, **changes})["error"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 0}, "width"),
        ({"hires": {"scale": 16, "resize_x": 0, "resize_y": 0}, "width": 1024}, "hires pass"),
        ({"passes": []}, "passes"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(a1111: Host, changes, reason):
    with pytest.raises(RuntimeError, match=f"422.*{reason}"):
        a1111.call(ROUTE, {**ON, **changes})


def test_it_can_be_cancelled_in_its_last_seconds(a1111: Host):
    assert a1111.call(ROUTE, ON)["error"] == ""
    end = time.monotonic() + 120
    while a1111.call(ROUTE)["progress"] < 0.95 and time.monotonic() < end:
        time.sleep(0.02)
    a1111.call(ROUTE, method="DELETE")
    assert finished(a1111, 20)["state"] == "cancelled"


def test_in_the_page_with_progress_a_table_and_the_threshold(a1111: Host):
    with browser(a1111.url) as page:
        panel = Panel(page)
        panel.open()
        panel.choose("Fast")
        size(page, 128, 128)
        panel.unfold("tuner")
        page.locator(f"#{element_id('txt2img', 'measure')}").click()
        table = page.locator(f"#{element_id('txt2img', 'measured')} table").first
        table.wait_for(timeout=120 * SECONDS)
        assert "128×128" in table.inner_text()
        button = page.get_by_role("button", name="Set Minimum tokens to")
        button.click(timeout=60 * SECONDS)
        proposed = int(button.inner_text().split()[-1])
        assert panel.get("min_tokens") == proposed
        before = page.locator(f"#{element_id('txt2img', 'measured')}").first.inner_text()
        reload(page)
        panel.open()
        panel.unfold("tuner")
        table.wait_for(timeout=30 * SECONDS)
        assert page.locator(f"#{element_id('txt2img', 'measured')}").first.inner_text() == before


def test_in_the_page_it_can_be_cancelled(a1111: Host):
    with browser(a1111.url) as page:
        panel = Panel(page)
        panel.open()
        size(page, 512, 512)
        panel.unfold("tuner")
        page.locator(f"#{element_id('txt2img', 'measure')}").click()
        page.wait_for_function(
            f"document.getElementById('{element_id('txt2img', 'measured')}').innerText.includes('Measuring')"
        )
        page.locator(f"#{element_id('txt2img', 'measure_cancel')}").click()
        page.wait_for_function(
            f"document.getElementById('{element_id('txt2img', 'measured')}').innerText.includes('Cancelled')",
            timeout=60 * SECONDS,
        )
