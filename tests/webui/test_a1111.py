"""The extension in a real AUTOMATIC1111 WebUI, through its HTTP API."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from host import SMALL_IMAGES, Host, Result
from PIL import Image, ImageDraw

from agentsd.methods import selectable
from agentsd.settings import infotext
from agentsd.settings.schema import ARGUMENTS, BY_NAME, DEFAULTS, IMPLIED, RECORD, SETTINGS, check

HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "denoising_strength": 0.6,
    "width": 128,
    "height": 128,
}
TINY = {"width": 64, "height": 64, "steps": 1}
# With layers that are not left alone by default
LARGER = {"width": 256, "height": 256, "steps": 2}
TABLES = {"min_tokens": DEFAULTS["min_tokens"]}
ON = [{"method": "agent", "until": 0.6}]  # beside a pass that has no agents any more


@pytest.fixture(scope="module")
def plain(a1111: Host) -> Result:
    """The first plain image; what any test leaves behind shows in the plain images after it."""
    return a1111.txt2img()


@pytest.fixture
def leaves_no_trace(a1111: Host, plain: Result):
    """Afterwards the plain image is what it was at first, pixel for pixel, and so are the U-Net's modules."""
    before = a1111.state()
    yield
    assert a1111.txt2img().pixels == plain.pixels
    after = a1111.state()
    assert (after["tree"], after["model"]) == (before["tree"], before["model"])


def use_checkpoint(host: Host, name: str) -> None:
    host.call("/sdapi/v1/options", {"sd_model_checkpoint": f"{name}.safetensors"})


def acted(one: dict) -> int:
    """The self-attention calls of a pass that were changed, by whatever method."""
    return sum(count for action, count in one["calls"].items() if action != "untouched")


def entry(result: Result) -> dict:
    """The settings that the image's infotext names."""
    return infotext.read(result.info["extra_generation_params"][infotext.KEY])


def inpainting() -> dict:
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).ellipse((32, 32, 96, 96), fill=255)
    from host import image_to_base64

    return {"mask": image_to_base64(mask), "denoising_strength": 0.9, "inpainting_fill": 1}


# On, off, and the same again


@pytest.mark.parametrize("checkpoint", ["tinysd1", "tinysd2v", "tinysdxl"])
def test_on_differs_repeats_and_goes(a1111: Host, checkpoint: str):
    use_checkpoint(a1111, checkpoint)
    try:
        plain, before = a1111.txt2img(), a1111.state()
        on, again = a1111.txt2img(ON), a1111.txt2img(ON)
        status = a1111.status()
        assert on.pixels != plain.pixels
        assert on.pixels == again.pixels
        assert a1111.txt2img().pixels == plain.pixels
        assert a1111.state()["tree"] == before["tree"]
        assert status["passes"][0]["calls"]["agents"] > 0
        assert status["passes"][0]["layers"][0]["tokens"] == (64 if checkpoint == "tinysdxl" else 256)
    finally:
        use_checkpoint(a1111, "tinysd1")


@pytest.mark.parametrize("method", [method.name for method in selectable()])
def test_every_method(a1111: Host, leaves_no_trace, plain: Result, method: str):
    """512×512, since some methods leave smaller layers alone."""
    size = {"width": 512, "height": 512, "steps": 2}
    settings = {"method": method, "until": 1, "ratio": 0.4 if method == "merge" else 0}
    off, on = a1111.txt2img(**size), a1111.txt2img([settings], **size)
    status = a1111.status()
    assert on.pixels != off.pixels
    assert status["notes"] == []
    action = next(other.action for other in selectable() if other.name == method)
    assert status["passes"][0]["calls"][action] > 0
    assert entry(on)["method"] == method
    assert a1111.txt2img([settings], **size).pixels == on.pixels
    assert a1111.txt2img(infotext=on.infotext, **size).pixels == on.pixels


def test_off_writes_nothing(a1111: Host, plain: Result):
    assert infotext.KEY not in plain.infotext
    assert a1111.txt2img([False, 0.4]).infotext == plain.infotext
    assert a1111.status()["text"] == ""
    assert "NGMS" in a1111.txt2img(ON, s_min_uncond=15.0).infotext, "others' entries stay"


