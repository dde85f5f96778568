"""Which layers are patched, and what is done there: the arithmetic, the vetoes in their order, and what lifts them."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import GRID

from agentsd import AgentConfig, Rule, Stage, plan_layer
from agentsd.attention.grid import Grid, cell_side
from agentsd.config import AUTO
from agentsd.plan import plan_block
from agentsd.schedule import Block

SIDE, CELL, RATIO = st.integers(1, 70), st.integers(1, 16), st.floats(0, 0.99)


class TestPlanLayer:
    def test_the_defaults_use_agents_at_the_first_level(self):
        plan = plan_layer(AgentConfig(), 64, 64, 1)
        assert (plan.action, plan.tokens, plan.queries, plan.agents) == ("agents", 4096, 4096 - 1638, 256)
        deeper = plan_layer(AgentConfig(), 32, 32, 2)
        assert (deeper.action, deeper.remedy) == ("untouched", ("max_downsample",))
        assert re.search(r"\b2\b.*\b1\b", deeper.reason)
        # the reference's own defaults
        assert plan_layer(AgentConfig(ratio=0.5, sx=2, sy=2, agent_ratio=0.8), 64, 64, 1).action == "merge"

    def test_agents_are_used_strictly_below_half_the_queries(self):
        # 64 tokens, 4 destinations, 4 agents
        plans = [plan_layer(AgentConfig(ratio=r / 64 + 1e-9, agent_ratio=0.99), 8, 8, 1) for r in (55, 56)]
        assert [(p.action, p.queries, p.agents) for p in plans] == [("agents", 9, 4), ("merge", 8, 0)]

    @given(SIDE, SIDE, CELL, CELL, RATIO, RATIO)
    def test_the_reference_s_arithmetic(self, h, w, sx, sy, ratio, agent_ratio):
        plan = plan_layer(AgentConfig(ratio=ratio, agent_ratio=agent_ratio, sx=sx, sy=sy), h, w, 1)
        N, n_dst = h * w, (h // sy) * (w // sx)
        if n_dst == 0:  # no whole cell: nothing to merge into
            assert plan.action == "untouched"
            return
        r, agent_r = min(N - n_dst, int(N * ratio)), min(N - n_dst, int(N * agent_ratio))
        expected = "agents" if 2 * (N - agent_r) < N - r else ("merge" if r else "untouched")
        assert plan.action == expected
        assert plan.queries == N - r
        assert plan.reason or expected != "untouched"
        if expected == "agents":
            assert (plan.agents, plan.agent_r) == (N - agent_r, agent_r)

    @given(RATIO)
    def test_a_grid_agent_s_cell_is_the_nearest_power_of_two(self, agent_ratio):
        target = -0.5 * math.log2(1 - agent_ratio)
        nearest = min(abs(math.log2(s) - target) for s in (1, 2, 4, 8, 16, 32))
        s = cell_side(agent_ratio, 64, 64)
        assert s in (1, 2, 4, 8, 16)
        assert abs(math.log2(s) - target) == pytest.approx(nearest, abs=1e-9)

    @given(SIDE, SIDE, st.integers(1, 3000), RATIO)
    def test_max_agents_raises_the_cell_no_further_than_needed(self, h, w, max_agents, agent_ratio):
        def agents(side):
            return math.ceil(h / side) * math.ceil(w / side)

        free, s = cell_side(agent_ratio, h, w), cell_side(agent_ratio, h, w, max_agents)
        assert agents(s) <= max_agents
        assert s == free or agents(s // 2) > max_agents
        config = AgentConfig(ratio=0, agent_source="grid", agent_ratio=agent_ratio, max_agents=max_agents)
        plan = plan_layer(config, h, w, 1)
        if plan.action == "agents":
            assert (plan.agents, plan.cell) == (agents(s), (s, s))
        else:
            assert 2 * agents(s) >= h * w

    def test_max_agents_caps_similarity_agents_down_to_the_destinations(self):
        plans = [plan_layer(AgentConfig(agent_ratio=0.8, max_agents=cap), 64, 64, 1) for cap in (None, 500, 300, 100)]
        assert [plan.agents for plan in plans] == [820, 500, 300, 256]


# Each veto of `agentsd.plan` in its order: settings that raise it, and the settings that would lift it
VETOES = {
    "max_downsample": ({"max_downsample": 1}, ("max_downsample",)),
    "min_tokens": ({"min_tokens": 5000}, ("min_tokens",)),
    "merge_attn": ({"merge_attn": False}, ("merge_attn",)),
    "the method": ({"agent_ratio": 0.0, "agent_source": "grid", "ratio": 0.0}, ("agent_ratio",)),
}
ALL_VETOES = {name: value for settings, _ in VETOES.values() for name, value in settings.items()}
LIFTED = {"max_downsample": 2, "min_tokens": 1024, "merge_attn": True, "agent_ratio": 0.9}


class TestVetoes:
    """A layer of 32 × 32 tokens at level 2."""

    @pytest.mark.parametrize("name", VETOES)
    def test_each_alone_leaves_the_layer_untouched_and_its_remedy_lifts_it(self, name):
        given, remedy = VETOES[name]
        plan = plan_layer(AgentConfig(**{**LIFTED, **given}), 32, 32, 2)
        assert (plan.action, plan.acts, plan.queries, plan.agents) == ("untouched", False, 1024, 0)
        assert plan.reason
        assert plan.remedy == remedy
        lifted = {**LIFTED, **given, **{setting: LIFTED[setting] for setting in remedy}}
        assert plan_layer(AgentConfig(**lifted), 32, 32, 2).acts

    def test_they_are_raised_in_the_documented_order_after_a_rule_or_a_stage(self):
        given, block, latent = {**ALL_VETOES}, Block("middle_block.1", 2), (64, 64)
        assert plan_block(AgentConfig(**given, rules=[Rule(None, downsample=2)]), block, latent) is None
        assert plan_block(AgentConfig(**given, stages=[Stage(1.0, None)]), block, latent, 0.5) is None
        for _, remedy in VETOES.values():
            assert plan_block(AgentConfig(**given), block, latent)[1].remedy == remedy
            given |= {setting: LIFTED[setting] for setting in remedy}
        assert plan_layer(AgentConfig(**given), 32, 32, 2).acts

    @pytest.mark.parametrize(
        ("settings", "remedy", "lifted"),
        [
            # 256 cells of 4 × 4 tokens are as few as agents can be
            ({"agent_ratio": 0.99, "ratio": 0.9}, ("sx", "sy", "ratio"), {"sx": 16, "sy": 16}),
            ({"agent_ratio": 0.99, "ratio": 0.9}, ("sx", "sy", "ratio"), {"ratio": 0.5}),
            ({"agent_ratio": 0.4}, ("agent_ratio", "ratio"), {"agent_ratio": 0.9}),
            ({"agent_ratio": 0.6, "ratio": 0.3}, ("agent_ratio", "ratio"), {"ratio": 0.0}),
            (GRID | {"agent_ratio": 0.5, "ratio": 0.5}, ("agent_ratio", "ratio"), {"agent_ratio": 0.95}),
            # untouched
            ({"method": "pool", "sx": 1, "sy": 1}, ("sx", "sy"), {"sx": 2}),
            ({"method": "merge", "ratio": 0.0}, ("ratio",), {"ratio": 0.1}),
            ({"method": "corrected", "agent_ratio": 0.0, "max_agents": 4096}, ("agent_ratio",), {"agent_ratio": 0.9}),
            ({"method": "corrected", "max_agents": 16}, ("max_agents",), {"max_agents": None}),
            ({"method": "corrected", "exact_ratio": 1.0}, ("exact_ratio",), {"exact_ratio": 0.14}),
            ({"agent_ratio": 0.3, "ratio": 0.0}, ("agent_ratio",), {"agent_ratio": 0.9}),
            ({"agent_ratio": 0.9, "ratio": 0.0, "sx": 1, "sy": 1}, ("sx", "sy"), {"sx": 4, "sy": 4}),
        ],
    )
    def test_what_keeps_a_method_or_agents_from_a_layer_is_named_with_its_remedy(self, settings, remedy, lifted):
        plan, better = (plan_layer(AgentConfig(**each), 64, 64, 1) for each in (settings, settings | lifted))
        assert plan.remedy == remedy
        assert (plan.action, bool(plan.reason), bool(plan.shortfall)) in (
            ("untouched", True, False),
            ("merge", False, True),
        )
        assert better.acts
        assert better.shortfall == ""

    def test_merging_that_was_asked_for_falls_short_of_nothing(self):
        for settings in ({"method": "merge"}, {"agent_ratio": 0.0}):
            plan = plan_layer(AgentConfig(**settings), 64, 64, 1)
            assert (plan.action, plan.r, plan.shortfall, plan.remedy) == ("merge", 1638, "", ())
            # words for people make no plan differ
            assert plan == plan_layer(AgentConfig(agent_ratio=0.4), 64, 64, 1)


class TestPlace:
    @pytest.mark.parametrize("d", [1, 2, 4, 8])
    @given(h=st.integers(16, 200), w=st.integers(16, 200))
    def test_how_far_down_is_read_off_the_size(self, d, h, w):
        assert Grid(h, w).level_of(Grid(h, w).at(d)) == d

    def test_auto_is_the_first_level_that_has_self_attention(self):
        auto, latent = AgentConfig(max_downsample=AUTO), (64, 64)
        assert plan_layer(auto, 32, 32, 4, largest_level=2).remedy == ("max_downsample",)
        for first, action in ((1, "untouched"), (2, "agents")):
            assert plan_layer(auto, 64, 64, 2, largest_level=first).action == action
            _, plan = plan_block(auto, Block("input_blocks.4.1", 2, first), latent)
            assert (plan.action, plan.tokens) == (action, 1024)

    def test_a_size_that_was_seen_counts_more_than_the_block_s_place(self):
        config, latent = AgentConfig(max_downsample=2, rules=[Rule({"ratio": 0.1}, downsample=2)]), (64, 64)
        assert plan_block(config, Block("a", None), latent) is None
        for level in (4, None):
            settings, plan = plan_block(config, Block("a", level), latent, size=(32, 32))
            assert (settings.ratio, plan.action, plan.tokens) == (0.1, "agents", 1024)

    def test_the_settings_that_hold_there_are_returned_with_the_plan(self):
        config = AgentConfig(rules=[Rule({"method": "pool", "sx": 2, "sy": 2}, blocks="middle_block.*")])
        found, plan = plan_block(config, Block("middle_block.1", 1), (16, 16))
        assert (found.method, found.rules, plan.action, plan.cell) == ("pool", (), "pool", (2, 2))
        found, plan = plan_block(config, Block("input_blocks.1.1", 1), (16, 16))
        assert (found.method, plan.action) == ("agent", "agents")
