"""The zoo of attentions: kinds are what they say, ways are what they are named after, and results are kept."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import zoo
from benchmarks.attentions import KINDS, positions
from benchmarks.rivals import RIVALS, full

SIZE = (13, 14)  # fewer tokens than the oracle keeps
MADE = [kind for kind in KINDS if not kind.startswith("model")]


def attention(kind: str, size: tuple[int, int] = SIZE, heads: int = 3, d: int = 40):
    return KINDS[kind](heads, d, size, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MADE)
def test_kinds_are_finite_and_the_same_each_time(kind):
    at, again = attention(kind), attention(kind)
    for x, y in zip((at.q, at.k, at.v), (again.q, again.k, again.v), strict=True):
        assert x.shape == (1, 3, 13 * 14, 40)
        assert x.isfinite().all()
        assert torch.equal(x, y)


def test_a_gaussian_is_added_to_the_scores():
    at, size = attention("Gaussian, σ 2–4", heads=1), SIZE
    scores = at.q[..., -3:] @ at.k[..., -3:].mT * 40**-0.5
    distance = torch.cdist(positions(size), positions(size)) ** 2
    added = (scores - scores.diagonal(dim1=-2, dim2=-1)[..., None])[0, 0]
    torch.testing.assert_close(added, -distance / 8, rtol=1e-3, atol=1e-3)


def test_attention_falls_off_with_the_distance_where_it_should():
    near = {kind: attention(kind, (32, 32)).concentration()[1] for kind in MADE}
    assert near["Gaussian, σ 2–4"] > 0.8
    assert near["inverse square"] > 2 * (9 * 9 / 32**2)


def test_sinks_take_much_of_the_attention():
    at = attention("sinks, corners", (24, 24))
    weights = (at.q @ at.k.mT * 40**-0.5).softmax(-1)
    assert weights[..., [0, 23, 24 * 23, 24 * 24 - 1]].sum(-1).median() > 0.25


@pytest.mark.parametrize("name", RIVALS)
def test_ways_answer_in_the_shape_of_the_queries(name):
    at = attention("segments")
    out = RIVALS[name].attend(at)
    assert out.shape == at.q.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["full", "local", "top"])
def test_what_has_all_keys_is_exact(name):
    at = attention("sinks, moving")
    torch.testing.assert_close(RIVALS[name].attend(at), full(at), rtol=1e-3, atol=1e-3)


def test_the_iterated_inverse_converges():
    from benchmarks.rivals import _iterated_inverse

    a = (3 * torch.eye(20) + torch.randn(2, 20, 20)).softmax(-1)
    torch.testing.assert_close(_iterated_inverse(a, 20) @ a, torch.eye(20).expand(2, -1, -1), rtol=1e-3, atol=1e-3)


@pytest.fixture
def small():
    return [zoo.Case(kind, size, 2, 40) for size in (SIZE, (8, 8)) for kind in ("segments", "texture")]


def test_a_miniature_is_kept_and_not_measured_again(tmp_path, small, monkeypatch):
    rivals = {name: RIVALS[name] for name in ("full", "local", "corrected", "top")}
    zoo.run(tmp_path, small[:3], 2, rivals)
    with (tmp_path / "zoo.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    assert all(float(row["median"]) <= float(row["worst"]) for row in rows)
    assert {row["relative"] for row in rows if row["method"] == "top"} == {""}
    assert all(float(row["worst"]) == 0 for row in rows if row["method"] == "full")
    measured, really = [], zoo.measure
    monkeypatch.setattr(zoo, "measure", lambda case, *args: (measured.append(case), really(case, *args))[1])
    zoo.run(tmp_path, small, 2, rivals)
    assert measured == small[3:]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("| texture |") == 2
    assert "14×13 = 182 tokens" in table
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_quick_is_a_part_of_the_whole():
    quick, whole = zoo.cases(True, 2**20), zoo.cases(False, 2**20)
    assert {case.kind for case in quick} == {case.kind for case in whole} == set(KINDS)
    assert len(quick) < len(whole)
    assert max(case.size[0] * case.size[1] for case in zoo.cases(False, 5000)) == 4096


def test_what_is_not_finite_is_said():
    assert zoo.error(torch.tensor([[[[torch.nan]], [[1.0]]]]), torch.ones(1, 2, 1, 1)) == [float("inf"), 0.0]
    assert [zoo.short(x) for x in ("inf", "12", "1.234", "0.12345")] == ["∞", ">10", "1.2", "0.123"]


def test_local_attention_s_choices_are_tabled(monkeypatch, tmp_path, capsys):
    from benchmarks import local

    for name, value in {
        "SIZE": (12, 12),
        "HEADS": 1,
        "SHOWN": ("segments", "texture"),
        "WINDOWS": ((16, 4), (8, 4)),
        "PENALTIES": (0.1,),
        "GRIDS": ((16, (4, 4)),),
    }.items():
        monkeypatch.setattr(local, name, value)
    local.main(["--rounds", "1", "--out", str(tmp_path / "local.md")])
    lines = (tmp_path / "local.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "corrected",
        "windows of 16, halo 4 (chosen)",
        "windows of 8, halo 4",
        "μ 0.1",
    ]
    assert len({line.count("|") for line in lines[2:]}) == 1
