"""Rules on real U-Nets of LDM and diffusers: each block does what a patch of its own settings would do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import pytest
import torch
from blocks import blocks_of, run
from patching import (
    CORRECTED,
    EXAMPLE,
    FLAT,
    GOLDEN,
    GRID,
    MERGING,
    POOL,
    SIMILARITY,
    attention_steps,
    calls_of,
    diffusers_unet,
    undisturbed,
)
from single import SingleAttention

import agentsd
from agentsd import AgentConfig, Rule, Stage, apply_patch, early, get_patch, patch_unet, patched, remove_patch
from agentsd.hosts import example_call, find_sites, output_tensor
from agentsd.plan import plan_layer

UNETS = {"LDM": lambda: copy.deepcopy(GOLDEN), "diffusers": lambda: diffusers_unet("tiny_unet")}


@pytest.fixture(params=UNETS.values(), ids=UNETS)
def model(request):
    return request.param()


@torch.no_grad()
def call(unet, t: float = 500) -> torch.Tensor:
    """The output for a latent of 16 × 16, at a timestep to the bit."""
    given = example_call(unet, 16, 16, 0.5)
    return output_tensor(unet(given.args[0], torch.full((2,), float(t)), *given.args[2:], **given.kwargs))


def block_calls(unet, t: float, feed: Mapping[str, torch.Tensor] | None = None):
    """(tokens given, tokens returned) of each block in a call; `feed` replaces what they are given."""
    given, returned = {}, {}

    def before(name):
        def hook(block, args, kwargs):
            x = args[0] if feed is None else feed[name]
            given[name] = x.clone()
            return (x, *args[1:]), kwargs

        return hook

    @contextmanager
    def watched() -> Iterator[None]:
        handles = []
        for site in find_sites(unet):
            # in front of the patch's own hooks, which must see what is fed
            handles.append(site.block.register_forward_pre_hook(before(site.name), with_kwargs=True, prepend=True))
            handles.append(
                site.block.register_forward_hook(lambda m, a, out, name=site.name: returned.update({name: out.clone()}))
            )
        yield
        for handle in handles:
            handle.remove()

    with watched():
        call(unet, t)
    return given, returned


BASE = {"ratio": 0.3, "agent_ratio": 0.9, "sx": 2, "sy": 4, "max_downsample": 8}
FIRST = ("input_blocks.1.*", "down_blocks.0.*")
MIDDLE = ("middle_block.*", "mid_block.*")
LAST = ("output_blocks.3.*", "up_blocks.1.attentions.1.*")
SPARSE = {"method": "corrected", "agent_ratio": 0.75}
MERGED = {"method": "merge", "merge_mlp": True, "ratio": 0.5}
RULES = (
    Rule({"method": "pool", "k_shortcut": 0.5}, downsample=2),
    Rule(SPARSE, blocks=FIRST),
    Rule(None, blocks=MIDDLE),
    Rule(MERGED, blocks=LAST),
)


def expected_settings(name: str, level: int) -> dict | None:
    """What the rules above say, in other words."""
    if any(fnmatchcase(name, pattern) for pattern in MIDDLE):
        return None
    if any(fnmatchcase(name, pattern) for pattern in FIRST):
        return {**BASE, **SPARSE}
    if any(fnmatchcase(name, pattern) for pattern in LAST):
        return {**BASE, **MERGED}
    return {**BASE, "method": "pool", "k_shortcut": 0.5} if level == 2 else BASE


class TestEachBlock:
    def test_does_what_a_patch_of_its_settings_alone_would_do(self, model):
        levels = {site.name: site.downsample for site in find_sites(model)}
        with patched(model, **BASE, rules=RULES):
            given, returned = block_calls(model, 500)
            assert not get_patch(model).notes
            seen = {layer.name: set(layer.calls) for layer in get_patch(model).report()}
        assert set().union(*seen.values()) == {"agents", "pool", "corrected", "merge", "untouched"}
        found = []
        for name, level in levels.items():
            settings = expected_settings(name, level)
            if settings is None:
                _, alone = block_calls(model, 500, feed=given)
                assert seen[name] == {"untouched"}
            else:
                with patched(model, **settings):
                    _, alone = block_calls(model, 500, feed=given)
                    report = {layer.name: set(layer.calls) for layer in get_patch(model).report()}
                assert seen[name] == report[name]
            assert torch.equal(returned[name], alone[name]), name
            found.append(settings)
        assert len({str(settings) for settings in found}) == 5

    def test_is_explained_and_planned_so(self, model):
        patch = patch_unet(model, AgentConfig(**BASE, rules=RULES))
        for site, (name, plan) in zip(find_sites(model), patch.explain(16, 16), strict=True):
            settings = expected_settings(name, site.downsample)
            side = 16 // site.downsample
            expected = None if settings is None else plan_layer(AgentConfig(**settings), side, side, site.downsample)
            assert (site.name, plan) == (name, expected)

    @pytest.mark.parametrize("t", [1000, 999, 700.5, 700, 699.5, 500, 400, 399.75, 100, 0])
    def test_explain_agrees_with_the_report_at_each_timestep(self, model, t):
        rules = (
            Rule(POOL, until=0.3),
            Rule({"max_downsample": 8, **MERGING}, downsample=2, since=0.2, until=0.6),
            Rule(None, blocks=MIDDLE, since=0.5),
            Rule({"method": "corrected", "agent_ratio": 0.75, "ratio": 0.0}, blocks=FIRST, since=0.6),
        )
        apply_patch(model, **SIMILARITY, rules=rules)
        call(model, t)
        patch = get_patch(model)
        foreseen = patch.explain(16, 16, (1000 - t) / 1000)
        assert foreseen == [(layer.name, layer.plan) for layer in patch.report()]
        assert foreseen == patch.explain(16, 16, (1000 - t) / 1000)
        for (_, plan), layer in zip(foreseen, patch.report(), strict=True):
            assert layer.calls == {"untouched" if plan is None else plan.action: 1}
        assert not patch.notes

    def test_merging_of_one_part_of_one_block(self, unet):
        """The switch is off in the config: hooks are there because a rule turns it on."""
        rules = (Rule({"merge_mlp": True}, blocks="input_blocks.1.*"),)
        first, last = blocks_of(unet)[0], blocks_of(unet)[-1]
        with undisturbed(unet), patched(unet, **SIMILARITY, rules=rules):
            with calls_of(first) as (_, cross, ff), calls_of(last) as (_, other_cross, other_ff):
                run(unet, EXAMPLE)
            assert not get_patch(unet).notes
        assert [x.shape[1] for ((x, _),) in (cross, ff, other_cross, other_ff)] == [144, 87, 144, 144]

    def test_self_attention_of_one_block(self, unet):
        rules = (Rule({"merge_attn": True}, blocks="input_blocks.1.*"),)
        with patched(unet, **GRID, merge_attn=False, rules=rules):
            out = run(unet, EXAMPLE)
            assert [layer.calls for layer in get_patch(unet).report()] == [{"agents": 1}, *[{"untouched": 1}] * 6]
        with patched(unet, **GRID, rules=[Rule(None, blocks="[!i]*"), Rule(None, blocks="input_blocks.3.*")]):
            assert torch.equal(run(unet, EXAMPLE), out)

    def test_precision_of_one_block(self, unet):
        rules = (Rule({"attn_precision": "fp32"}, blocks="output_blocks.2.*"),)
        with patched(unet, **GRID, rules=rules), torch.autocast("cpu", torch.bfloat16), attention_steps() as steps:
            run(unet, EXAMPLE)
        assert [step.dtype for step in steps] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2


FULL = {
    "everywhere": (Rule(None),),
    "level by level": (Rule(None, downsample=1), Rule(None, downsample=(2, 4, 8))),
    "by name": (Rule(None, blocks=("*put_blocks.*", "down_blocks.*", "up_blocks.*")), Rule(None, blocks=MIDDLE)),
    "part by part": (Rule(None, until=0.3), Rule(None, since=0.3)),
    "after other settings": (Rule({"max_downsample": 8, "ratio": 0.9}), Rule(None)),
}


@pytest.mark.parametrize("rules", FULL.values(), ids=FULL)
@pytest.mark.parametrize("t", [900, 700, 100])
def test_full_attention_by_all_rules_is_the_model_to_the_bit(model, rules, t):
    plain = call(model, t)
    with patched(model, **MERGING, merge_mlp=True, merge_crossattn=True, rules=rules):
        assert torch.equal(call(model, t), plain)
        patch = get_patch(model)
        assert all(plan is None for _, plan in patch.explain(16, 16, (1000 - t) / 1000))
        assert all(layer.calls == {"untouched": 1} and layer.plan is None for layer in patch.report())
        assert not patch.notes


SAME = {
    "early": (early(0.4), (Rule(None, since=0.4),)),
    "in the middle": (early(0.7, since=0.3), (Rule(None, until=0.3), Rule(None, since=0.7))),
    "the paper's": (agentsd.paper_stages(), (Rule(MERGING, since=0.4),)),
    "three": (
        (Stage(0.4), Stage(0.6, CORRECTED), Stage(1.0, None)),
        (Rule(CORRECTED, since=0.4, until=0.6), Rule(None, since=0.6)),
    ),
    "that end early": ((Stage(0.5, POOL),), (Rule(POOL, until=0.5), Rule(None, since=0.5))),
}


@pytest.mark.parametrize(("stages", "rules"), SAME.values(), ids=SAME)
def test_stages_are_the_same_as_rules_to_the_bit(model, stages, rules):
    outputs, timesteps = [], (1000, 700.25, 700, 600.5, 600, 500, 400, 300, 0)
    for given in ({"stages": stages}, {"rules": rules}):
        with patched(model, **SIMILARITY, **given):
            outputs.append([call(model, t) for t in timesteps])
            assert not get_patch(model).notes
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_rule_begins_and_ends_exactly_where_it_says():
    """For every two-digit fraction, at the timestep at which it is reached."""
    for hundredths in range(1, 100):
        edge, t = hundredths / 100, 1000 - 10 * hundredths
        for rule, before, after in [(Rule(None, since=edge), 1, 0), (Rule(None, until=edge), 0, 1)]:
            patch = agentsd.Patch(FLAT, AgentConfig(rules=[rule]))
            for at, on in [(t + 0.25, before), (t, after)]:
                patch.begin_call(FLAT, EXAMPLE[:1], {"timesteps": torch.tensor([at], dtype=torch.float64)})
                assert patch.last_call.active
                assert (patch.config.at(patch.last_call.part) is not None) == bool(on), at


@pytest.mark.parametrize("t", [[-1, -1], [1001, 1001], [float("nan")] * 2])
def test_timed_rules_stand_down_outside_the_diffusion(unet, t):
    example = (EXAMPLE[0], torch.tensor(t), EXAMPLE[2])
    plain = run(unet, example)
    with patched(unet, **GRID, rules=(Rule(POOL, since=0.5),)):
        out = run(unet, example)
        (note,) = get_patch(unet).notes
    assert torch.equal(out.nan_to_num(), plain.nan_to_num())
    assert "1000 to 0" in note
    with patched(unet, **GRID, rules=(Rule(POOL),)):
        run(unet, example)
        assert not get_patch(unet).notes


class TestIdleRules:
    @pytest.mark.parametrize(
        "idle", [Rule(POOL, blocks="nowhere.*"), Rule(POOL, downsample=8), Rule(POOL, downsample=1, blocks=MIDDLE)]
    )
    def test_a_rule_that_names_no_block_is_noted_once(self, model, idle, caplog):
        with patched(model, **GRID):
            expected = call(model)
        with caplog.at_level(logging.INFO, "agentsd"), patched(model, **GRID, rules=(Rule({}), idle)):
            assert torch.equal(call(model), expected)
            call(model)
            (note, count), *more = get_patch(model).notes.items()
        assert not more
        assert "rule 2" in note
        assert count == 0, "no call"
        assert len(caplog.records) == 1

    def test_it_is_noted_once_however_often_the_patch_is_put_back(self, unet):
        with patched(unet, **GRID, rules=(Rule(POOL, blocks="nowhere"),)):
            for _ in range(2):
                with patched(unet, **POOL):
                    pass
            assert list(get_patch(unet).notes.values()) == [0]

    def test_a_block_of_unknown_place_may_turn_out_to_be_named(self):
        """Its level is seen in a call only."""
        attention = SingleAttention(find_sites(copy.deepcopy(FLAT))[0])
        settings = AgentConfig(**GRID, rules=(Rule({"agent_ratio": 0.75}, downsample=1), Rule({}, blocks="nowhere")))
        patch = patch_unet(attention, settings)
        assert ["rule 2" in note for note in patch.notes] == [True]
        with torch.no_grad():
            attention(torch.randn(1, 32, 12, 12), 500.0)
        assert patch.report()[0].plan.agents == 36

    def test_a_rule_that_names_a_block_is_not_noted(self, model):
        with patched(model, **GRID, rules=(Rule(POOL, downsample=(2, 8)), Rule(None, blocks=("nowhere", *MIDDLE)))):
            call(model)
            assert not get_patch(model).notes


def test_a_deep_copy_has_rules_of_its_own(model):
    plain = call(model)
    apply_patch(model, **BASE, rules=RULES)
    out = call(model)
    twin = copy.deepcopy(model)
    assert get_patch(twin) is not get_patch(model)
    assert get_patch(twin).config == get_patch(model).config
    assert torch.equal(call(twin), out)
    remove_patch(model)
    assert torch.equal(call(model), plain)
    assert torch.equal(call(twin), out)
    apply_patch(twin, **BASE, rules=RULES[:1])
    assert not torch.equal(call(twin), out)
    remove_patch(twin)
    assert torch.equal(call(twin), plain)
