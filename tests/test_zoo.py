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
    assert weights(at)[..., [0, 23, 24 * 23, 24 * 24 - 1]].sum(-1).median() > 0.25


def test_a_hundredth_of_the_keys_takes_most_of_the_attention_where_norms_are_high():
    at = attention("high-norm keys", (40, 40), heads=1)
    norms = at.k[0, 0].norm(dim=-1)
    assert norms.topk(16).values.min() > 2 * norms.median()
    assert weights(at)[0, 0][:, norms > 2 * norms.median()].sum(-1).mean() > 0.5


def test_mixed_heads_differ_in_kind():
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
    torch.testing.assert_close(EXACT[exact](at), full(at), rtol=1e-2, atol=1e-3)


def alike(size=(16, 16)) -> Attention:
    """Keys and values of a block of rows are the same: nothing is lost by a block's mean."""
    at, block = attention("segments", size, heads=2, d=8), torch.arange(size[0] * size[1]) // 64 * 64
    return Attention(at.q[:, :, block], at.k[:, :, block], at.v[:, :, block], size)


@pytest.mark.parametrize("given", [{"tau": 1e9}, {"tau": 1e9, "salient": 5}, {"kept": 0.25, "rest": "first order"}])
def test_a_pooled_rest_is_exact_where_blocks_are_alike(given):
    at = alike()
    out, price = peers.block_sparse(**given, tiled=False)(at)
    torch.testing.assert_close(out, full(at), rtol=1e-4, atol=1e-4)
    assert price < 1


def test_what_is_dropped_is_missed_and_what_is_first_order_helps():
    at = attention("texture", (16, 16), 2, 8)  # blocks whose keys and values covary alike
    at = Attention(0.2 * at.q, at.k, at.v, at.size)

    def error(**given) -> float:
        out, price = peers.block_sparse(**given, tiled=False)(at)
        assert price == pytest.approx(given["kept"] + (1 - given["kept"]) / 64 * bool(given["rest"]))
        return float((out - full(at)).norm() / full(at).norm())

    assert error(kept=0.5, rest="first order") < error(kept=0.5, rest="zeroth order") < error(kept=0.5, rest="")


def test_monarch_is_exact_for_one_row_and_alternates_towards_full_attention():
    line = attention("segments", (1, 40), heads=2)
    torch.testing.assert_close(peers.monarch(1)(line)[0], full(line))
    at = attention("inverse square", (12, 10))
    errors = [float((peers.monarch(steps)(at)[0] - full(at)).norm()) for steps in (1, 2, 4)]
    assert max(errors[1:]) < errors[0]


def test_the_product_s_methods_run_as_the_product_runs_them():
    at = attention("segments", (32, 28))
    qkv = [split_heads(t, 3) for t in at.tokens]
    expected = corrected_attention(*qkv, size=(32, 28), cell=(4, 4), opened=8)
    torch.testing.assert_close(CANDIDATES["corrected4-0.14"].attend(at), expected)
    pooled = [split_heads(pool_tokens(t, 32, 28, (2, 2)), 3) for t in at.tokens[1:]]
    expected = torch.nn.functional.scaled_dot_product_attention(at.q, *pooled)
    torch.testing.assert_close(CANDIDATES["pool2"].attend(at), expected)


def test_tiles_are_exact_where_nothing_leaves_its_tile():
    y, x = torch.meshgrid(torch.arange(9) // 5, torch.arange(8) // 4, indexing="ij")
    q = 100 * torch.nn.functional.one_hot((2 * y + x).flatten(), 4).float()[None, None]
    at = Attention(q, q, torch.randn(1, 1, 72, 4), (9, 8))
    torch.testing.assert_close(peers.tiles(32)(at), full(at))


def test_saturation_keeps_pnp_nystra_finite_where_its_exponential_overflows():
    at = attention("inverse square")
    sharp = Attention(200 * at.q, at.k, at.v, at.size)
    assert peers.nystrom(4)(sharp).isfinite().all()


def test_the_iterated_inverse_converges():
    a = (3 * torch.eye(20) + torch.randn(2, 20, 20)).softmax(-1)
    inverse = peers.iterated_inverse(a, 20)
    torch.testing.assert_close(inverse @ a, torch.eye(20).expand(2, -1, -1), rtol=1e-3, atol=1e-3)


# Measuring


def test_errors_are_those_of_heads_and_tokens():
    expected = torch.tensor([3.0, 4.0, 0.0, 2.0]).view(1, 2, 2, 1)
    out = expected + torch.tensor([0.0, 5.0, 0.0, 1.0]).view(1, 2, 2, 1)
    assert zoo.errors(out, expected) == {"median": "0.75000", "worst": "1.00000", "token": "1.41421"}
    assert zoo.errors(out * torch.nan, expected)["median"] == "inf"


@pytest.fixture
def few():
    return {name: CANDIDATES[name] for name in ("full", "corrected4-0.4", "corrected4-0", "pool2", "sol1", "top")}


def read(folder, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_miniature_is_kept_and_goes_on_where_it_stopped(tmp_path, few):
    shapes, kinds = [zoo.Shape(*SIZE, 2, 40), zoo.Shape(16, 12, 1, 40)], ("segments", "texture")
    budget = itertools.chain([True] * 3, itertools.repeat(False))
    zoo.run(tmp_path, shapes, 1, parts=["errors"], candidates=few, kinds=kinds, more=lambda: next(budget))
    rows = read(tmp_path, "errors.csv")
    assert len(rows) == 3 * len(few)
    zoo.run(tmp_path, shapes, 1, candidates=few, kinds=kinds)
    whole = read(tmp_path, "errors.csv")
    assert whole[: len(rows)] == rows
    assert len(whole) == 4 * len(few)
    assert all(float(row["worst"]) == 0 for row in whole if row["method"] == "full")
    assert all(float(row["median"]) > 0 for row in whole if row["method"] == "corrected4-0.4")
    seconds = read(tmp_path, "seconds.csv")
    assert {row["method"] for row in seconds} == set(few) - {"sol1", "top"}
    assert {row["relative"] for row in seconds if row["method"] == "full"} == {"1.0000"}
    assert all(float(row["seconds"]) > 0 for row in seconds if row["method"] == "pool2")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "## 14×13, heads of 40: 182 tokens" in table
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_a_method_is_measured_anew_on_request_only(tmp_path, few):
    shape, kinds = [zoo.Shape(*SIZE, 1, 40)], ("segments",)
    zoo.run(tmp_path, shape, 1, parts=["errors"], candidates=few, kinds=kinds)
    changed = few | {"pool2": few["full"]}
    zoo.run(tmp_path, shape, 1, parts=["errors"], candidates=changed, kinds=kinds)
    assert float(read(tmp_path, "errors.csv")[3]["median"]) > 0
    zoo.run(tmp_path, shape, 1, parts=["errors"], candidates=changed, kinds=kinds, again=["pool2"])
    again = {row["method"]: row["median"] for row in read(tmp_path, "errors.csv")}
    assert len(again) == len(few)
    assert float(again["pool2"]) == 0


def test_the_models_heads_come_once_a_size():
    narrow, wide = zoo.Shape(64, 64, 8, 40), zoo.Shape(64, 64, 8, 80)
    found = zoo.cases([narrow, wide])
    assert {case.kind for case in found if case.shape == narrow} == set(KINDS)
    assert {case.kind for case in found if case.shape == wide} == set(MADE)


def test_unknown_methods_are_named(capsys):
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
    found = points({CHEAP: (0.2, 0.2), DEAR: (0.1, 0.5), **others})
    rivals, losses = zoo_report.compare(found)
    assert len(rivals) == 2  # pool4 is cheaper than any of ours
    assert [(loss.other.method, loss.ours.method) for loss in losses] == [("pool2", CHEAP)]
    assert losses[0].factor == pytest.approx(0.2 / 0.15)
    # prices within the noise are the same; full attention and what costs more than it are no rivals
    found = points({DEAR: (0.1, 0.51), "pool2": (0.15, 0.5), "full": (0.0, 1.0), "nystra4": (0.01, 1.2)})
    assert zoo_report.compare(found)[1] == []


def test_the_verdict_counts_what_the_comparison_found():
    others = {"pool2": (0.15, 0.3), "agents": (0.3, 0.4), "sol1": (0.1, 0.25)}
    text = zoo_report.verdict(points({CHEAP: (0.2, 0.2), **others}))
    assert "all by their seconds: 2 comparisons, **ours is the closest in 1 by the median head" in text
    assert "ours by seconds: 1 comparisons, **ours is the closest in 0 by the median head" in text
    assert "| segments | 2: 1, 1 | 1: 1, 1 | 1: 1, 1 | K/V pooled, Sol-Attn |" in text
    assert "The largest lead at ideal prices: Sol-Attn, 8×8, τ 1 has 0.100 at 0.25" in text


def test_the_ideal_price_of_ours_is_that_of_its_products():
    price = CANDIDATES["corrected4-0.14"].attend.ideal((64, 64), 320)
    assert 832 / 4096 + 256 / 4096 < price < 0.3  # the queries' keys, the agents' attention, and the fit


def test_the_page_says_what_the_results_say():
    folder = zoo_report.DATA
    found = zoo_report.join(read(folder, "errors.csv"), read(folder, "seconds.csv"))
    assert zoo_report.verdict(found) in zoo_report.PAGE.read_text(encoding="utf-8")


def test_figures_are_short():
    assert [zoo_report.short(x) for x in (float("inf"), 12, 1.234, 0.12345)] == ["∞", ">10", "1.2", "0.123"]