SCENARIOS = {
    "hires fix": HIRES,
    "hires checkpoint": {**HIRES, "hr_checkpoint_name": "tinysd1b.safetensors"},
    "refiner": {"refiner_checkpoint": "tinysd1b.safetensors", "refiner_switch_at": 0.5},
    "batch count and size": {"batch_size": 2, "n_iter": 2, "steps": 2},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
    "Heun": {"sampler_name": "Heun"},
    "DPM++ SDE": {"sampler_name": "DPM++ SDE"},
    "DDIM": {"sampler_name": "DDIM"},
    "UniPC": {"sampler_name": "UniPC"},
    "NGMS": {"s_min_uncond": 15.0},
    "AND prompts": {"prompt": "a cat AND a dog :0.7 AND a bird"},
    "a long prompt": {"prompt": "a cat, " * 40},
    "LoRA": {"prompt": "a cat <lora:tinylora:1>"},
    "hypernetwork": {"prompt": "a cat <hypernet:tinyhn:1>"},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(a1111: Host, leaves_no_trace, scenario: str):
    body = SCENARIOS[scenario]
    off = a1111.txt2img(**body)
    on = a1111.txt2img([{"until": 1}], **body)
    status = a1111.status()
    assert all(a != b for a, b in zip(on.pixels, off.pixels, strict=True))
    assert a1111.txt2img([{"until": 1}], **body).pixels == on.pixels
    assert status["notes"] == []
    assert all(acted(one) for one in status["passes"])
    assert a1111.txt2img(**body).pixels == off.pixels


FIRST, SECOND = (False, [16, 16]), (True, [32, 32])


@pytest.mark.parametrize(("passes", "patched"), [("first", [FIRST]), ("hires", [SECOND]), ("both", [FIRST, SECOND])])
def test_passes(a1111: Host, passes: str, patched: list):
    a1111.txt2img([{"passes": passes}], **HIRES)
    assert [(one["hires"], one["latent"]) for one in a1111.status()["passes"]] == patched


def test_an_image_does_not_depend_on_its_batch(a1111: Host):
    settings = [{"agent_source": "similarity", "ratio": 0.4, "until": 1}]
    batch = a1111.txt2img(settings, batch_size=2, n_iter=1, steps=2, seed=5)
    alone = a1111.txt2img(settings, steps=2, seed=6)
    second = batch.images[-1].convert("RGB").tobytes()  # a grid comes first
    off = sum(abs(a - b) > 8 for a, b in zip(second, alone.pixels[0], strict=True))
    assert off < len(second) / 50


@pytest.mark.parametrize("kept", [1, 2])
def test_refiner_is_patched_when_it_takes_over(a1111: Host, leaves_no_trace, kept: int):
    with a1111.options(sd_checkpoints_limit=kept):
        body = SCENARIOS["refiner"]
        off, on = a1111.txt2img(**body), a1111.txt2img([{"until": 1}], **body)
        report = a1111.status()["passes"][0]
        # where only one is kept, the host may load the refiner's weights into the first model's U-Net
        assert report["models"] in {1: (1, 2), 2: (2,)}[kept]
        assert acted(report) == 4 * 5
        assert on.pixels != off.pixels
        # only the refiner's part
        late = a1111.txt2img([{"since": 0.6, "until": 1}], **body)
        assert late.pixels != off.pixels
        assert a1111.txt2img(**body).pixels == off.pixels


def test_refiner_of_another_layout(a1111: Host, leaves_no_trace):
    body = {"refiner_checkpoint": "tinysd2v.safetensors", "refiner_switch_at": 0.5}
    off = a1111.txt2img(**body)
    assert a1111.txt2img([{"until": 1}], **body).pixels != off.pixels
    assert a1111.status()["passes"][0]["models"] == 2
    assert a1111.txt2img(**body).pixels == off.pixels


@pytest.mark.parametrize("kept", [1, 2])
def test_checkpoint_switched_after_a_run(a1111: Host, leaves_no_trace, kept: int):
    with a1111.options(sd_checkpoints_limit=kept):
        use_checkpoint(a1111, "tinysd1b")
        other = a1111.txt2img()
        assert a1111.txt2img(ON).pixels != other.pixels
        use_checkpoint(a1111, "tinysd1")
        a1111.txt2img(ON)
        use_checkpoint(a1111, "tinysd1b")
        assert a1111.state()["loaded"] == kept
        assert a1111.txt2img().pixels == other.pixels
        use_checkpoint(a1111, "tinysd1")


@pytest.mark.parametrize("body", [{"denoising_strength": 0.9}, inpainting()], ids=["img2img", "inpainting"])
def test_img2img(a1111: Host, leaves_no_trace, plain: Result, body: dict):
    off = a1111.img2img(plain.images[0], **body)
    on = a1111.img2img(plain.images[0], [{"until": 1}], **body)
    assert on.pixels != off.pixels
    assert acted(a1111.status()["passes"][0])
    assert a1111.img2img(plain.images[0], **body).pixels == off.pixels


@pytest.mark.parametrize(
    "option", [{"batch_cond_uncond": False}, {"pad_cond_uncond": True}, {"upcast_attn": True}, {"skip_early_cond": 0.5}]
)
def test_options_of_the_host(a1111: Host, leaves_no_trace, option: dict):
    with a1111.options(**option):
        off = a1111.txt2img()
        assert a1111.txt2img([{"until": 1}]).pixels != off.pixels
        status = a1111.status()
    assert acted(status["passes"][0])
    assert status["notes"] == []


def test_nested_generation(a1111: Host, leaves_no_trace):
    """A second generation inside the first one's callbacks, with the same script arguments."""
    expected = a1111.txt2img(ON, n_iter=2)
    a1111.arm("nest")
    nested = a1111.txt2img(ON, n_iter=2)
    assert nested.pixels == expected.pixels
    assert entry(nested) == entry(expected)


# Every way out


@pytest.mark.parametrize("where", ["first pass", "hires pass", "img2img"])
@pytest.mark.parametrize(("action", "step"), [("raise", 1), ("raise", 3), ("interrupt", 2), ("skip", 1), ("stop", 3)])
def test_ways_out(a1111: Host, leaves_no_trace, plain: Result, action: str, step: int, where: str):
    a1111.arm(action, step=step, hires=where == "hires pass")
    with pytest.raises(RuntimeError, match="forced failure") if action == "raise" else nullcontext():
        if where == "img2img":
            a1111.img2img(plain.images[0], [{"until": 1}], denoising_strength=0.9)
        else:
            a1111.txt2img([{"until": 1}], **(HIRES if where == "hires pass" else {}))
    assert a1111.state()["armed"] == {}, "the probe has not acted"


# API


BAD = {
    "a list": [True, [0.4]],
    "nothing between": [{"since": 0.7, "until": 0.6}],
    "a long text": [{"method": "x" * 200_000}],
    "the older extension's list": [True, True, 20, 4, 4, 0.4, 0.95, 2, 2, 0.4, 0.5, False, 1, False],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(a1111: Host, leaves_no_trace, plain: Result, case: str):
    bad = a1111.txt2img(BAD[case])
    assert bad.pixels == plain.pixels
    reason = bad.info["extra_generation_params"][infotext.NOTE]
    assert len(reason) < 400
    assert infotext.KEY not in bad.info["extra_generation_params"]
    assert infotext.NOTE not in bad.infotext
    assert infotext.plain(a1111.status()["error"]) in reason
    assert a1111.status()["error"] in a1111.console()


def in_order(values: dict) -> list:
    """The settings as the API's positional arguments."""
    return [{**values, RECORD: False}[name] for name in ARGUMENTS]


def test_rules_by_level_and_block(a1111: Host, leaves_no_trace, plain: Result):
    """In every form that the API knows, and from the infotext: the same image, and another than without rules."""
    on, rules = a1111.txt2img([{"until": 1}]), {"until": 1, "rules": RULES}
    made = a1111.txt2img([rules])
    assert made.pixels not in (on.pixels, plain.pixels)
    done = a1111.status()["passes"][0]
    assert acted(done) > done["calls"]["pool"] > 0
    assert a1111.txt2img([{"until": 1, "rules": "full"}]).pixels == plain.pixels
    assert infotext.KEY in made.infotext
    assert entry(made)["rules"] == RULES
    listed = [
        {"downsample": 2, "until": 0.5, "settings": {"max_downsample": 2, "method": "pool"}},
        {"blocks": ["middle_block.*", "output_blocks.11.*"], "settings": None},
    ]
    assert a1111.txt2img([{"until": 1, "rules": listed}]).pixels == made.pixels
    assert a1111.txt2img(in_order(check({"enabled": True, **SMALL_IMAGES, **rules}))).pixels == made.pixels
    restored = a1111.txt2img(infotext=made.infotext)
    assert restored.pixels == made.pixels
    assert entry(restored) == entry(made)


RULES = "downsample=2 until=0.5 max_downsample=2 method=pool | blocks=middle_block.*+output_blocks.11.* full"


def other_value(row):
    """A value that is not the default."""
    if row.kind == "flag":
        return not row.default
    if row.kind == "choice":
        return next(choice for choice in row.choices if choice != row.default)
    if row.numeric and not row.slider:
        return 1234
    if row.kind == "text":
        return RULES
    return {"agent_ratio": 0.8, "since": 0.13, "sx": 3, "sy": 5}.get(row.name, 0.25)


# tests/webui/test_tune.py has the plans of tunings
CHANGED = {row.name: other_value(row) for row in SETTINGS if not row.local and row.name not in ("enabled", "tuning")}


def test_infotext_restores_everything_at_once_and_the_image(a1111: Host):
    changed = {**CHANGED, "min_tokens": 0, "max_agents": 100, "passes": "both", "max_downsample": "2", "until": 0.9}
    made = a1111.txt2img([changed])
    restored = a1111.txt2img(infotext=made.infotext)
    assert entry(restored) == {**IMPLIED, **changed, "enabled": True}
    assert restored.pixels == made.pixels


def test_infotext_without_us_switches_off(a1111: Host, plain: Result):
    restored = a1111.txt2img([{"until": 1}], infotext=plain.infotext)
    assert infotext.KEY in restored.infotext, "the request's own arguments count more"
    assert infotext.KEY not in a1111.txt2img(infotext=plain.infotext).infotext


# X/Y/Z plot


def test_axes_appear_once(a1111: Host):
    labels = [x for x in a1111.call("/agent-attention-probe/axes") if x.startswith("[Agent Attention]")]
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)


def test_2_by_2_plot_has_four_right_cells(a1111: Host, leaves_no_trace):
    plot = a1111.plot(
        ("[Agent Attention] Agent ratio", "0.8, 0.95"), ("[Agent Attention] Method", "corrected, agent"), **LARGER
    )
    cells = list(zip(plot.pixels[1:], plot.info["infotexts"][1:], strict=True))
    wanted = [{"agent_ratio": ratio, "method": method} for method in ("corrected", "agent") for ratio in (0.8, 0.95)]
    assert len(cells) == 4
    assert len({pixels for pixels, _ in cells}) == 4
    for (pixels, text), settings in zip(cells, wanted, strict=True):
        alone = a1111.txt2img([{**settings, **TABLES}], **LARGER)
        assert pixels == alone.pixels[0]
        assert infotext.KEY + ": " + infotext.write(entry(alone)) in text


def test_a_cell_that_is_off_among_cells_that_are_on(a1111: Host):
    plot = a1111.plot(("[Agent Attention] Enabled", "True, False, True"), **LARGER)
    texts = plot.info["infotexts"][1:]
    assert [infotext.KEY in text for text in texts] == [True, False, True]
    assert plot.pixels[2] == a1111.txt2img(**LARGER).pixels[0]
    assert plot.pixels[1] == plot.pixels[3] != plot.pixels[2]


def test_every_axis(a1111: Host):
    """Each axis sets its own setting, whatever its type; all at 64², one step."""
    idle = ("min_tokens", "merge_attn")  # values with which nothing is changed, so that nothing is written
    for name, value in CHANGED.items():
        if name in idle:
            continue
        axis = f"[Agent Attention] {BY_NAME[name].label}", str(value)
        plot = a1111.plot(axis, agents=[{"method": "agent"}], **{**TINY, "steps": 2})
        assert f"{infotext.KEY}: " in plot.infotext, (name, plot.infotext)
        assert infotext.read(plot.infotext.split(f"{infotext.KEY}: ")[1].split(",")[0])[name] == value


# Others that work on the same layers


STANDS_DOWN = {
    "token merging": ({"token_merging_ratio": 0.5}, "token merging"),
    "HyperTile": (
        {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 64, "hypertile_swap_size_unet": 2},
        "HyperTile",
    ),
}


@pytest.mark.parametrize("case", STANDS_DOWN)
def test_stands_down_for_what_the_host_has(a1111: Host, case: str):
    options, reason = STANDS_DOWN[case]
    size = {"width": 256, "height": 256, "steps": 2}  # HyperTile tiles nothing smaller
    before = a1111.txt2img(**size)
    with a1111.options(**options):
        off = a1111.txt2img(**size)
        on = a1111.txt2img(ON, **size)
        a1111.txt2img(ON, **size)
        assert off.pixels != before.pixels, "the option does nothing"
        assert on.pixels == off.pixels
        assert infotext.plain(reason) in on.info["extra_generation_params"][infotext.NOTE]
        assert infotext.KEY not in on.info["extra_generation_params"]
        assert reason in a1111.status()["text"]
    said = [line for line in a1111.console().splitlines() if "[Agent Attention]" in line and reason in line]
    assert len(said) == 1
    assert a1111.txt2img(**size).pixels == before.pixels
    assert a1111.txt2img(ON, **size).pixels != before.pixels


def test_leaves_a_foreign_context_to_the_host(a1111: Host, leaves_no_trace):
    """A block's forward on the instance, whose self-attention sees more tokens than its own."""
    with a1111.interference(blocks=True):
        off = a1111.txt2img()
        assert a1111.txt2img([{"until": 1}]).pixels == off.pixels
        notes = " ".join(a1111.status()["notes"])
    assert "replaces transformer blocks" in notes
    assert "a context of its own" in notes


# Reload UI: the last test, since it starts the scripts anew


def test_reload_ui(a1111: Host, leaves_no_trace):
    on = a1111.txt2img(ON)
    axes = a1111.call("/agent-attention-probe/axes")
    a1111.reload_ui()
    assert a1111.txt2img(ON).pixels == on.pixels
    assert a1111.call("/agent-attention-probe/axes") == axes
    assert a1111.txt2img(infotext=on.infotext).pixels == on.pixels
