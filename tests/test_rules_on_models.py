"""Rules on real U-Nets of LDM and diffusers: each block does what a patch of its own settings would do."""

import logging

import pytest
import torch
from blocks import actions, blocks_of, run
from kinds import CORRECTED, GRID, MERGING, POOL, SIMILARITY
from patching import EXAMPLE, FLAT, answer, at, attention_dtypes, calls_of
from torch import nn

import agentsd
from agentsd import AgentConfig, Rule, Stage, apply_patch, early, get_patch, patch_unet, patched
from agentsd.hosts import find_sites
from agentsd.schedule import Block


@pytest.fixture
def model(any_unet):
    return any_unet


def block_calls(unet, feed=None):
    """(tokens given, tokens returned) of each block in a call; `feed` replaces what they are given."""
    given, returned, handles = {}, {}, []
    for site in find_sites(unet):

        def before(block, args, kwargs, name=site.name):
            given[name] = (args[0] if feed is None else feed[name]).clone()
            return (given[name].clone(), *args[1:]), kwargs

        def after(block, args, out, name=site.name):
            returned[name] = out.clone()

        # in front of the patch's own hooks, which must see what is fed
        handles.append(site.block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(site.block.register_forward_hook(after))
    answer(unet)
    for handle in handles:
        handle.remove()
    return given, returned


BASE = {"ratio": 0.3, "agent_ratio": 0.9, "sx": 2, "sy": 4, "max_downsample": 8}
FIRST, MIDDLE = ("input_blocks.1.*", "down_blocks.0.*"), ("middle_block.*", "mid_block.*")
LAST = ("output_blocks.3.*", "up_blocks.1.attentions.1.*")
RULES = (
    Rule({"method": "pool", "k_shortcut": 0.5}, downsample=2),
    Rule({"method": "corrected", "agent_ratio": 0.75}, blocks=FIRST),
    Rule(None, blocks=MIDDLE),
    Rule({"method": "merge", "merge_mlp": True, "ratio": 0.5}, blocks=LAST),
)


class TestEachBlock:
    def test_does_what_a_patch_of_its_settings_alone_would_do(self, model):
        with patched(model, **BASE, rules=RULES):
            config = get_patch(model).config
            given, returned = block_calls(model)
            assert not get_patch(model).notes
            seen = {layer.name: set(layer.calls) for layer in get_patch(model).report()}
        assert set().union(*seen.values()) == {"agents", "pool", "corrected", "merge", "untouched"}
        for site in find_sites(model):
            settings = config.at(None, Block(site.name, site.downsample))
            patch = patch_unet(model, settings) if settings else None
            _, alone = block_calls(model, feed=given)
            report = {layer.name: set(layer.calls) for layer in patch.report()} if patch else {}
            agentsd.remove_patch(model)
            assert seen[site.name] == report.get(site.name, {"untouched"})
            assert torch.equal(returned[site.name], alone[site.name]), site.name

    @pytest.mark.parametrize("t", [1000, 699.5, 500, 399.75])
    def test_explain_agrees_with_the_report_at_each_timestep(self, model, t):
        rules = (
            Rule(POOL, until=0.3),
            Rule({"max_downsample": 8, **MERGING}, downsample=2, since=0.2, until=0.6),
            Rule(None, blocks=MIDDLE, since=0.5),
            Rule(CORRECTED, blocks=FIRST, since=0.6),
        )
        apply_patch(model, **SIMILARITY, rules=rules)
        answer(model, t=t)
        patch = get_patch(model)
        foreseen = patch.explain(16, 16, (1000 - t) / 1000)
        assert foreseen == [(layer.name, layer.plan) for layer in patch.report()]
        for (_, plan), layer in zip(foreseen, patch.report(), strict=True):
            assert layer.calls == {"untouched" if plan is None else plan.action: 1}
        assert not patch.notes

    def test_parts_of_one_block(self, unet):
        rules = (Rule({"merge_attn": True}, blocks="input_blocks.1.*"),)
        with patched(unet, **GRID, merge_attn=False, rules=rules):
            run(unet, EXAMPLE)
            assert [layer.calls for layer in get_patch(unet).report()] == [{"agents": 1}, *[{"untouched": 1}] * 6]

    def test_precision_of_one_block(self, unet):
        rules = (Rule({"attn_precision": "fp32"}, blocks="output_blocks.2.*"),)
        with patched(unet, **GRID, rules=rules), torch.autocast("cpu", torch.bfloat16), attention_dtypes() as dtypes:
            run(unet, EXAMPLE)
        assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "rules",
    [
        (Rule(None, blocks=("*put_blocks.*", "down_blocks.*", "up_blocks.*")), Rule(None, blocks=MIDDLE)),
        (Rule({"max_downsample": 8, "ratio": 0.9}), Rule(None, until=0.3), Rule(None, since=0.3)),
    ],
)
def test_full_attention_by_all_rules_is_the_model_to_the_bit(model, rules):
    plain = {t: answer(model, t=t) for t in (900, 100)}
    with patched(model, **MERGING, merge_mlp=True, merge_crossattn=True, rules=rules):
        patch = get_patch(model)
        assert all(torch.equal(answer(model, t=t), out) for t, out in plain.items())
        assert all(layer.calls == {"untouched": 2} and layer.plan is None for layer in patch.report())
        assert not patch.notes


def test_each_stage_merges_what_it_says(unet):
    stages = [Stage(0.5, {"merge_mlp": True}), Stage(1.0, {"merge_crossattn": True, "merge_attn": False})]
    seen = []
    with patched(unet, stages=stages):
        for t in (900, 100):
            with calls_of(blocks_of(unet)[0]) as (_, cross, ff):
                run(unet, at(t))
            seen.append((cross[0][0].shape[1], ff[0][0].shape[1], actions(get_patch(unet))[0]))
    assert seen == [(144, 87, "agents"), (87, 144, "untouched")]


def test_a_rule_begins_and_ends_exactly_where_it_says():
    """For every two-digit fraction, at the timestep at which it is reached."""
    for hundredths in range(1, 100):
        edge, t = hundredths / 100, 1000 - 10 * hundredths
        for rule, before, after in [(Rule(None, since=edge), 1, 0), (Rule(None, until=edge), 0, 1)]:
            patch = agentsd.Patch(FLAT, AgentConfig(rules=[rule]))
            for moment, on in [(t + 0.25, before), (t, after)]:
                patch.begin_call(FLAT, EXAMPLE[:1], {"timesteps": torch.tensor([moment], dtype=torch.float64)})
                assert patch.last_call.active
                assert (patch.config.at(patch.last_call.part) is not None) == bool(on), moment


@pytest.mark.parametrize("t", [[-1, -1], [float("nan")] * 2, [5, 1500]])
@pytest.mark.parametrize("timed", [{"stages": early(1.0)}, {"rules": (Rule(POOL, since=0.5),)}], ids=str)
def test_outside_the_diffusion_they_stand_down_and_say_so_once(unet, t, timed, caplog):
    plain = run(unet, at(t))
    with patched(unet, **GRID, **timed), caplog.at_level(logging.INFO, "agentsd"):
        out = [run(unet, at(t)) for _ in range(2)]
        ((note, count),) = get_patch(unet).notes.items()
    assert "1000 to 0" in note
    assert (count, len(caplog.records)) == (2, 1)
    assert all(torch.equal(each.nan_to_num(), plain.nan_to_num()) for each in out)
    with patched(unet, **GRID, rules=(Rule(POOL),)):
        run(unet, at(t))
        assert not get_patch(unet).notes


@pytest.mark.parametrize(("t", "action"), [([601, 0], "agents"), ([600, 600], "merge"), ([1000, 3], "agents")])
def test_the_largest_timestep_of_a_batch_counts(unet, t, action):
    plain = run(unet, at(t))
    with patched(unet, stages=agentsd.paper_stages()):
        assert not torch.equal(run(unet, at(t)), plain)
        assert actions(get_patch(unet))[0] == action
        assert not get_patch(unet).notes


@pytest.mark.parametrize(
    "idle", [Rule(POOL, blocks="nowhere.*"), Rule(POOL, downsample=8), Rule(POOL, downsample=1, blocks=MIDDLE)]
)
def test_a_rule_that_names_no_block_is_noted_once(model, idle, caplog):
    with patched(model, **GRID):
        expected = answer(model)
    with caplog.at_level(logging.INFO, "agentsd"), patched(model, **GRID, rules=(Rule({}), idle)):
        assert torch.equal(answer(model), expected)
        answer(model)
        (note, count), *more = get_patch(model).notes.items()
        with patched(model, **POOL):  # put back, it is noted once
            pass
    assert not more
    assert "rule 2" in note
    assert count == 0, "no call"
    assert len(caplog.records) == 1


def test_a_block_of_unknown_place_may_turn_out_to_be_named(flat):
    """Its level is seen in a call only."""
    unet = nn.ModuleDict({"somewhere": flat.input_blocks[1][1]})
    unet.forward = lambda x, timesteps, context: unet["somewhere"](x, context)
    settings = AgentConfig(**GRID, rules=(Rule({"agent_ratio": 0.75}, downsample=1), Rule({}, blocks="nowhere")))
    patch = patch_unet(unet, settings)
    assert ["rule 2" in note for note in patch.notes] == [True]
    run(unet, (torch.randn(2, 32, 12, 12), *EXAMPLE[1:]))
    assert patch.report()[0].plan.agents == 36
