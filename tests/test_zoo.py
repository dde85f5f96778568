"""The zoo of attentions: kinds are what they say, candidates compute what they are named after, results are kept."""

from __future__ import annotations

import csv
import itertools

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib (requirements/dev.txt)")

from agentsd.attention.corrected import corrected_attention
from agentsd.attention.tensors import pool_tokens, split_heads
from benchmarks import peers, zoo, zoo_report
from benchmarks.attentions import KINDS, Attention, positions
from benchmarks.candidates import CANDIDATES
from benchmarks.peers import full

close = torch.testing.assert_close
SIZE = (13, 14)  # fewer tokens than the oracle keeps
MADE = [kind for kind in KINDS if not kind.startswith("model")]


def attention(kind: str, size: tuple[int, int] = SIZE, heads: int = 3, d: int = 40) -> Attention:
    return KINDS[kind](heads, d, size, torch.Generator().manual_seed(0))


def weights(at: Attention) -> torch.Tensor:
    return (at.q @ at.k.mT * at.q.shape[-1] ** -0.5).softmax(-1)


# Kinds


@pytest.mark.parametrize("kind", MADE)
def test_kinds_are_finite_and_the_same_each_time(kind):
    at, again = attention(kind), attention(kind)
    for x, y in zip((at.q, at.k, at.v), (again.q, again.k, again.v), strict=True):
        assert x.shape == (1, 3, 13 * 14, 40)
        assert x.isfinite().all()
        assert torch.equal(x, y)


def test_kinds_are_what_they_say():
    at = attention("Gaussian, σ 2–4", heads=1)
    scores = at.q[..., -3:] @ at.k[..., -3:].mT * 40**-0.5
    added = (scores - scores.diagonal(dim1=-2, dim2=-1)[..., None])[0, 0]
    close(added, -(torch.cdist(positions(SIZE), positions(SIZE)) ** 2) / 8, rtol=1e-3, atol=1e-3)
    near = {kind: attention(kind, (32, 32)).concentration()[1] for kind in ("Gaussian, σ 2–4", "inverse square")}
    assert near["Gaussian, σ 2–4"] > 0.8
    assert near["inverse square"] > 2 * (9 * 9 / 32**2)
    sinks = weights(attention("sinks, corners", (24, 24)))
    assert sinks[..., [0, 23, 24 * 23, 24 * 24 - 1]].sum(-1).median() > 0.25
    at = attention("high-norm keys", (40, 40), heads=1)
    norms = at.k[0, 0].norm(dim=-1)
    assert norms.topk(16).values.min() > 2 * norms.median()
    assert weights(at)[0, 0][:, norms > 2 * norms.median()].sum(-1).mean() > 0.5
    at = attention("mixed heads", (24, 24), heads=8)
    spread = [Attention(*(x[:, [i]] for x in (at.q, at.k, at.v)), at.size).concentration()[0] for i in range(8)]
    assert max(spread) > 10 * min(spread)


# Candidates


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_answer_in_the_shape_of_the_queries_or_not_at_all(name):
    at = attention("inverse square")
    out = CANDIDATES[name].attend(at)
    if out is None:
        assert name.startswith("corrected")  # the product leaves so small a layer alone
        return
    if isinstance(out, tuple):
        assert not CANDIDATES[name].timed
        out, price = out
        assert 0 < price <= 1
    assert out.shape == at.q.shape
    assert out.isfinite().all()


EXACT = {
    "top keys": peers.top_keys,
    "ToDo of 1×1": peers.downsampled(1),
    "tomesd of ratio 0": peers.tomesd(0.0),
    "Nyström of all tokens": peers.nystrom(1, exact=True),
    "Sol-Attn that opens all blocks": lambda at: peers.block_sparse(tau=-1e9)(at)[0],
    "Sol-Attn of all tokens salient": lambda at: peers.block_sparse(tau=1.0, salient=110, tiled=False)(at)[0],
    "PISA of all blocks": lambda at: peers.block_sparse(kept=1.0, rest="first order")(at)[0],
    "all blocks kept": lambda at: peers.block_sparse(kept=1.0, rest="")(at)[0],
}


