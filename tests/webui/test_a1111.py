"""The extension in a real AUTOMATIC1111 WebUI, through its HTTP API."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from host import SMALL_IMAGES, Host, acted, image_to_base64
from PIL import Image, ImageDraw

from agentsd.methods import selectable
from agentsd.settings import infotext
from agentsd.settings.schema import ARGUMENTS, BY_NAME, DEFAULTS, IMPLIED, RECORD, SETTINGS, check

HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
REFINER = {"refiner_checkpoint": "tinysd1b.safetensors", "refiner_switch_at": 0.5}
# With layers that are not left alone by default
LARGER = {"width": 256, "height": 256, "steps": 2}
TABLES = {"min_tokens": DEFAULTS["min_tokens"]}
ON = [{"method": "agent", "until": 0.6}]  # beside a pass that has no agents any more
ALL = [{"until": 1}]

# On, off, and the same again


@pytest.mark.parametrize("checkpoint", ["tinysd1", "tinysd2v", "tinysdxl"])
def test_on_differs_repeats_and_goes(a1111: Host, checkpoint: str):
    a1111.use(checkpoint)
    try:
        plain, before = a1111.txt2img(), a1111.state()
        on, again = a1111.txt2img(ON), a1111.txt2img(ON)
        done = a1111.status()["passes"][0]
        assert on.pixels == again.pixels != plain.pixels
        assert a1111.txt2img().pixels == plain.pixels
        assert a1111.state()["tree"] == before["tree"]
        assert done["calls"]["agents"] > 0
        assert done["layers"][0]["tokens"] == (64 if checkpoint == "tinysdxl" else 256)
    finally:
        a1111.use("tinysd1")


@pytest.mark.parametrize("method", selectable(), ids=lambda method: method.name)
def test_every_method(a1111: Host, leaves_no_trace, method):
    """512×512, since some methods leave smaller layers alone."""
    size = {"width": 512, "height": 512, "steps": 2}
    settings = {"method": method.name, "until": 1, "ratio": 0.4 if method.name == "merge" else 0}
    off, on = a1111.txt2img(**size), a1111.txt2img([settings], **size)
    status = a1111.status()
    assert status["notes"] == []
    assert status["passes"][0]["calls"][method.action] > 0
    assert on.entry["method"] == method.name
    again, restored = a1111.txt2img([settings], **size), a1111.txt2img(infotext=on.infotext, **size)
    assert restored.pixels == again.pixels == on.pixels != off.pixels


def test_off_writes_nothing(a1111: Host):
    plain = a1111.plain
    assert infotext.KEY not in plain.infotext
    assert a1111.txt2img([False, 0.4]).infotext == plain.infotext
    assert a1111.status()["text"] == ""
    assert "NGMS" in a1111.txt2img(ON, s_min_uncond=15.0).infotext, "others' entries stay"


SCENARIOS = {
    "hires fix": HIRES,
    "hires checkpoint": {**HIRES, "hr_checkpoint_name": "tinysd1b.safetensors"},
    "batch count and size": {"batch_size": 2, "n_iter": 2, "steps": 2},
    "520 × 328": {"width": 520, "height": 328, "steps": 2},
    **{name: {"sampler_name": name} for name in ("Heun", "DPM++ SDE", "DDIM", "UniPC")},
    "NGMS": {"s_min_uncond": 15.0},
    "AND prompts": {"prompt": "a cat AND a dog :0.7 AND a bird"},
    "a long prompt": {"prompt": "a cat, " * 40},
    "LoRA": {"prompt": "a cat <lora:tinylora:1>"},
    "hypernetwork": {"prompt": "a cat <hypernet:tinyhn:1>"},
}
OPTIONS = {"batch_cond_uncond": False, "pad_cond_uncond": True, "upcast_attn": True, "skip_early_cond": 0.5}


@pytest.mark.parametrize("scenario", [*SCENARIOS, *OPTIONS])
def test_scenario(a1111: Host, leaves_no_trace, scenario: str):
    body = SCENARIOS.get(scenario, {})
    with nullcontext() if body else a1111.options(**{scenario: OPTIONS[scenario]}):
        off, on = a1111.txt2img(**body), a1111.txt2img(ALL, **body)
        status = a1111.status()
        assert all(a != b for a, b in zip(on.pixels, off.pixels, strict=True))
        assert a1111.txt2img(ALL, **body).pixels == on.pixels
        assert a1111.txt2img(**body).pixels == off.pixels
    assert status["notes"] == []
    assert all(acted(one) for one in status["passes"])


@pytest.mark.parametrize("kept", [1, 2])
def test_other_checkpoints_during_and_after_a_run(a1111: Host, leaves_no_trace, kept: int):
    with a1111.options(sd_checkpoints_limit=kept):
        off, on = a1111.txt2img(**REFINER), a1111.txt2img(ALL, **REFINER)
        report = a1111.status()["passes"][0]
        # where only one is kept, the host may load the refiner's weights into the first model's U-Net
        assert report["models"] in {1: (1, 2), 2: (2,)}[kept]
        assert acted(report) == 4 * 5
        late = a1111.txt2img([{"since": 0.6, "until": 1}], **REFINER)  # only the refiner's part
        assert off.pixels not in (on.pixels, late.pixels)
        assert a1111.txt2img(**REFINER).pixels == off.pixels
        a1111.use("tinysd1b")
        other = a1111.txt2img()
        assert a1111.txt2img(ON).pixels != other.pixels
        a1111.use("tinysd1")
        a1111.txt2img(ON)
        a1111.use("tinysd1b")
        assert a1111.state()["loaded"] == kept
        assert a1111.txt2img().pixels == other.pixels
        a1111.use("tinysd1")


def test_refiner_of_another_layout(a1111: Host, leaves_no_trace):
    body = {**REFINER, "refiner_checkpoint": "tinysd2v.safetensors"}
    off = a1111.txt2img(**body)
    assert a1111.txt2img(ALL, **body).pixels != off.pixels
    assert a1111.status()["passes"][0]["models"] == 2
    assert a1111.txt2img(**body).pixels == off.pixels


@pytest.mark.parametrize("inpainting", [False, True])
def test_img2img(a1111: Host, leaves_no_trace, inpainting: bool):
    image, body = a1111.plain.images[0], {"denoising_strength": 0.9}
    if inpainting:
        mask = Image.new("L", (128, 128))
        ImageDraw.Draw(mask).ellipse((32, 32, 96, 96), fill=255)
        body |= {"mask": image_to_base64(mask), "inpainting_fill": 1}
    off, on = a1111.img2img(image, **body), a1111.img2img(image, ALL, **body)
    assert on.pixels != off.pixels
    assert acted(a1111.status()["passes"][0])
    assert a1111.img2img(image, **body).pixels == off.pixels


def test_nested_generation(a1111: Host, leaves_no_trace):
    """A second generation inside the first one's callbacks, with the same script arguments."""
    expected = a1111.txt2img(ON, n_iter=2)
    a1111.arm("nest")
    nested = a1111.txt2img(ON, n_iter=2)
    assert nested.pixels == expected.pixels
    assert nested.entry == expected.entry


# Every way out


@pytest.mark.parametrize("where", ["first pass", "hires pass", "img2img"])
@pytest.mark.parametrize(("action", "step"), [("raise", 1), ("raise", 3), ("interrupt", 2), ("skip", 1), ("stop", 3)])
def test_ways_out(a1111: Host, leaves_no_trace, action: str, step: int, where: str):
    plain = a1111.plain
    a1111.arm(action, step=step, hires=where == "hires pass")
    with pytest.raises(RuntimeError, match="forced failure") if action == "raise" else nullcontext():
        if where == "img2img":
            a1111.img2img(plain.images[0], ALL, denoising_strength=0.9)
        else:
            a1111.txt2img(ALL, **(HIRES if where == "hires pass" else {}))
    assert a1111.state()["armed"] == {}, "the probe has not acted"
    assert f"{infotext.KEY}: " in last_generation(a1111)


# What the host keeps of its last generation (params.txt, for the arrow under an empty prompt)


def last_generation(host: Host) -> str:
    return (host.root / "params.txt").read_text()


@pytest.mark.parametrize("kind", ["one pass", "hires fix", "two batches", "img2img"])
def test_the_last_generation_has_our_entry_while_we_are_on(a1111: Host, kind: str):
    body = {"hires fix": HIRES, "two batches": {"n_iter": 2, "batch_size": 2}}.get(kind, {})
    image, more = a1111.plain.images[0], {"denoising_strength": 0.7}
    for agents in (ON, None):
        made = a1111.img2img(image, agents, **more) if kind == "img2img" else a1111.txt2img(agents, **body)
        assert (infotext.KEY in last_generation(a1111)) is bool(agents)
        if agents:
            assert f"{infotext.KEY}: {infotext.write(made.entry)}" in last_generation(a1111)


