"""Parts of the command line: files, distances, sheets of pictures, the stopwatch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from drawing import pixels
from tiny_pipelines import tiny_unet

from agentsd.cli import pictures, runs
from agentsd.cli.pictures import distance

pytestmark = pytest.mark.usefixtures("own_folder")
LEFT_OVER = ".*"


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
    assert list(Path().glob(LEFT_OVER)) == []


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
