"""The command line, on pipelines with random weights: nothing is downloaded."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from diffusers import DDIMScheduler
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl, tiny_unet

import agentsd
from agentsd import embedded
from agentsd.cli import files, main, models, options, runs, sheets, structure
from agentsd.cli.distance import distance
from agentsd.config import LIMITS
from agentsd.costs import layouts
from agentsd.embedded import model as embedded_model
from agentsd.layout import layout_of
from agentsd.webui.settings import DEFAULTS, check, to_config

PROMPTS = ["red apple", "banana", "green frog", "rose"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of the embedded model, one of random weights that knows four prompts."""
    words = embedded_model.vocabulary_of(PROMPTS)
    torch.manual_seed(0)
    text = embedded_model.TextEncoder(words, 8, 32)
    norm = {"mean": [0.5] * 4, "std": [0.3] * 4}
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = embedded.EmbeddedPipeline(tiny_unet(), scheduler, text, PROMPTS, norm)
    monkeypatch.setattr(embedded, "load", lambda *given: pipe)
    return pipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(path)
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*given):
        raise AssertionError(f"somebody wants to go on line: {given}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


SMALL = ["--steps", "2", "--size", "16", "--quiet"]
LEFT_OVER = ".*"


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


# Options


def test_every_setting_of_the_panel_is_an_option():
    args = options.parse(["generate", "a rose"])
    assert args.settings.items() >= {**DEFAULTS, "enabled": True}.items()
    beyond = {name: value for name, value in args.settings.items() if name not in DEFAULTS}
    assert replace(to_config(check({"enabled": True})), **beyond) == options.config_of(args.settings)
    assert all(row.info for row in options.ROWS.values())
    core = set(LIMITS) - {"stages", "attn_precision"}  # since, until and after; fp32
    assert core | set(DEFAULTS) - {"enabled", "hires_until", "passes"} == set(options.ROWS)


@pytest.mark.parametrize("row", options.ROWS.values(), ids=options.ROWS.keys())
def test_an_options_value_reaches_the_config(row):
    if row.kind == "flag":
        value, given = not row.default, [f"--{'no-' if row.default else ''}{options.option_name(row)}"]
    else:
        others = row.choices or ("0.5", "3") if row.kind == "choice" else (str(row.low + row.step), str(row.high))
        text = next(text for text in others if row.parsed(text) != row.default)
        value, given = row.parsed(text), [f"--{options.option_name(row)}", text.replace(" ", "-")]
    more = ["--agent-source", "similarity"] if row.name != "agent_source" else []
    args = options.parse(["generate", "a rose", *given, *more])
    assert args.settings[row.name] == value
    if row.name in LIMITS and row.name != "max_downsample":
        assert getattr(options.config_of(args.settings), row.name) in (value, value or None)
    else:
        expected = check({"enabled": True, **({"agent_source": "similarity"} if more else {}), row.name: value})
        assert options.config_of(args.settings) == to_config(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "COMMAND"),
        (["paint", "a rose"], "paint"),
        (["generate"], "prompt"),
        (["generate", "a rose", "--ratio", "2"], "ratio must be a number from 0.0 to 0.99, got 2.0"),
        (["generate", "a rose", "--ratio", "much"], "'much'"),
        (["generate", "a rose", "--sx", "1.5"], "sx must be a whole number from 1 to 16, got 1.5"),
        (["generate", "a rose", "--method", "magic"], "'magic'"),
        (["generate", "a rose", "--since", "0.8", "--until", "0.4"], "until must be above since (0.8), got 0.4"),
        (["generate", "a rose", "--steps", "0"], "steps must be a whole number from 1 to 1000, got '0'"),
        (["generate", "a rose", "--seed", "-1"], "-1"),
        (["generate", "a rose", "--guidance", "nan"], "guidance must be a number from 0 to 100"),
        (["generate", "a rose", "--size", "500"], "multiples of 8 from 16 to 8192, got '500'"),
        (["generate", "a rose", "--size", "16x"], "'16x'"),
        (["sweep", "a rose"], "--x"),
        (["sweep", "a rose", "--x", "speed=1"], "'speed=1' is not SETTING=VALUES"),
        (["sweep", "a rose", "--x", "ratio=0.1,2"], "ratio must be a number from 0.0 to 0.99, got 2.0"),
        (["sweep", "a rose", "--x", "ratio=0:1:0"], "'0:1:0' is no range"),
        (["sweep", "a rose", "--x", "until=0.1,0.5", "--since", "0.3"], "until must be above since (0.3), got 0.1"),
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
    ],
)
def test_ranges(text, values):
    assert options.parse(["sweep", "a rose", "--x", text]).x == values


# Pictures


def test_generate_draws_the_picture_that_the_settings_ask_for(stand_in, capsys, tmp_path):
    given = ["a red apple", *SMALL, "--seed", "3", "--until", "1", "--agent-ratio", "0.75"]
    assert main(["generate", *given, "--out", "ours.png"]) == 0
    assert main(["generate", *given, "--out", "plain.png", "--off"]) == 0
    assert agentsd.get_patch(stand_in.unet) is None
    ours, plain = Image.open("ours.png"), Image.open("plain.png")

    def expected():
        return stand_in("a red apple", seed=3, steps=2, height=16, width=16)[0]

    def shown(picture):
        return pixels(sheets.enlarged(picture, 256))

    assert np.array_equal(pixels(plain), shown(expected()))
    with agentsd.patched(stand_in.unet, ratio=0.0, agent_ratio=0.75, agent_source="grid"):
        assert np.array_equal(pixels(ours), shown(expected()))
    assert not np.array_equal(pixels(ours), pixels(plain))
    said = capsys.readouterr().out
    assert "agents in 6 of 14 self-attentions" in said
    assert "agent attention: off" in said


def test_a_picture_carries_its_settings(stand_in):
    main(["generate", "a red apple", *SMALL, "--seed", "3", "--agent-ratio", "0.8", "--out", "a.png"])
    with Image.open("a.png") as picture:
        text = dict(picture.text)
    made = json.loads(text["agentsd"])
    assert made == files.read_record(Path("a.png"))
    assert (made["prompt"], made["seed"], made["steps"], made["model"]) == ("a red apple", 3, 2, "embedded")
    assert (made["width"], made["height"]) == (16, 16)
    assert made["agent_attention"].items() >= {**DEFAULTS, "enabled": True, "agent_ratio": 0.8}.items()
    assert made["seconds"] > 0
    assert text["parameters"].startswith(
        "a red apple\nSteps: 2, CFG scale: 3.0, Seed: 3, Size: 16x16, Agent Attention: "
    )
    assert "agent_ratio=0.8" in text["parameters"]


def test_a_picture_can_be_drawn_again_from_what_it_carries(stand_in):
    main(["generate", "a rose", *SMALL, "--until", "0.9", "--k-scale2", "0.5", "--out", "a.png"])
    made = files.read_record(Path("a.png"))
    agentsd.patch_unet(stand_in.unet, options.config_of(made["agent_attention"]))
    again = stand_in(made["prompt"], seed=made["seed"], steps=made["steps"], height=16, width=16)[0]
    agentsd.remove_patch(stand_in.unet)
    assert np.array_equal(pixels(Image.open("a.png")), pixels(sheets.enlarged(again, 256)))


def test_outputs_do_not_overwrite_each_other(stand_in):
    for _ in range(2):
        assert main(["generate", "A rose!", *SMALL]) == 0
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["a-rose-seed0-2.png", "a-rose-seed0.png"]


def test_compare_measures_the_two_pictures_that_it_shows(stand_in, capsys):
    given = ["a rose", *SMALL, "--until", "1"]
    assert main(["compare", *given, "--out", "both.png"]) == 0
    said = capsys.readouterr().out
    config = options.config_of(options.parse(["compare", *given]).settings, 1)
    plain = stand_in("a rose", steps=2, height=16, width=16)[0]
    agentsd.patch_unet(stand_in.unet, config)
    ours = stand_in("a rose", steps=2, height=16, width=16)[0]
    agentsd.remove_patch(stand_in.unet)
    apart = distance(plain, ours)
    made = files.read_record(Path("both.png"))
    assert made["distance"] == {
        "rmse": round(apart.rmse, 4),
        "psnr": round(apart.psnr, 3),
        "ssim": round(apart.ssim, 5),
    }
    assert set(made["seconds"]) == {"with", "without"}
    assert f"PSNR {apart.psnr:.1f} dB, SSIM {apart.ssim:.3f}" in said
    page = Image.open("both.png")
    assert page.width > 3 * 256
    assert page.height > 256