def test_the_last_generation_of_a_plot_and_where_the_pass_was_left_alone(a1111: Host):
    plot = a1111.plot(("[Agent Attention] Method", "agent, pool"), steps=1, agents=ALL)
    assert "method=pool" in plot.info["infotexts"][-1]
    assert "method=pool" in last_generation(a1111)
    with a1111.options(token_merging_ratio=0.5):
        a1111.txt2img(ON)
        assert infotext.KEY not in last_generation(a1111)
    a1111.txt2img([{"ratio": 7}])
    assert infotext.KEY not in last_generation(a1111)


# API


BAD = {
    "a list": [True, [0.4]],
    "nothing between": [{"since": 0.7, "until": 0.6}],
    "a long text": [{"method": "x" * 200_000}],
    "the older extension's list": [True, True, 20, 4, 4, 0.4, 0.95, 2, 2, 0.4, 0.5, False, 1, False],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(a1111: Host, leaves_no_trace, case: str):
    bad, error = a1111.txt2img(BAD[case]), a1111.status()["error"]
    assert bad.pixels == a1111.plain.pixels
    assert infotext.plain(error) in bad.written[infotext.NOTE]
    assert len(bad.written[infotext.NOTE]) < 400
    assert infotext.KEY not in bad.written
    assert infotext.NOTE not in bad.infotext
    assert error in a1111.console()


RULES = "downsample=2 until=0.5 max_downsample=2 method=pool | blocks=middle_block.*+output_blocks.11.* full"


def test_rules_by_level_and_block(a1111: Host, leaves_no_trace):
    """In every form that the API knows, and from the infotext: the same image, and another than without rules."""
    plain, on, rules = a1111.plain, a1111.txt2img(ALL), {"until": 1, "rules": RULES}
    made = a1111.txt2img([rules])
    assert made.pixels not in (on.pixels, plain.pixels)
    done = a1111.status()["passes"][0]
    assert acted(done) > done["calls"]["pool"] > 0
    assert a1111.txt2img([{"until": 1, "rules": "full"}]).pixels == plain.pixels
    assert made.entry["rules"] == RULES
    listed = [
        {"downsample": 2, "until": 0.5, "settings": {"max_downsample": 2, "method": "pool"}},
        {"blocks": ["middle_block.*", "output_blocks.11.*"], "settings": None},
    ]
    assert a1111.txt2img([{"until": 1, "rules": listed}]).pixels == made.pixels
    values = {**check({"enabled": True, **SMALL_IMAGES, **rules}), RECORD: False}
    assert a1111.txt2img([values[name] for name in ARGUMENTS]).pixels == made.pixels
    restored = a1111.txt2img(infotext=made.infotext)
    assert restored.pixels == made.pixels
    assert restored.entry == made.entry


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
# with which something happens in every pass
EVERYTHING = {**CHANGED, "min_tokens": 0, "max_agents": 100, "passes": "both", "max_downsample": "2", "until": 0.9}


def test_infotext_restores_everything_at_once_and_the_image(a1111: Host):
    made = a1111.txt2img([EVERYTHING])
    restored = a1111.txt2img(infotext=made.infotext)
    assert restored.entry == {**IMPLIED, **EVERYTHING, "enabled": True}
    assert restored.pixels == made.pixels


def test_infotext_without_us_switches_off(a1111: Host):
    restored = a1111.txt2img(ALL, infotext=a1111.plain.infotext)
    assert infotext.KEY in restored.infotext, "the request's own arguments count more"
    assert infotext.KEY not in a1111.txt2img(infotext=a1111.plain.infotext).infotext


# X/Y/Z plot


def test_2_by_2_plot_has_four_right_cells(a1111: Host, leaves_no_trace):
    x, y = ("[Agent Attention] Agent ratio", "0.8, 0.95"), ("[Agent Attention] Method", "corrected, agent")
    plot = a1111.plot(x, y, **LARGER)
    cells = list(zip(plot.pixels[1:], plot.info["infotexts"][1:], strict=True))
    wanted = [{"agent_ratio": ratio, "method": method} for method in ("corrected", "agent") for ratio in (0.8, 0.95)]
    assert len({pixels for pixels, _ in cells}) == len(cells) == 4
    for (pixels, text), settings in zip(cells, wanted, strict=True):
        alone = a1111.txt2img([{**settings, **TABLES}], **LARGER)
        assert pixels == alone.pixels[0]
        assert infotext.KEY + ": " + infotext.write(alone.entry) in text


def test_a_cell_that_is_off_among_cells_that_are_on(a1111: Host):
    plot = a1111.plot(("[Agent Attention] Enabled", "True, False, True"), **LARGER)
    assert [infotext.KEY in text for text in plot.info["infotexts"][1:]] == [True, False, True]
    assert plot.pixels[2] == a1111.txt2img(**LARGER).pixels[0]
    assert plot.pixels[1] == plot.pixels[3] != plot.pixels[2]


def test_every_axis(a1111: Host):
    """Each axis is there once and sets its own setting, whatever its type."""
    labels = a1111.our_axes()
    assert len(labels) == len(set(labels)) == sum(row.axis for row in SETTINGS)
    idle = ("min_tokens", "merge_attn")  # values with which nothing is changed, so that nothing is written
    for name, value in CHANGED.items():
        if name in idle:
            continue
        axis = f"[Agent Attention] {BY_NAME[name].label}", str(value)
        plot = a1111.plot(axis, agents=[{"method": "agent"}], width=64, height=64, steps=2)
        assert f"{infotext.KEY}: " in plot.infotext, (name, plot.infotext)
        assert infotext.read(plot.infotext.split(f"{infotext.KEY}: ")[1].split(",")[0])[name] == value


# Others that work on the same layers


STANDS_DOWN = {
    "token merging": {"token_merging_ratio": 0.5},
    "HyperTile": {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 64, "hypertile_swap_size_unet": 2},
}


@pytest.mark.parametrize("reason", STANDS_DOWN)
def test_stands_down_for_what_the_host_has(a1111: Host, reason: str):
    before = a1111.txt2img(**LARGER)  # HyperTile tiles nothing smaller
    with a1111.options(**STANDS_DOWN[reason]):
        off, on, _ = a1111.txt2img(**LARGER), a1111.txt2img(ON, **LARGER), a1111.txt2img(ON, **LARGER)
        assert off.pixels != before.pixels, "the option does nothing"
        assert on.pixels == off.pixels
        assert infotext.plain(reason) in on.written[infotext.NOTE]
        assert infotext.KEY not in on.written
        assert reason in a1111.status()["text"]
    assert sum("[Agent Attention]" in line and reason in line for line in a1111.console().splitlines()) == 1
    assert a1111.txt2img(**LARGER).pixels == before.pixels != a1111.txt2img(ON, **LARGER).pixels


def test_leaves_a_foreign_context_to_the_host(a1111: Host, leaves_no_trace):
    """A block's forward on the instance, whose self-attention sees more tokens than its own."""
    with a1111.interference(blocks=True):
        off = a1111.txt2img()
        assert a1111.txt2img(ALL).pixels == off.pixels
        notes = " ".join(a1111.status()["notes"])
    assert "replaces transformer blocks" in notes
    assert "a context of its own" in notes


# Reload UI: the last test, since it starts the scripts anew


def test_reload_ui(a1111: Host, leaves_no_trace):
    on, axes = a1111.txt2img(ON), a1111.our_axes()
    a1111.reload_ui()
    assert a1111.txt2img(ON).pixels == a1111.txt2img(infotext=on.infotext).pixels == on.pixels
    assert a1111.our_axes() == axes
