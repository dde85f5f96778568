"""The command line: its options, its pictures, its failures. Nothing is downloaded."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from drawing import GRID, PROMPTS, SMALL, pixels, read_record
from PIL import Image

import agentsd
from agentsd.cli import main, models, parser, pictures
from agentsd.cli.parser import parse
from agentsd.cli.pictures import distance
from agentsd.config import FIELDS
from agentsd.settings import DEFAULTS, check, to_config

pytestmark = pytest.mark.usefixtures("own_folder")


# Options


def test_every_setting_of_the_panel_is_an_option_whose_value_reaches_the_config():
    assert parse(["generate", "a rose"]).settings == {**DEFAULTS, "enabled": True}
    assert set(DEFAULTS) - set(parser.ROWS) == {"enabled", "hires_until", "passes", "tuning", "tune", "how_close"}
    for name, row in parser.ROWS.items():
        others = {"flag": ["on", "off"], "choice": row.choices, "text": ["downsample=2 until=0.4 method=pool | full"]}
        texts = others.get(row.kind, (str(row.low + row.step), str(row.high)))
        text = next(text for text in texts if row.parse(text) != row.default)
        option, value = parser.option_name(row), row.parse(text)
        flag = {"on": [f"--{option}"], "off": [f"--no-{option}"]}
        args = parse(
            ["generate", "a rose", *flag.get(text, [f"--{option}", text.replace(" ", "-") if row.choices else text])]
        )
        assert args.settings == check({"enabled": True, name: value})
        if name in FIELDS and name != "max_downsample":
            assert getattr(to_config(args.settings), name) in (value, value or None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "COMMAND"),
        (["paint", "a rose"], "paint"),
        (["generate"], "prompt"),
        (["generate", "a rose", "--ratio", "2"], "ratio must be a number from 0.0 to 0.99, got 2"),
        (["generate", "a rose", "--sx", "1.5"], "sx must be a whole number from 1 to 16, got 1.5"),
        (["generate", "a rose", "--method", "magic"], "'magic'"),
        (["generate", "a rose", "--since", "0.8", "--until", "0.4"], "until must be above since (0.8), got 0.4"),
        (["generate", "a rose", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["generate", "a rose", "--size", "500"], "multiples of 8 from 16 to 8192, got '500'"),
        (["generate", "a rose", "--rules", "downsample=3 full"], "downsample must be one of 1, 2, 4, 8, got '3'"),
        (["sweep", "a rose"], "--x"),
        (["sweep", "a rose", "--x", "speed=1"], "'speed=1' is not SETTING=VALUES"),
        (["sweep", "a rose", "--x", "ratio=0.1,2"], "ratio must be a number from 0.0 to 0.99, got 2"),
        (["sweep", "a rose", "--x", "ratio=0:1:0"], "'0:1:0' is no range"),
        (["sweep", "rose", "--x", "since=0.1,0.6", "--y", "until=0.3,0.9"], "until must be above since (0.6), got 0.3"),
    ],
)
def test_wrong_usage_is_told_before_anything_happens(given, message, capsys, tmp_path):
    assert main(given) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("agent-ratio=0.5:0.9:0.2", ("agent_ratio", (0.5, 0.7, 0.9))),
        ("sx=2:8:2", ("sx", (2, 4, 6, 8))),
        ("after=nothing,token-merging", ("after", ("nothing", "token merging"))),
        ("rules=,downsample=2 method=pool | full", ("rules", ("", "downsample=2 method=pool | full"))),
    ],
)
def test_ranges(text, values):
    assert parse(["sweep", "a rose", "--x", text]).x == values


# Pictures


def drawn(pipe, settings=None):
    """What the model draws itself, with the settings of a command line, or without any."""
    if settings is not None:
        agentsd.patch_unet(pipe.unet, to_config(settings))
    picture = pipe("a rose", seed=3, steps=2, height=16, width=16)[0]
    agentsd.remove_patch(pipe.unet)
    return picture


def test_generate_draws_the_picture_that_the_settings_ask_for_and_writes_them_into_it(stand_in, capsys):
    given = ["a rose", *SMALL, *GRID, "--seed", "3", "--agent-ratio", "0.75", "--k-scale2", "0.5"]
    assert main(["generate", *given, "--out", "ours.png"]) == 0
    assert main(["generate", *given, "--out", "plain.png", "--off"]) == 0
    assert agentsd.get_patch(stand_in.unet) is None
    said = capsys.readouterr().out
    assert "of 14 self-attentions 6 with agents" in said
    assert "agent attention: off" in said
    made, settings = read_record("ours.png"), parse(["generate", *given]).settings
    assert made.pop("seconds") >= made.pop("unet_seconds") > 0
    about = {"agentsd": agentsd.__version__, "model": "embedded", "prompt": "a rose", "negative_prompt": "", "seed": 3}
    about |= {"steps": 2, "sampler": "DDIM", "guidance": 3.0, "width": 16, "height": 16}
    assert made == {**about, "agent_attention": settings}
    assert read_record("plain.png")["agent_attention"] is None
    with Image.open("ours.png") as picture:
        infotext = picture.text["parameters"]
    assert infotext.startswith(
        "a rose\nSteps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 3, Size: 16x16, Agent Attention: "
    )
    assert "k_scale2=0.5" in infotext
    for name, values in (("plain", None), ("ours", settings)):
        shown = pictures.enlarged(drawn(stand_in, values), 256)
        assert np.array_equal(pixels(Image.open(f"{name}.png")), pixels(shown))
    assert not np.array_equal(pixels(Image.open("ours.png")), pixels(Image.open("plain.png")))


def test_outputs_do_not_overwrite_each_other(stand_in):
    for _ in range(2):
        assert main(["generate", "A rose!", *SMALL]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["a-rose-seed0-2.png", "a-rose-seed0.png"]


def test_compare_measures_the_two_pictures_that_it_shows(stand_in, capsys):
    given = ["compare", "a rose", *SMALL, *GRID, "--seed", "3"]
    assert main([*given, "--out", "both.png"]) == 0
    said = capsys.readouterr().out
    apart = distance(drawn(stand_in), drawn(stand_in, parse(given).settings))
    made = read_record("both.png")
    assert made["distance"] == {"rmse": apart.rmse, "psnr": apart.psnr, "ssim": apart.ssim}
    assert set(made["seconds"]) == {"with", "without"}
    assert f"PSNR {apart.psnr:.1f} dB, SSIM {apart.ssim:.3f}" in said
    width, height = Image.open("both.png").size
    assert (width > 3 * 256, height > 256) == (True, True)
    assert main(["compare", "a rose", *SMALL, "--min-tokens", "5000", "--out", "same.png"]) == 0
    said = capsys.readouterr().out
    assert "no difference" in said
    assert "of 14 self-attentions none changed" in said
    assert read_record("same.png")["distance"]["psnr"] is None


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


def test_sweep_shows_what_differs(stand_in, capsys):
    assert main(["sweep", "a rose", *SMALL, "--x", "min-tokens=99999,0", "--out", "swept"]) == 0
    apart = [float(row["rmse"]) for row in rows_of("swept/sweep.csv")]
    page = Image.open("swept/difference.png").convert("RGB")
    assert page.size == Image.open("swept/sweep.png").size
    width = page.width // 3
    cells = [np.asarray(page.crop((12 + k * width, 70, 12 + k * width + 200, 200))) for k in (1, 2)]
    assert apart[1] == 0 < apart[2]
    assert cells[0].max() == 0 < cells[1].max()
    header = Path("swept/sweep.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "min_tokens,seconds,unet_seconds,speed,rmse,psnr,ssim"
    assert "99999" in capsys.readouterr().out


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


def test_what_fails_is_a_sentence(stand_in, capsys, monkeypatch):
    Path("taken").write_text("a file")
    for given, said in (
        (["a red aple"], "'aple'"),
        (["a rose", "--negative", "banana"], "takes no negative prompt"),
        (["a rose", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["a rose", "--out", "taken/a.png"], "cannot write taken/a.png"),
    ):
        assert main(["generate", *given, *SMALL]) == 1
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["taken"]
    monkeypatch.setattr(stand_in.unet, "forward", lambda *a, **k: 1 / 0)
    assert main(["generate", "a rose", *SMALL, "--off"]) == 1
    assert capsys.readouterr().err == "agentsd: error: ZeroDivisionError: division by zero (--debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        main(["generate", "a rose", *SMALL, "--off", "--debug"])
    assert agentsd.get_patch(stand_in.unet) is None
    assert not stand_in.unet._forward_hooks
    assert not stand_in.unet._forward_pre_hooks


# Interruption


def test_ctrl_c_leaves_whole_files_only(stand_in, capsys, monkeypatch):
    draws = []

    def draw(model, request, step, original=models.Model.draw):
        draws.append(request)
        if len(draws) == 6:  # two of the warm-up, the unpatched picture, two cells
            raise KeyboardInterrupt
        return original(model, request, step)

    monkeypatch.setattr(models.Model, "draw", draw)
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
    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", write_half)
        with pytest.raises(error):
            pictures.write_whole(path, b"all of it")
    assert (path.read_bytes() if path.exists() else None) == before
    assert list(Path().glob(".*")) == []
    path.touch()
    was = path.stat()
    now = pictures.write_whole(path, b"x").stat()
    assert (now.st_mode, now.st_ino != was.st_ino) == (was.st_mode, True), "another file under its name"


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value,) * 3)


def test_distances_are_what_they_are_called(monkeypatch):
    assert str(distance(flat(9), flat(9))) == "no difference"
    assert pictures.difference(flat(100), flat(110)).getpixel((0, 0)) == (40, 40, 40)
    apart = distance(flat(100), flat(110))
    assert apart.rmse == pytest.approx(10)
    assert apart.psnr == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    # of two flat pictures only the luminance term is left
    c1 = (0.01 * 255) ** 2
    assert apart.ssim == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), abs=1e-5)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert str(distance(flat(100), flat(110))) == "PSNR 28.1 dB"