def test_settings_that_change_nothing_are_told_as_such(stand_in, capsys):
    assert main(["compare", "a rose", *SMALL, "--min-tokens", "5000", "--out", "both.png"]) == 0
    said = capsys.readouterr().out
    assert "no difference" in said
    assert "nothing of 14 self-attentions" in said
    assert files.read_record(Path("both.png"))["distance"]["psnr"] is None


def test_sweep_measures_every_cell(stand_in):
    axes = ["--x", "agent_ratio=0.75,0.9", "--y", "k-scale2=0.2:0.6:0.2"]
    assert main(["sweep", "a rose", *SMALL, *axes, "--until", "1", "--out", "swept"]) == 0
    swept = Path("swept")
    with (swept / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["agent_ratio"], row["k_scale2"]) for row in rows]
    assert names == [("without", "without"), *((x, y) for y in ("0.2", "0.4", "0.6") for x in ("0.75", "0.9"))]
    assert all(float(row["seconds"]) > 0 for row in rows)
    cells = sorted(path.name for path in swept.glob("0*.png"))
    assert cells == ["01-01.png", "01-02.png", "02-01.png", "02-02.png", "03-01.png", "03-02.png"]
    made = files.read_record(swept / "02-01.png")
    assert (made["agent_attention"]["agent_ratio"], made["agent_attention"]["k_scale2"]) == (0.75, 0.4)
    assert str(made["distance"]["psnr"]) == rows[3]["psnr"]
    assert len({row["rmse"] for row in rows}) == 7, "every cell has a picture of its own"
    grid = Image.open(swept / "sweep.png")
    assert grid.width > 3 * 256
    assert grid.height > 3 * 256
    assert files.read_record(swept / "sweep.png")["sweep"] == {"agent_ratio": [0.75, 0.9], "k_scale2": [0.2, 0.4, 0.6]}


def test_sweep_shows_what_differs(stand_in):
    assert main(["sweep", "a rose", *SMALL, "--x", "min-tokens=99999,0", "--until", "1", "--out", "swept"]) == 0
    with Path("swept/sweep.csv").open(encoding="utf-8", newline="") as file:
        apart = [float(row["rmse"]) for row in csv.DictReader(file)]
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
    with Path("demo/demo.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {row["prompt"] for row in rows} < set(PROMPTS)
    assert "mean" in said
    assert str(Path("demo/demo.png").resolve()) in said
    assert said.strip().splitlines()[-1].endswith("make playground")
    with Image.open("demo/demo.png") as page:
        assert page.width > 6 * 128


# Failures


def test_an_unknown_word_is_a_sentence(stand_in, capsys, tmp_path):
    assert main(["generate", "a red aple", *SMALL]) == 1
    assert "'aple'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "there is no folder or file nowhere"),
        ("/no/such/folder", "there is no folder or file /no/such/folder"),
        ("owner/name", "not in the local cache of the hub; --download fetches it"),
        ("missing.safetensors", "there is no file missing.safetensors"),
        ("broken.safetensors", "broken.safetensors is no checkpoint that can be read"),
        ("broken.ckpt", "broken.ckpt is no checkpoint that can be read"),
        ("empty", "empty is no diffusers pipeline: it has no model_index.json"),
        ("text.txt", "text.txt is neither a folder nor a .safetensors or .ckpt file"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "cat", "--model"], ["info"]], ids=["generate", "info"])