@pytest.mark.parametrize("exact", EXACT)
def test_what_has_all_keys_is_exact(exact):
    at = attention("inverse square", (10, 11))
    close(EXACT[exact](at), full(at), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("given", [{"tau": 1e9}, {"tau": 1e9, "salient": 5}, {"kept": 0.25, "rest": "first order"}])
def test_a_pooled_rest_is_exact_where_blocks_are_alike(given):
    at, block = attention("segments", (16, 16), heads=2, d=8), torch.arange(256) // 64 * 64
    at = Attention(at.q[:, :, block], at.k[:, :, block], at.v[:, :, block], at.size)
    out, price = peers.block_sparse(**given, tiled=False)(at)
    close(out, full(at), rtol=1e-4, atol=1e-4)
    assert price < 1


def test_what_is_dropped_is_missed_and_what_is_first_order_helps():
    at = attention("texture", (16, 16), 2, 8)  # blocks whose keys and values covary alike
    at = Attention(0.2 * at.q, at.k, at.v, at.size)

    def error(rest: str) -> float:
        out, price = peers.block_sparse(kept=0.5, rest=rest, tiled=False)(at)
        assert price == pytest.approx(0.5 + 0.5 / 64 * bool(rest))
        return float((out - full(at)).norm() / full(at).norm())

    assert error("first order") < error("zeroth order") < error("")


def test_monarch_is_exact_for_one_row_and_alternates_towards_full_attention():
    line = attention("segments", (1, 40), heads=2)
    close(peers.monarch(1)(line)[0], full(line))
    at = attention("inverse square", (12, 10))
    errors = [float((peers.monarch(steps)(at)[0] - full(at)).norm()) for steps in (1, 2, 4)]
    assert max(errors[1:]) < errors[0]


def test_the_product_s_methods_run_as_the_product_runs_them():
    at = attention("segments", (32, 28))
    qkv = [split_heads(t, 3) for t in at.tokens]
    expected = corrected_attention(*qkv, size=(32, 28), cell=(4, 4), opened=8)
    close(CANDIDATES["corrected4-0.14"].attend(at), expected)
    pooled = [split_heads(pool_tokens(t, 32, 28, (2, 2)), 3) for t in at.tokens[1:]]
    close(CANDIDATES["pool2"].attend(at), torch.nn.functional.scaled_dot_product_attention(at.q, *pooled))
    price = CANDIDATES["corrected4-0.14"].attend.ideal((64, 64), 320)
    assert 832 / 4096 + 256 / 4096 < price < 0.3  # the queries' keys, the agents' attention, and the fit


def test_tiles_are_exact_where_nothing_leaves_its_tile():
    y, x = torch.meshgrid(torch.arange(9) // 5, torch.arange(8) // 4, indexing="ij")
    q = 100 * torch.nn.functional.one_hot((2 * y + x).flatten(), 4).float()[None, None]
    at = Attention(q, q, torch.randn(1, 1, 72, 4), (9, 8))
    close(peers.tiles(32)(at), full(at))


def test_pnp_nystra_saturates_and_its_inverse_converges():
    at = attention("inverse square")
    assert peers.nystrom(4)(Attention(200 * at.q, at.k, at.v, at.size)).isfinite().all()
    a = (3 * torch.eye(20) + torch.randn(2, 20, 20)).softmax(-1)
    close(peers.iterated_inverse(a, 20) @ a, torch.eye(20).expand(2, -1, -1), rtol=1e-3, atol=1e-3)


# Measuring


def test_errors_are_those_of_heads_and_tokens():
    expected = torch.tensor([3.0, 4.0, 0.0, 2.0]).view(1, 2, 2, 1)
    out = expected + torch.tensor([0.0, 5.0, 0.0, 1.0]).view(1, 2, 2, 1)
    assert zoo.errors(out, expected) == {"median": "0.75000", "worst": "1.00000", "token": "1.41421"}
    assert zoo.errors(out * torch.nan, expected)["median"] == "inf"


FEW = {name: CANDIDATES[name] for name in ("full", "corrected4-0.4", "corrected4-0", "pool2", "sol1", "top")}


def read(folder, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_miniature_is_kept_and_goes_on_where_it_stopped(tmp_path):
    shapes, given = [zoo.Shape(*SIZE, 2, 40), zoo.Shape(16, 12, 1, 40)], {"kinds": ("segments", "texture")}
    budget = itertools.chain([True] * 3, itertools.repeat(False))
    zoo.run(tmp_path, shapes, 1, parts=["errors"], candidates=FEW, **given, more=lambda: next(budget))
    rows = read(tmp_path, "errors.csv")
    assert len(rows) == 3 * len(FEW)
    zoo.run(tmp_path, shapes, 1, candidates=FEW, **given)
    whole = read(tmp_path, "errors.csv")
    assert whole[: len(rows)] == rows
    assert len(whole) == 4 * len(FEW)
    assert all(float(row["worst"]) == 0 for row in whole if row["method"] == "full")
    assert all(float(row["median"]) > 0 for row in whole if row["method"] == "corrected4-0.4")
    seconds = read(tmp_path, "seconds.csv")
    assert {row["method"] for row in seconds} == set(FEW) - {"sol1", "top"}
    assert {row["relative"] for row in seconds if row["method"] == "full"} == {"1.0000"}
    assert all(float(row["seconds"]) > 0 for row in seconds if row["method"] == "pool2")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "## 14×13, heads of 40: 182 tokens" in table
    assert (tmp_path / "zoo.png").stat().st_size > 1000
    changed = {"parts": ["errors"], "candidates": FEW | {"pool2": FEW["full"]}, **given}
    zoo.run(tmp_path, shapes, 1, **changed)
    assert read(tmp_path, "errors.csv") == whole
    zoo.run(tmp_path, shapes, 1, **changed, again=["pool2"])
    again = [row["median"] for row in read(tmp_path, "errors.csv") if row["method"] == "pool2"]
    assert again == ["0.00000"] * 4, "measured anew on request only"


def test_the_models_heads_come_once_a_size_and_unknown_methods_are_named(capsys):
    narrow, wide = zoo.Shape(64, 64, 8, 40), zoo.Shape(64, 64, 8, 80)
    found = zoo.cases([narrow, wide])
    assert {case.kind for case in found if case.shape == narrow} == set(KINDS)
    assert {case.kind for case in found if case.shape == wide} == set(MADE)
    with pytest.raises(SystemExit):
        zoo.main(["--again", "nothing"])
    assert "unknown: nothing; known: full, " in capsys.readouterr().err


# The report

CHEAP, DEAR = "corrected4-0", "corrected4-0.4"


def points(found: dict[str, tuple[float, float]]) -> dict[zoo.Case, list[zoo_report.Point]]:
    """One case; (error, price) by method."""
    of = [zoo_report.Point(name, error, 2 * error, price, price) for name, (error, price) in found.items()]
    return {zoo.Case("segments", zoo.Shape(4, 4, 1, 8)): of}


def test_another_counts_where_it_is_closer_at_a_price_that_ours_reach():
    others = {"pool4": (0.05, 0.1), "pool2": (0.15, 0.3), "agents": (0.3, 0.4)}
    rivals, losses = zoo_report.compare(points({CHEAP: (0.2, 0.2), DEAR: (0.1, 0.5), **others}))
    assert len(rivals) == 2  # pool4 is cheaper than any of ours
    assert [(loss.other.method, loss.ours.method) for loss in losses] == [("pool2", CHEAP)]
    assert losses[0].factor == pytest.approx(0.2 / 0.15)
    # prices within the noise are the same; full attention and what costs more than it are no rivals
    found = points({DEAR: (0.1, 0.51), "pool2": (0.15, 0.5), "full": (0.0, 1.0), "nystra4": (0.01, 1.2)})
    assert zoo_report.compare(found)[1] == []


def test_the_page_says_what_the_results_say():
    errors, seconds = (read(zoo_report.DATA, name) for name in ("errors.csv", "seconds.csv"))
    found, page = zoo_report.join(errors, seconds), zoo_report.PAGE.read_text(encoding="utf-8")
    assert zoo_report.verdict(found) in page
    assert zoo_report.closeness(found, zoo.MAIN, zoo_report.SHOWN) in page
