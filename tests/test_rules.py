"""Rules: what is accepted, where and when they hold, and their text."""

import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentsd import AgentConfig, Rule, SettingError, Stage, early, format_rules, paper_stages, parse_rules
from agentsd.config import FIELDS, RULE_SETTINGS, TOKEN_MERGING
from agentsd.rules import rules_from
from agentsd.schedule import DOWNSAMPLES, Block

nan, inf = math.nan, math.inf

PATTERN = "a pattern of block names"
# (argument, what the message must say, bad values)
BAD = [
    ("since", "from 0.0 to 1.0", (-0.1, 1.1, nan, inf, "0.5", None, True, [0.1])),
    ("until", "from 0.0 to 1.0", (-0.1, 1.1, nan, -inf, "1", None, False, (1,))),
    ("since", "below until, which is 1.0", (1, 1.0)),
    ("downsample", "1, 2, 4, 8", (0, 3, 16, -1, "2", True, 1.5, nan)),
    ("blocks", PATTERN, ("a b", "a,b", "a|b", "a=b", "a:b", "a;b", '"a"', 3, True, "a+b", "a/b", "ä", "a\n")),
    ("blocks", PATTERN, ("a[b", "a]b", "a[]", "[[a]]")),
    ("settings", "a mapping of settings", ("full", 3, ["ratio"], [("ratio", 0.1)], True)),
]


@pytest.mark.parametrize(("name", "allowed", "values"), BAD)
def test_a_bad_value_is_named_with_its_argument_and_its_range(name, allowed, values):
    for value in values:
        with pytest.raises(SettingError) as error:
            Rule(**{name: value})
        message = str(error.value)
        assert message.startswith(name)
        assert allowed in message
        assert repr(value) in message
    for several, named in (({"downsample": [2, "4"]}, "downsample.*'4'"), ({"blocks": ("a", "")}, "blocks.*''")):
        with pytest.raises(SettingError, match=f"^{named}$"):
            Rule(**several)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ratio": 1.2}, r"ratio must be a number from 0\.0 to 0\.99, got 1\.2"),
        ({"ratoi": 0.1}, "did you mean ratio"),
        ({"seed": 1}, "unknown setting seed=1"),
        ({"rules": ()}, "unknown setting rules"),
        ({1: 2}, "unknown setting 1=2"),
    ],
)
def test_a_bad_setting_is_told_as_soon_as_a_config_is_made(settings, named):
    for config in ({"rules": [Rule(), Rule(settings, since=0.9)]}, {"stages": [Stage(1.0, settings)]}):
        with pytest.raises(SettingError, match=named):
            AgentConfig(**config)


def test_a_rule_is_frozen_hashable_and_keeps_its_settings():
    assert Rule(downsample=2, blocks="a.*") == Rule(downsample=[2.0], blocks=("a.*",))
    assert Rule() == Rule({}, None, None) == Rule({}, (), "", 0, 1)
    settings = {"ratio": 0.1, "method": "pool"}
    rule = Rule(settings, downsample=2, blocks="a", since=0.1, until=0.5)
    assert hash(rule) == hash(Rule({"method": "pool", "ratio": 0.1}, 2, "a", 0.1, 0.5))
    assert Rule(None) != Rule({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.since = 0.2
    config = AgentConfig(rules=[Rule(settings)])
    settings["ratio"] = 7
    assert config.at(None).ratio == 0.1


def holds_in(name: str = "a", level: int | None = 1, **conditions) -> bool:
    return AgentConfig(rules=[Rule({"ratio": 0.9}, **conditions)]).at(None, Block(name, level)).ratio == 0.9


# By pattern: names that it names, and names that it doesn't
PATTERNS = {
    "middle_block": ({"middle_block"}, {"middle_block.1", "my.middle_block"}),  # the whole name
    "middle_block.*": ({"middle_block.1.transformer_blocks.0", "middle_block."}, {"middle_block"}),
    "*.0": ({"middle_block.1.transformer_blocks.0"}, {"middle_block.1"}),
    "*block*": ({"middle_block.1"}, {"attn"}),
    "input_blocks.?.*": ({"input_blocks.4.1"}, {"input_blocks.10.1"}),
    "input_blocks.[14].*": ({"input_blocks.1.1", "input_blocks.4.1"}, {"input_blocks.5.1"}),
    "input_blocks.[4-8].*": ({"input_blocks.7.1"}, {"input_blocks.3.1"}),
    "input_blocks.[!4].*": ({"input_blocks.5.1"}, {"input_blocks.4.1"}),
    "Input_blocks.4": ({"Input_blocks.4"}, {"input_blocks.4", "Input_blocks_4"}),  # case counts
    "*": ({"", "a"}, set()),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_by_name(pattern):
    named, others = PATTERNS[pattern]
    for blocks in (pattern, ("nowhere", pattern)):
        assert {name for name in named | others if holds_in(name, blocks=blocks)} == named


def test_by_level_and_by_both():
    assert holds_in("", None)  # everywhere without a condition
    for levels in ({1}, {1, 8}, set(DOWNSAMPLES)):
        assert {d for d in (*DOWNSAMPLES, None) if holds_in("a", d, downsample=levels)} == levels
    for d, name, holds in [(2, "a.1", True), (2, "b.1", False), (4, "a.1", False)]:
        assert holds_in(name, d, downsample=(1, 2), blocks="a.*") == holds


def test_from_since_to_until():
    rule = Rule(since=0.2, until=0.6)
    assert [rule.holds(p) for p in (0, 0.19999, 0.2, 0.4, 0.59999, 0.6, 1)] == [0, 0, 1, 1, 1, 0, 0]
    # the last moment belongs to what lasts until the end
    assert Rule(since=0.2).holds(1.0)
    assert not Rule(until=0.99).holds(1.0)
    rules = [Rule(since=0.3, until=0.7), Rule(until=0.3), Rule({"ratio": 0.1})]
    config = AgentConfig(rules=rules, stages=early(0.6))
    assert config.parts() == ((0.0, 0.3), (0.3, 0.6), (0.6, 0.7), (0.7, 1.0))
    assert AgentConfig(rules=[Rule({"ratio": 0.1})]).parts() == ((0.0, 1.0),)


@pytest.mark.parametrize("progress", [None, -0.001, 1.001, nan, inf])
def test_where_the_timestep_is_unknown_timed_rules_leave_full_attention(progress):
    assert AgentConfig(rules=[Rule({"ratio": 0.1}), Rule({"sx": 2}, since=0.5)]).at(progress) is None
    assert AgentConfig(rules=[Rule({"ratio": 0.1})]).at(progress).ratio == 0.1


@given(
    edges=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda e: e[0] < e[1]), max_size=4),
    progress=st.floats(0, 1),
)
def test_within_a_part_nothing_changes(edges, progress):
    config = AgentConfig(rules=[Rule({"ratio": (i + 1) / 10}, since=a, until=b) for i, (a, b) in enumerate(edges)])
    # only the very end is beyond the last part
    since = max(part[0] for part in config.parts() if part[0] <= progress and part[0] < 1.0)
    assert config.at(progress) == config.at(since)


TENTH = Rule({"ratio": 0.1})
# Settings with stages and rules, and what holds where: at a progress, or in a block at level 2
ORDER = {
    "own settings": ({"seed": 5, "rules": [Rule({"ratio": 0.1}, blocks="a")]}, {"a": {"ratio": 0.1}, "b": {}}),
    "a later rule counts": ({"rules": [TENTH, Rule({"ratio": 0.2, "sy": 3})]}, {"a": {"ratio": 0.2, "sy": 3}}),
    "an earlier one does not": ({"rules": [Rule({"ratio": 0.2, "sy": 3}), TENTH]}, {"a": {"ratio": 0.1, "sy": 3}}),
    "a part": (
        {"rules": [Rule({"ratio": 0.1}, until=0.5), Rule({"ratio": 0.2}, since=0.8)]},
        {0: {"ratio": 0.1}, 0.49: {"ratio": 0.1}, 0.5: {}, 0.79: {}, 0.8: {"ratio": 0.2}, 1: {"ratio": 0.2}},
    ),
    "full attention": ({"rules": [TENTH, Rule(None, blocks="a")]}, {"a": None, "b": {"ratio": 0.1}}),
    "revived by a later rule, with own settings": (
        {"ratio": 0.3, "rules": [TENTH, Rule(None, downsample=2), Rule({"sx": 2}, blocks="a")]},
        {"a": {"sx": 2}, "b": None},
    ),
    "revived with its stage's settings": (
        {"stages": [Stage(1.0, {"ratio": 0.2})], "rules": [Rule(None), Rule({"sx": 2})]},
        {0.5: {"ratio": 0.2, "sx": 2}},
    ),
    "rules after stages": (
        {"stages": paper_stages(), "rules": [Rule({"ratio": 0.2}, since=0.6), Rule({"sy": 8})]},
        {0.1: {"sy": 8}, 0.5: {**TOKEN_MERGING, "sy": 8}, 0.7: {**TOKEN_MERGING, "sy": 8, "ratio": 0.2}},
    ),
    "no rule changes that a stage leaves the model untouched": (
        {"stages": early(0.6, since=0.2), "rules": [TENTH, Rule({"ratio": 0.2}, since=0.8)]},
        {0: None, 0.1: None, 0.2: {"ratio": 0.1}, 0.5: {"ratio": 0.1}, 0.6: None, 0.9: None, 1: None},
    ),
}


@pytest.mark.parametrize("name", ORDER)
def test_order_of_stages_and_rules(name):
    settings, places = ORDER[name]
    config, own = AgentConfig(**settings), {k: v for k, v in settings.items() if k not in ("stages", "rules")}
    for place, expected in places.items():
        found = config.at(None, Block(place, 2)) if isinstance(place, str) else config.at(place)
        assert found == (None if expected is None else AgentConfig(**own | expected)), place


def _valid(name):
    field = FIELDS[name]
    if field.kind == "flag":
        return st.booleans()
    if field.kind == "choice":
        return st.sampled_from(list(field.choices))
    values = (st.integers if field.kind == "whole" else st.floats)(field.low, field.high)
    return st.none() | values if field.optional else values


SETTINGS = st.fixed_dictionaries({}, optional={name: _valid(name) for name in RULE_SETTINGS})
RULES = st.builds(
    lambda settings, downsample, blocks, part: Rule(settings, downsample, blocks, *part),
    st.none() | SETTINGS,
    st.lists(st.sampled_from(DOWNSAMPLES), unique=True).map(tuple),
    st.lists(st.from_regex(r"([A-Za-z0-9_.*?!-]|\[[A-Za-z0-9_.*?!-]+\])+", fullmatch=True), max_size=3).map(tuple),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda part: part[0] < part[1]),
)


@given(rules=st.lists(RULES, max_size=4))
@example(rules=[Rule()])
@example(rules=[Rule(None), Rule()])
@example(rules=[Rule(blocks="full"), Rule(None, blocks="full")])
def test_text_is_read_back_as_the_same_rules(rules):
    text = format_rules(rules)
    assert parse_rules(text) == tuple(rules)
    assert AgentConfig(rules=parse_rules(text)) == AgentConfig(rules=rules)
    assert not set(text) & set(",:;\"'\n\r\t")


def test_text_as_people_write_it_and_what_programs_give():
    text = " downsample=2+4   until=0.4 method=corrected|Full blocks=middle_block.*+output_blocks.3.* |  "
    rules = (
        Rule({"method": "corrected"}, downsample=(2, 4), until=0.4),
        Rule(None, blocks=("middle_block.*", "output_blocks.3.*")),
    )
    written = "downsample=2+4 until=0.4 method=corrected | blocks=middle_block.*+output_blocks.3.* full"
    assert format_rules(parse_rules(text)) == written
    corrected = {"settings": {"method": "corrected"}, "downsample": [2, 4], "until": 0.4}
    full = {"settings": None, "blocks": ["middle_block.*", "output_blocks.3.*"]}
    for given_rules in (text, rules, (corrected, full), [rules[0], full], iter(rules)):
        assert rules_from(given_rules) == rules
    for blank in ("", " | | \n", None):
        assert rules_from(blank) == ()


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("merge_mlp=True use_rand=off", {"merge_mlp": True, "use_rand": False}),
        ("max_agents=none attn_precision=None", {"max_agents": None, "attn_precision": None}),
        ("max_downsample=auto", {"max_downsample": "auto"}),
        ("ratio=0 sx=2.0 k_scale2=1e-1", {"ratio": 0.0, "sx": 2, "k_scale2": 0.1}),
        ("ratio=0.1 ratio=0.2", {"ratio": 0.2}),
    ],
)
def test_values_in_text(text, settings):
    assert parse_rules(text) == (Rule(settings),)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ratio 0.1", "'ratio'"),
        ("downsample=2, ratio=0.1", "downsample must be one of 1, 2, 4, 8, got '2,'"),
        ("ratoi=0.1", "ratoi.*did you mean ratio"),
        ("seed=1", "unknown setting seed"),
        ("ratio=", "ratio must be a number .*, got ''"),
        ("ratio=1", r"ratio must be a number from 0\.0 to 0\.99, got 1"),
        ("use_rand=maybe", "use_rand must be True or False, got 'maybe'"),
        ("blocks=", "blocks must be a pattern of block names.*, got ''"),
        ("since=2", r"since must be a number from 0\.0 to 1\.0, got 2"),
        ("since=0.9 until=0.4", r"since must be below until, which is 0\.4, got 0\.9"),
        ("full ratio=0.1", "'full'"),
        *((value, "rules must be text or a list of rules") for value in (Rule(), {"settings": {}}, 3, True)),
        (["downsample=2 full"], "rules"),
        ([{"setting": {}}], "did you mean settings"),
        ([{"settings": {"ratio": 2}}], "ratio"),
        ([Rule({"sx": 0})], "sx"),
    ],
)
def test_what_cannot_be_read_is_named(value, said):
    with pytest.raises(SettingError, match=said):
        rules_from(value)


@given(text=st.text(st.sampled_from("|=+.* aflu0129roti_sxdwnmpebk"), max_size=40))
def test_any_text_is_read_or_refused_with_a_sentence(text):
    try:
        rules = parse_rules(text)
    except SettingError:
        return
    assert parse_rules(format_rules(rules)) == rules
