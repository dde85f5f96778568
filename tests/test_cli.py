"""The command line: its options, its pictures, its failures. Nothing is downloaded."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from drawing import GRID, PROMPTS, SMALL, pixels, read_record
from tiny_pipelines import tiny_unet

import agentsd
from agentsd.cli import main, models, options, pictures, runs
from agentsd.cli.parser import parse
from agentsd.cli.pictures import distance
from agentsd.config import FIELDS
from agentsd.settings import DEFAULTS, check, to_config

pytestmark = pytest.mark.usefixtures("own_folder")


# Options


def test_every_setting_of_the_panel_is_an_option():
    args = parse(["generate", "a rose"])
    assert args.settings == {**DEFAULTS, "enabled": True}
    not_here = {"enabled", "hires_until", "passes", "tuning", "tune", "how_close"}
    assert set(DEFAULTS) - not_here == set(options.ROWS)


@pytest.mark.parametrize("row", options.ROWS.values(), ids=options.ROWS.keys())
def test_an_options_value_reaches_the_config(row):
    if row.kind == "flag":
        value, given = not row.default, [f"--{'no-' if row.default else ''}{options.option_name(row)}"]
    else:
        others = ["downsample=2 until=0.4 method=pool | full blocks=a-b.*"]
        if row.kind != "text":
            others = row.choices if row.kind == "choice" else (str(row.low + row.step), str(row.high))
        text = next(text for text in others if row.parse(text) != row.default)
        written = text.replace(" ", "-") if row.choices else text
        value, given = row.parse(text), [f"--{options.option_name(row)}", written]
    more = ["--agent-source", "similarity"] if row.name != "agent_source" else []
    args = parse(["generate", "a rose", *given, *more])
    assert args.settings[row.name] == value
    if row.name in FIELDS and row.name != "max_downsample":
        assert getattr(to_config(args.settings), row.name) in (value, value or None)
    else:
        expected = check({"enabled": True, **({"agent_source": "similarity"} if more else {}), row.name: value})
        assert to_config(args.settings) == to_config(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "COMMAND"),
        (["paint", "a rose"], "paint"),
        (["generate"], "prompt"),
        (["generate", "a rose", "--ratio", "2"], "ratio must be a number from 0.0 to 0.99, got 2"),
        (["generate", "a rose", "--ratio", "much"], "'much'"),
        (["generate", "a rose", "--sx", "1.5"], "sx must be a whole number from 1 to 16, got 1.5"),
        (["generate", "a rose", "--method", "magic"], "'magic'"),
        (["generate", "a rose", "--since", "0.8", "--until", "0.4"], "until must be above since (0.8), got 0.4"),
        (["generate", "a rose", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["generate", "a rose", "--seed", "-1"], "-1"),
        (["generate", "a rose", "--guidance", "nan"], "guidance must be a number from 0.0 to 100.0, got nan"),
        (["generate", "a rose", "--size", "500"], "multiples of 8 from 16 to 8192, got '500'"),
        (["generate", "a rose", "--size", "16x"], "'16x'"),
        (["generate", "a rose", "--rules", "downsample=3 full"], "downsample must be one of 1, 2, 4, 8, got '3'"),
        (["sweep", "a rose"], "--x"),
        (["sweep", "a rose", "--x", "speed=1"], "'speed=1' is not SETTING=VALUES"),
        (["sweep", "a rose", "--x", "ratio=0.1,2"], "ratio must be a number from 0.0 to 0.99, got 2"),
        (["sweep", "a rose", "--x", "ratio=0:1:0"], "'0:1:0' is no range"),
        (["sweep", "a rose", "--x", "until=0.1,0.5", "--since", "0.3"], "until must be above since (0.3), got 0.1"),
        (["sweep", "rose", "--x", "since=0.1,0.6", "--y", "until=0.3,0.9"], "until must be above since (0.6), got 0.3"),
    ],
)
def test_wrong_usage_is_told_before_anything_happens(given, message, capsys, tmp_path):
    assert main(given) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["", "generate", "compare", "sweep", "info", "demo"])
def test_help_is_there(command, capsys):
    assert main([*filter(None, [command]), "--help"]) == 0
    assert "usage: python -m agentsd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("ratio=0.1,0.2", ("ratio", (0.1, 0.2))),
        ("agent-ratio=0.5:0.9:0.2", ("agent_ratio", (0.5, 0.7, 0.9))),
        ("sx=2:8:2", ("sx", (2, 4, 6, 8))),
        ("after=nothing,token-merging", ("after", ("nothing", "token merging"))),
        ("use-rand=on,off", ("use_rand", (True, False))),
        ("rules=,downsample=2 method=pool | full", ("rules", ("", "downsample=2 method=pool | full"))),
    ],
)
def test_ranges(text, values):
    assert parse(["sweep", "a rose", "--x", text]).x == values


# Pictures


def test_generate_draws_the_picture_that_the_settings_ask_for(stand_in, capsys, tmp_path):
    given = ["a red apple", *SMALL, *GRID, "--seed", "3", "--agent-ratio", "0.75"]
    assert main(["generate", *given, "--out", "ours.png"]) == 0
    assert main(["generate", *given, "--out", "plain.png", "--off"]) == 0
    assert agentsd.get_patch(stand_in.unet) is None
    ours, plain = Image.open("ours.png"), Image.open("plain.png")

    def expected():
        return stand_in("a red apple", seed=3, steps=2, height=16, width=16)[0]

    def shown(picture):
        return pixels(pictures.enlarged(picture, 256))

    assert np.array_equal(pixels(plain), shown(expected()))
    with agentsd.patched(stand_in.unet, ratio=0.0, agent_ratio=0.75, agent_source="grid"):
        assert np.array_equal(pixels(ours), shown(expected()))
    assert not np.array_equal(pixels(ours), pixels(plain))
    said = capsys.readouterr().out
    assert "of 14 self-attentions 6 with agents" in said
    assert "agent attention: off" in said


def test_a_picture_carries_its_settings_and_can_be_drawn_again(stand_in):
    main(["generate", "a red apple", *SMALL, "--seed", "3", "--until", "0.9", "--k-scale2", "0.5", "--out", "a.png"])
    made = read_record("a.png")
    assert (made["prompt"], made["seed"], made["steps"], made["model"]) == ("a red apple", 3, 2, "embedded")
    assert (made["width"], made["height"]) == (16, 16)
    assert made["agent_attention"].items() >= {**DEFAULTS, "enabled": True, "until": 0.9, "k_scale2": 0.5}.items()
    assert made["seconds"] > 0
    with Image.open("a.png") as picture:
        infotext = picture.text["parameters"]
    about = "Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 3, Size: 16x16, Agent Attention: "
    assert infotext.startswith(f"a red apple\n{about}")
    assert "k_scale2=0.5" in infotext
    agentsd.patch_unet(stand_in.unet, to_config(made["agent_attention"]))
    again = stand_in(made["prompt"], seed=made["seed"], steps=made["steps"], height=16, width=16)[0]
    agentsd.remove_patch(stand_in.unet)
    assert np.array_equal(pixels(Image.open("a.png")), pixels(pictures.enlarged(again, 256)))


def test_outputs_do_not_overwrite_each_other(stand_in):
    for _ in range(2):
        assert main(["generate", "A rose!", *SMALL]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["a-rose-seed0-2.png", "a-rose-seed0.png"]


def test_compare_measures_the_two_pictures_that_it_shows(stand_in, capsys):
    given = ["a rose", *SMALL, *GRID]
    assert main(["compare", *given, "--out", "both.png"]) == 0
    said = capsys.readouterr().out
    plain = stand_in("a rose", steps=2, height=16, width=16)[0]
    agentsd.patch_unet(stand_in.unet, to_config(parse(["compare", *given]).settings))
    ours = stand_in("a rose", steps=2, height=16, width=16)[0]
    agentsd.remove_patch(stand_in.unet)
    apart = distance(plain, ours)
    made = read_record("both.png")
    assert made["distance"] == apart.record()
    assert apart.record() == {"rmse": round(apart.rmse, 4), "psnr": round(apart.psnr, 3), "ssim": round(apart.ssim, 5)}
    assert set(made["seconds"]) == {"with", "without"}
    assert f"PSNR {apart.psnr:.1f} dB, SSIM {apart.ssim:.3f}" in said
    width, height = Image.open("both.png").size
    assert (width > 3 * 256, height > 256) == (True, True)


def test_settings_that_change_nothing_are_told_as_such(stand_in, capsys):
    assert main(["compare", "a rose", *SMALL, "--min-tokens", "5000", "--out", "both.png"]) == 0
    said = capsys.readouterr().out
    assert "no difference" in said
    assert "of 14 self-attentions none changed" in said
    assert read_record("both.png")["distance"]["psnr"] is None


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_measures_every_cell(stand_in):
    axes = ["--x", "agent_ratio=0.75,0.9", "--y", "k-scale2=0.2:0.6:0.2"]
    assert main(["sweep", "a rose", *SMALL, *GRID, *axes, "--out", "swept"]) == 0
    rows = rows_of("swept/sweep.csv")
    names = [(row["agent_ratio"], row["k_scale2"]) for row in rows]
    assert names == [("without", "without"), *((x, y) for y in ("0.2", "0.4", "0.6") for x in ("0.75", "0.9"))]
    assert all(float(row["seconds"]) > 0 for row in rows)
    cells = sorted(path.name for path in Path("swept").glob("0*.png"))
    assert cells == [f"0{i}-0{j}.png" for i in (1, 2, 3) for j in (1, 2)]
    made = read_record("swept/02-01.png")
    assert (made["agent_attention"]["agent_ratio"], made["agent_attention"]["k_scale2"]) == (0.75, 0.4)
    assert str(made["distance"]["psnr"]) == rows[3]["psnr"]
    assert len({row["rmse"] for row in rows}) == 7, "every cell has a picture of its own"
    assert min(Image.open("swept/sweep.png").size) > 3 * 256
    assert read_record("swept/sweep.png")["sweep"] == {"agent_ratio": [0.75, 0.9], "k_scale2": [0.2, 0.4, 0.6]}


def test_sweep_shows_what_differs(stand_in):
    assert main(["sweep", "a rose", *SMALL, "--x", "min-tokens=99999,0", "--until", "1", "--out", "swept"]) == 0
    apart = [float(row["rmse"]) for row in rows_of("swept/sweep.csv")]
    page = Image.open("swept/difference.png").convert("RGB")
    assert page.size == Image.open("swept/sweep.png").size
    width = page.width // 3
    cells = [np.asarray(page.crop((12 + k * width, 70, 12 + k * width + 200, 200))) for k in (1, 2)]
    assert apart[1] == 0 < apart[2]
    assert cells[0].max() == 0 < cells[1].max()


def test_sweep_over_one_setting(stand_in, capsys):
    assert main(["sweep", "a rose", *SMALL, "--x", "method=agent,pool", "--out", "swept"]) == 0
    header = Path("swept/sweep.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "method,seconds,unet_seconds,speed,rmse,psnr,ssim"
    assert "pool" in capsys.readouterr().out


def test_demo_draws_a_sheet_and_a_table(stand_in, capsys):
    assert main(["demo", "--steps", "2", "--prompts", "3", "--quiet", "--out", "demo"]) == 0
    said = capsys.readouterr().out
    rows = rows_of("demo/demo.csv")
    assert len(rows) == 3
    assert {row["prompt"] for row in rows} < set(PROMPTS)
    assert "mean" in said
    assert str(Path("demo/demo.png").resolve()) in said
    assert said.strip().splitlines()[-1].endswith("make playground")
    assert "tuned to 1%" in said
    with Image.open("demo/demo.png") as page:
        assert page.width > 8 * 128


# Failures


def test_an_unknown_word_is_a_sentence(stand_in, capsys, tmp_path):
    assert main(["generate", "a red aple", *SMALL]) == 1
    assert "'aple'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_sentence(stand_in, capsys):
    Path("taken").write_text("a file")
    assert main(["generate", "a rose", *SMALL, "--out", "taken/a.png"]) == 1
    assert "cannot write taken/a.png" in capsys.readouterr().err


def test_errors_of_libraries_are_short_unless_asked_for(stand_in, capsys, monkeypatch):
    monkeypatch.setattr(stand_in.unet, "forward", lambda *a, **k: 1 / 0)
    assert main(["generate", "a rose", *SMALL, "--off"]) == 1
    assert capsys.readouterr().err == "agentsd: error: ZeroDivisionError: division by zero (--debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        main(["generate", "a rose", *SMALL, "--off", "--debug"])
    assert agentsd.get_patch(stand_in.unet) is None


# Interruption


def test_ctrl_c_leaves_whole_files_only(stand_in, capsys, monkeypatch):
    draws = []

    def draw(model, request, step, original=models.EmbeddedModel.draw):
        draws.append(request)
        if len(draws) == 6:  # two of the warm-up, the unpatched picture, two cells
            raise KeyboardInterrupt
        return original(model, request, step)

    monkeypatch.setattr(models.EmbeddedModel, "draw", draw)
    assert main(["sweep", "a rose", *SMALL, "--x", "agent_ratio=0.6,0.75,0.9", "--out", "swept"]) == 130
    assert "interrupted" in capsys.readouterr().err
    names = sorted(path.name for path in Path("swept").iterdir())
    assert names == ["01-01.png", "01-02.png", "sweep.csv", "without.png"]
    for path in Path("swept").glob("*.png"):
        Image.open(path).load()
    assert len(Path("swept/sweep.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert agentsd.get_patch(stand_in.unet) is None


# Parts


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("before", [None, b"the file of before"])
def test_a_file_appears_whole_or_not_at_all(error, before, monkeypatch):
    def write_half(path, data, original=Path.write_bytes):
        original(path, data[: len(data) // 2])
        raise error

    path = Path("file.bin")
    if before:
        path.write_bytes(before)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(error):
        pictures.write_whole(path, b"all of it")
    assert (path.read_bytes() if path.exists() else None) == before
    assert list(Path().glob(".*")) == []


def test_written_files_have_the_usual_mode():
    Path("usual").touch()
    pictures.write_whole(Path("ours"), b"x")
    assert Path("ours").stat().st_mode == Path("usual").stat().st_mode


def flat(value: int, side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), (value,) * 3)


def test_distances_are_what_they_are_called():
    assert str(distance(flat(9), flat(9))) == "no difference"
    assert distance(flat(9), flat(9)).psnr == float("inf")
    apart = distance(flat(100), flat(110))
    assert apart.rmse == pytest.approx(10)
    assert apart.psnr == pytest.approx(20 * np.log10(255 / 10))
    # of two flat pictures only the luminance term is left
    c1 = (0.01 * 255) ** 2
    assert apart.ssim == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))
    with pytest.raises(ValueError, match="same size"):
        distance(flat(1), flat(1, side=32))


def test_without_scikit_image_there_is_no_ssim(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert distance(flat(100), flat(110)).ssim is None
    assert "SSIM" not in str(distance(flat(100), flat(110)))


def test_the_difference_map_is_black_where_pictures_agree():
    a, b = flat(100), flat(100)
    b.putpixel((3, 4), (110, 100, 0))
    found = pictures.difference(a, b)
    assert found.getpixel((3, 4)) == (40, 0, 255)
    assert np.count_nonzero(pixels(found)) == 2


def test_a_sheet_shows_its_pictures_as_they_are():
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    page = pictures.sheet(
        [[red, None], [blue, red]], columns=["one", "two"], labels=["a", "b"], captions=[["x"], ["y\nz"]]
    )
    colours = {colour: count for count, colour in page.getcolors(page.width * page.height)}
    assert colours[(255, 0, 0)] == 2 * 40 * 30
    assert colours[(0, 0, 255)] == 40 * 30


def test_small_pictures_are_enlarged_by_whole_numbers():
    assert pictures.enlarged(flat(1, 64), 256).size == (256, 256)
    assert pictures.enlarged(flat(1, 512), 256).size == (512, 512)


def test_the_stopwatch_leaves_no_hooks():
    unet = tiny_unet()
    with runs.stopwatch(unet) as seconds:
        unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 7, 32))
    assert len(seconds) == 1
    assert seconds[0] > 0
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks
