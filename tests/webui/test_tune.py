"""Tuning on a real AUTOMATIC1111 WebUI: by the API, and in the page."""

from __future__ import annotations

import threading
import time

import pytest
from host import PROBE, Host
from page import SECONDS, Panel, browser, generate, paste, pixels, size

from agentsd.settings import infotext
from agentsd.settings.presets import TUNED

# small, so that tuning takes seconds
SIDE = 256
SMALL = {"width": SIDE, "height": SIDE, "steps": 3}
PLAN = f"first tuning 1 {SIDE // 8}x{SIDE // 8} 0.05"


@pytest.fixture(scope="module")
def tuned(a1111: Host):
    """What a generation that tuned has answered."""
    a1111.call(PROBE + "/every-gain-counts", {})
    return a1111.txt2img([{"tune": 0.05}], **SMALL)


def test_the_image_is_made_without_us_and_the_plan_answered_used_and_carried_by_the_image(a1111: Host, tuned):
    assert tuned.pixels == a1111.txt2img(**SMALL).pixels
    plan = tuned.written[infotext.TUNED]
    assert plan.startswith(PLAN)
    assert infotext.KEY not in tuned.infotext, "neither settings nor a note: it was made without us"
    assert a1111.state()["hooks"] == 0
    auto = a1111.txt2img([{"tuning": "auto", "how_close": 0.05}], **SMALL)
    assert auto.pixels == a1111.txt2img([{"tuning": plan}], **SMALL).pixels
    assert f"tuning={plan}" in auto.infotext
    assert "U-Net output within 5%" in a1111.status()["text"]
    batch = a1111.txt2img([{"tuning": plan}], **SMALL, batch_size=2)
    assert batch.info["all_seeds"][0] == auto.info["all_seeds"][0]


def test_both_passes_are_tuned(a1111: Host):
    made = a1111.txt2img([{"tune": 0.05}], **SMALL, enable_hr=True, hr_scale=1.5, denoising_strength=0.6)
    plans = made.written[infotext.TUNED].split(" & ")
    assert [plan.split()[0] for plan in plans] == ["first", "hires"]
    assert f"{SIDE * 3 // 16}x{SIDE * 3 // 16}" in plans[1]


ADDED = {"LoRA": "a cat <lora:tinylora:1>", "hypernetwork": "a cat <hypernet:tinyhn:1>"}


@pytest.mark.parametrize("what", ADDED)
def test_what_is_loaded_is_tuned_with(a1111: Host, tuned, what: str):
    """Its effect on attention is part of what is compared: without it, nothing would be close."""
    prompt = {"prompt": ADDED[what]}
    plain = a1111.txt2img(**SMALL, **prompt)
    assert plain.pixels != a1111.txt2img(**SMALL).pixels
    made = a1111.txt2img([{"tune": 0.05}], **SMALL, **prompt)
    assert made.pixels == plain.pixels
    plan = made.written[infotext.TUNED]
    assert plan.startswith(PLAN)
    kept = a1111.call(PROBE + "/tunings")[0]
    assert all(moment["measured"] <= 0.05 for moment in kept["tuning"]["plan"]["deviations"])
    assert kept["presets"].keys() >= {"Fast", "Faithful"}
    assert all(preset["deviation"] < 0.5 for preset in kept["presets"].values())
    used = a1111.txt2img([{"tuning": plan}], **SMALL, **prompt)
    assert "U-Net output within 5%" in a1111.status()["text"]
    assert a1111.status()["notes"] == []
    assert used.pixels == a1111.txt2img([{"tuning": "auto", "how_close": 0.05}], **SMALL, **prompt).pixels
    assert a1111.state()["hooks"] == 0


@pytest.mark.parametrize("button", ["skip", "interrupt"])
def test_skip_and_interrupt_end_the_tuning_and_keep_the_image(a1111: Host, button: str):
    plain, made = a1111.txt2img(**SMALL), []
    before = a1111.txt2img([{"tuning": "auto"}], **SMALL).infotext
    making = threading.Thread(target=lambda: made.append(a1111.txt2img([{"tune": 0.03}], **SMALL)))
    making.start()
    while "Tuning" not in str((told := a1111.call("/sdapi/v1/progress?skip_current_image=true")).get("textinfo")):
        assert making.is_alive(), "it was not tuned"
        time.sleep(0.02)
    assert told["progress"] > 0
    a1111.call(f"/sdapi/v1/{button}", {})
    making.join()
    assert made[0].pixels == plain.pixels
    assert "not tuned; cancelled" in made[0].written[infotext.NOTE]
    assert a1111.state()["hooks"] == 0
    assert a1111.txt2img([{"tuning": "auto"}], **SMALL).infotext == before


def test_in_the_page_from_tuning_to_equal_pixels(a1111: Host, tmp_path):
    with browser(a1111.url) as page:
        panel = Panel(page)
        panel.open()
        size(page, SIDE, SIDE, steps=3)
        page.locator("#txt2img_seed input").fill("1")
        panel.unfold("tuner")
        for _ in range(2):  # it asks first
            panel.press("tune_forget_all")
        panel.set("how_close", "5%")
        panel.press("tune_next")
        panel.said("tuned on, to within 5%")
        page.locator("#txt2img_generate").click()
        page.wait_for_function(
            "document.querySelector('#txt2img_results .progress')?.innerText.includes('Tuning')", timeout=120 * SECONDS
        )
        page.locator("#txt2img_interrupt").wait_for(state="hidden", timeout=300 * SECONDS)
        panel.shows(TUNED)
        table = panel.at("tuned", "table")
        table.wait_for(timeout=20 * SECONDS)
        assert f"{SIDE}×{SIDE}" in table.inner_text()
        assert {"Fast", "Faithful", "5%"} <= set(panel.at("tuned").locator("svg text").all_text_contents())
        assert panel.get("tune") == 0
        panel.said("U-Net output within 5%")
        text = generate(page)
        assert f"tuning={PLAN}" in text
        first = shown(page)
        page.reload(wait_until="domcontentloaded")
        page.wait_for_timeout(5 * SECONDS)
        paste(page, text)
        assert panel.get("tuning").startswith(PLAN)
        assert generate(page) == text
        assert shown(page) == first
        exported_and_imported(page, panel, tmp_path)


def exported_and_imported(page, panel: Panel, folder) -> None:
    """A tuning leaves as a file, is forgotten, which the preview notices, and comes back."""
    panel.open()
    panel.choose(TUNED)
    panel.set("how_close", "5%")
    panel.said("U-Net output within 5%")
    panel.unfold("tuner")
    panel.press("tune_export")
    link = panel.at("tune_file", "a")
    link.wait_for(timeout=20 * SECONDS)
    with page.expect_download() as download:
        link.click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name.endswith(f"first-{SIDE}x{SIDE}.tuning.json")
    panel.press("tune_forget")
    panel.said("ot tuned on this checkpoint at this size")
    with page.expect_file_chooser() as chooser:
        panel.press("tune_import")
    chooser.value.set_files(file)
    panel.said("U-Net output within 5%")


def shown(page) -> bytes:
    """The pixels of the image that the gallery shows."""
    return pixels(page.locator("#txt2img_gallery img").first).tobytes()