def test_models_that_are_not_there_are_told_without_the_network(
    command, model, message, capsys, no_network, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    for name in ("broken.safetensors", "broken.ckpt", "text.txt"):
        Path(name).write_bytes(b"this is no model")
    Path("empty").mkdir()
    assert main([*command, model]) == 1
    said = capsys.readouterr().err
    assert said.startswith("agentsd: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_written_is_a_sentence(stand_in, capsys):
    Path("taken").write_text("a file")
    assert main(["generate", "a rose", *SMALL, "--out", "taken/a.png"]) == 1
    assert "cannot write taken/a.png" in capsys.readouterr().err


def test_an_unknown_device_is_a_sentence(folder, capsys):
    assert main(["generate", "cat", "--model", str(folder), "--device", "abacus"]) == 1
    assert "device 'abacus' cannot be used" in capsys.readouterr().err


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
    assert sorted(path.name for path in Path("swept").iterdir()) == [
        "01-01.png",
        "01-02.png",
        "sweep.csv",
        "without.png",
    ]
    for path in Path("swept").glob("*.png"):
        Image.open(path).load()
    assert len(Path("swept/sweep.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert agentsd.get_patch(stand_in.unet) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_file_appears_whole_or_not_at_all(error):
    def write(file):
        file.write(b"half of it")
        file.flush()
        raise error

    path = Path("file.bin")
    for expected in (None, b"the file of before"):
        if expected:
            path.write_bytes(expected)
        with pytest.raises(error):
            files.write_whole(path, write)
        assert (path.read_bytes() if path.exists() else None) == expected
        assert list(Path().glob(LEFT_OVER)) == []


def test_written_files_have_the_usual_mode():
    Path("usual").touch()
    files.write_whole(Path("ours"), lambda file: file.write(b"x"))
    assert Path("ours").stat().st_mode == Path("usual").stat().st_mode


# Models


# diffusers' names of an autoencoder's parts, and LDM's
LDM_NAMES = (
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d)\.\1samplers\.0", r"\1.\2.\1sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (r"decoder\.up\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}"),
)


def ldm_autoencoder(vae) -> dict[str, torch.Tensor]:
    """The weights of an autoencoder under LDM's names."""
    state = {}
    for name, value in vae.state_dict().items():
        for theirs, ldms in LDM_NAMES:
            name = re.sub(theirs, ldms, name)
        is_convolution = "attn_1" in name and value.ndim == 2  # LDM's projections are convolutions of 1 × 1
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_convolution else value
    return state


def single_file(path: Path):
    """Write a checkpoint as people share them; returns the pipeline that it stands for."""
    from safetensors.torch import save_file
    from test_diffusers import ldm_and_diffusers

    pipe, (ldm, pipe_unet) = tiny_sd(), ldm_and_diffusers()
    pipe.unet = pipe_unet
    state = {f"model.diffusion_model.{name}": value for name, value in ldm.state_dict().items()}
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({**state, **ldm_autoencoder(pipe.vae)}, path)
    return pipe


def theirs(pipe, size: int = 128) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": 2, "guidance_scale": 7.0, "height": size, "width": size}
    return pixels(sheets.enlarged(pipe("cat", generator=generator, **given).images[0], 256))


def test_a_diffusers_folder(folder, no_network, capsys):
    given = ["cat", "--model", str(folder), "--steps", "2", "--seed", "5", "--quiet"]
    assert main(["generate", *given, "--off", "--out", "plain.png"]) == 0
    assert np.array_equal(pixels(Image.open("plain.png")), theirs(tiny_sd()))
    assert main(["generate", *given, "--until", "1", "--out", "ours.png"]) == 0
    assert "agents in 6 of 14" in capsys.readouterr().out
    assert not np.array_equal(pixels(Image.open("ours.png")), theirs(tiny_sd()))


def test_an_sdxl_folder_is_patched_where_it_has_attention(no_network, capsys):
    tiny_sdxl().save_pretrained("xl")
    assert main(["generate", "cat", "--model", "xl", *SMALL[:2], "--size", "128", "--quiet", "--until", "1"]) == 0
    assert "agents in 16 of 16" in capsys.readouterr().out


def test_a_single_file(folder, no_network):
    pipe = single_file(Path("tiny.safetensors"))
    given = ["--model", "tiny.safetensors", "--config", str(folder), "--steps", "2", "--seed", "5", "--quiet"]
    assert main(["generate", "cat", *given, "--off", "--out", "plain.png"]) == 0
    assert np.array_equal(pixels(Image.open("plain.png")), theirs(pipe))


def test_a_single_file_without_its_configuration_is_told(no_network, capsys, monkeypatch):
    single_file(Path("tiny.safetensors"))
    assert main(["generate", "cat", "--model", "tiny.safetensors"]) == 1
    said = capsys.readouterr().err
    assert "--config" in said
    assert "--download" in said


def hub_cache(cache: Path, folder: Path) -> None:
    """A cache of the hub that has the folder as owner/tiny."""
    model = cache / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


def test_a_hub_id_comes_from_the_cache(folder, tmp_path):
    """In a process of its own, since the cache's place is read when the hub's library is imported."""
    hub_cache(tmp_path / "cache", folder)
    command = [sys.executable, "-m", "agentsd", "generate", "cat", "--model", "owner/tiny", "--steps", "2"]
    root = Path(agentsd.__file__).parents[1]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [*command, "--seed", "5", "--off", "--out", "a.png"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    apart = np.abs(pixels(Image.open("a.png")).astype(int) - theirs(tiny_sd()))
    assert apart.max() <= 2, "but for the rounding of another number of threads"
    assert "/2 [" in done.stderr, "a progress bar of two steps; a fast machine draws only its beginning"


def test_the_embedded_model_takes_no_negative_prompt(stand_in, capsys):
    assert main(["generate", "a rose", *SMALL, "--negative", "banana"]) == 1
    assert "takes no negative prompt" in capsys.readouterr().err


# info


def test_info_names_what_would_happen(folder, capsys, no_network):
    assert main(["info", str(folder), "--size", "128", "256x128", "--layers"]) == 0
    said = capsys.readouterr().out
    assert "7 transformer blocks" in said
    assert "128 × 128 pixels, a latent of 16 × 16" in said
    assert "256 × 128 pixels, a latent of 32 × 16" in said
    assert "down_blocks.0.attentions.0.transformer_blocks.0: agents, cells of 4 × 4" in said
    assert "untouched: downsample 2 is above 1" in said


def test_info_as_json_is_what_happens(folder, capsys):
    given = ["--until", "1", "--agent-ratio", "0.75", "--max-downsample", "2"]
    assert main(["info", str(folder), "--size", "128", "--json", *given]) == 0
    said = json.loads(capsys.readouterr().out)["sizes"][0]
    pipe = tiny_sd()
    patch = agentsd.patch_unet(pipe.unet, options.config_of(options.parse(["info", *given]).settings, 1))
    theirs(pipe)
    found = {(layer.plan.action, layer.plan.tokens, layer.plan.agents) for layer in patch.report()}
    assert found == {(level["action"], level["tokens"], level["agents"]) for level in said["parts"][0]["levels"]}
    assert said["share"] < 1


def test_info_on_the_embedded_model_needs_no_weights(capsys):
    assert main(["info"]) == 0
    assert "4096" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "linear"), [("SD 1", False), ("SD 2", True)])
def test_info_reads_the_layout_off_a_single_file(name, linear, monkeypatch):
    openaimodel = pytest.importorskip(
        "ldm.modules.diffusionmodules.openaimodel", reason="needs stable-diffusion-sdkit's ldm"
    )
    with torch.device("meta"):
        ldm = openaimodel.UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=1024 if linear else 768,
            use_linear_in_transformer=linear,
            use_checkpoint=False,
            legacy=False,
        )
    state = {f"model.diffusion_model.{key}": value for key, value in ldm.state_dict().items()}
    monkeypatch.setattr(structure, "shapes_of", lambda path: state)
    unet, side, factor = structure.bare_unet("any.safetensors")
    assert layout_of(unet, name) == layouts()[name]
    assert (side, factor) == (64, 8)


def test_info_of_a_file_without_a_unet(capsys):
    from safetensors.torch import save_file

    save_file({"lora": torch.zeros(2)}, "lora.safetensors")
    assert main(["info", "lora.safetensors"]) == 1
    assert "lora.safetensors has no U-Net" in capsys.readouterr().err


# Parts


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
    found = sheets.difference(a, b)
    assert found.getpixel((3, 4)) == (40, 0, 255)
    assert np.count_nonzero(pixels(found)) == 2


def test_a_sheet_shows_its_pictures_as_they_are():
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    page = sheets.sheet(
        [[red, None], [blue, red]], columns=["one", "two"], labels=["a", "b"], captions=[["x"], ["y\nz"]]
    )
    colours = {colour: count for count, colour in page.getcolors(page.width * page.height)}
    assert colours[(255, 0, 0)] == 2 * 40 * 30
    assert colours[(0, 0, 255)] == 40 * 30


def test_small_pictures_are_enlarged_by_whole_numbers():
    assert sheets.enlarged(flat(1, 64), 256).size == (256, 256)
    assert sheets.enlarged(flat(1, 512), 256).size == (512, 512)


def test_the_stopwatch_leaves_no_hooks():
    unet = tiny_unet()
    with runs.Stopwatch(unet) as watch:
        unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 7, 32))
    assert watch.calls == 1
    assert watch.seconds > 0
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks
