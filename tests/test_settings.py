"""The table of settings, the infotext, the X/Y/Z axes and the presets, without a WebUI."""

from __future__ import annotations

import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentsd import TOKEN_MERGING, AgentConfig, SettingError, paper_stages
from agentsd.config import FIELDS, SMALL
from agentsd.rules import format_rules, parse_rules
from agentsd.settings import BY_NAME, DEFAULTS, NAMES, SETTINGS, check, from_args, infotext, schema, to_config, tunings
from agentsd.settings.presets import CUSTOM, KEPT, PRESETS, preset_of
from agentsd.tuning.result import Tuning
from agentsd.webui import xyz
from agentsd.webui.xyz import XYZ

# How the WebUI takes an infotext apart, as documented by its format: "key: value" pairs, quoted where needed
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
RULES = [
    "",
    "downsample=2+4 until=0.4 method=corrected agent_ratio=0.9",
    "blocks=middle_block.* full | blocks=input_blocks.[1-4].*+*output* since=0.25 ratio=0.3 use_rand=off",
]
PLAN = "tuning 1 64x64 0.02 12345678 | method=corrected agent_ratio=0.95 | 0.0 a..a | 0.5 aaaa"
TUNINGS = ["", "auto", f"first {PLAN}", f"first {PLAN} & hires {PLAN.replace('64x64', '128x128')}"]


def values_of(row):
    """Any value that a control of this row can have."""
    if row.kind == "flag":
        return st.booleans()
    if row.kind == "choice":
        return st.sampled_from(row.choices)
    if row.kind == "text":
        return st.sampled_from(RULES if row.name == "rules" else TUNINGS)
    return (st.integers if row.kind == "whole" else st.floats)(row.low, row.high)


SWITCHED_ON = st.fixed_dictionaries({row.name: values_of(row) for row in SETTINGS} | {"enabled": st.just(True)})


def on(**values):
    return check({"enabled": True, **values})


# The table


def test_rows_are_complete_and_labels_are_unique():
    assert len({row.label for row in SETTINGS} - {""}) == len(BY_NAME) == len(SETTINGS)
    for row in SETTINGS:
        assert row.help.endswith(".")
        for value in (row.check(row.default), row.parse(row.format(row.default))):
            assert (value, type(value)) == (row.default, type(row.default))


def test_the_api_order_is_a_contract():
    """The token map's switch came before the rules did."""
    assert schema.ARGUMENTS[:24] == (
        "enabled", "ratio", "agent_ratio", "k_scale2", "k_shortcut", "fp32", "agent_source", "method", "since", "until",
        "hires_until", "after", "passes", "max_downsample", "min_tokens", "max_agents", "sx", "sy", "use_rand",
        "merge_attn", "merge_crossattn", "merge_mlp", "seed", schema.RECORD,
    )  # fmt: skip
    assert set(schema.ARGUMENTS) == {*NAMES, schema.RECORD}


# Values


def test_what_a_browser_or_a_program_makes_of_a_value():
    made = {"ratio": 0, "sx": 3.0, "max_downsample": 2, "max_agents": 64.0, "until": 1, "how_close": 0.005, "sy": None}
    canonical = {"ratio": 0.0, "sx": 3, "max_downsample": "2", "max_agents": 64, "until": 1.0, "how_close": "0.5%"}
    found = check(made)
    assert found == {**DEFAULTS, **canonical}, "a cleared field is the default"
    assert {name: type(found[name]) for name in canonical} == {name: type(value) for name, value in canonical.items()}


BAD = {
    "ratio": (-1, 1.2, float("nan"), "0.4", True, [0.4]),
    "sx": (0, 2.5, 10**400),
    "max_downsample": (3, True),
    "use_rand": ("False", 1),
    "agent_source": ("tokens",),
    "until": (0,),
    "enabled": ("on",),
    "how_close": (0.3,),
    "rules": (7, " | ".join(["downsample=1 full"] * 100)),
    "tuning": (7, "first tuning 1 64x64", {"size": [64, 64]}, [7]),
    "tune": (1.5,),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named(name):
    for value in BAD[name]:
        with pytest.raises(SettingError, match=rf"^{name} must be .*got"):
            check({name: value})


def test_messages_repeat_values_shortened():
    for name, said, longest in (("ratio", "^ratio must be a number", 200), ("x" * 200_000, "^unknown", 800)):
        with pytest.raises(SettingError, match=said) as raised:
            check({name: ["y"] * 50_000})
        assert len(str(raised.value)) < longest


# The API's forms


@given(SWITCHED_ON, st.integers(1, 23))
def test_list_and_dictionary_mean_the_same(values, n):
    in_order = {**values, schema.RECORD: False}
    assert from_args([in_order[name] for name in schema.ARGUMENTS]) == from_args([values]) == values
    head = {name: values[name] for name in schema.ARGUMENTS[:n]}
    assert from_args(list(head.values())) == {**DEFAULTS, **head}


MEANT = [
    ([], None, DEFAULTS),
    ([{}], None, {"enabled": True}),
    ([{"enabled": False}], None, DEFAULTS),
    # a dictionary counts; what it does not name is what the arguments behind it say, such as an infotext's
    ([{"k_scale2": 0.5, "sx": 3}, 0.4], None, {"ratio": 0.4, "k_scale2": 0.5, "sx": 3}),
    ([{"ratio": 0.3}, 0.4], None, {"ratio": 0.3}),
    ([False, "abc"], None, DEFAULTS),  # off looks at nothing else
    # an X/Y/Z cell counts more
    ([False, 0.2], {"enabled": True, "ratio": 0.4}, {"ratio": 0.4}),
    ([True, 0.2], {"enabled": False}, DEFAULTS),
    ([True] + [None] * 22 + [True, "ratio=0.2"], None, {"rules": "ratio=0.2"}),
]


def test_what_arguments_mean():
    for args, overrides, expected in MEANT:
        assert from_args(args, overrides).items() >= expected.items()
        assert schema.wants_record(args) is (len(args) > 23), "it is asked for after the settings"


def test_a_list_in_the_older_extensions_order_is_refused():
    older = [True, True, 20, 4, 4, 0.4, 0.95, 2, 2, 0.4, 0.5, False, 1, False, True, 0.3, 0.075]
    with pytest.raises(SettingError, match=r"sd-webui-agentattention.*expected were enabled, ratio, agent_ratio"):
        from_args(older)
    assert from_args([False, *older[1:]]) == DEFAULTS, "while it is off nothing is checked"
    with pytest.raises(SettingError, match=r"^ratio must be a number"):
        from_args([{"ratio": True}])


# The core's config


def test_the_panels_defaults_and_what_has_another_form_in_the_core():
    core = {
        "method": "corrected",
        "ratio": 0.0,
        "agent_ratio": 0.95,
        "max_downsample": "auto",
        "stages": (),
        "rules": (),
    }
    core |= {"attn_precision": None, "max_agents": None}
    assert vars(to_config(on())).items() >= core.items()
    assert to_config(check({})) is None
    values = {"max_downsample": "4", "fp32": True, "max_agents": 64, "rules": RULES[1]}
    core = {"max_downsample": 4, "attn_precision": "fp32", "max_agents": 64, "rules": parse_rules(RULES[1])}
    assert vars(to_config(on(**values))).items() >= core.items()


def test_rules_and_tunings_may_be_text_or_data():
    written = [{"settings": {"method": "pool"}, "downsample": 2, "until": 0.5}, {"settings": None, "blocks": "mid*"}]
    text = "downsample=2 until=0.5 method=pool | blocks=mid* full"
    assert check({"rules": written})["rules"] == from_args([{"rules": written}])["rules"] == text
    assert format_rules(to_config(on(rules=written)).rules) == text
    text, data = f"first {PLAN}", Tuning.from_text(PLAN).to_dict()
    for value in (PLAN, text, data, Tuning.from_text(PLAN), [data], [text, PLAN]):
        assert check({"tuning": value})["tuning"] == text
    assert check({"tuning": " auto "})["tuning"] == "auto"


def test_a_pass_takes_its_own_plan_before_the_first_passs():
    own, small = PLAN.replace("0.02", "0.01"), PLAN.replace("64x64", "8x8")
    plans = tunings.read(f"first {PLAN} & hires {own} & img2img {small}")
    found = {of: [plan.tolerance for plan in tunings.matching(plans, of, (64, 64))] for of in tunings.PASSES}
    assert found == {"first": [0.02], "hires": [0.01, 0.02], "img2img": [0.02]}
    assert tunings.matching(plans, "first", (64, 128)) == []


def test_from_until_and_afterwards_of_each_pass():
    values = on(since=0.2, until=0.5, hires_until=0.6, after="token merging")
    for hires, end in ((False, 0.5), (True, 0.6)):
        config = to_config(values, hires=hires)
        assert config.at(0.1) is None
        assert config.at(end - 0.01).method == "corrected"
        plain = {name: getattr(config, name) for name in FIELDS}
        assert config.at(end + 0.01) == AgentConfig(**{**plain, **TOKEN_MERGING})
    assert to_config(on(until=0.5)).at(0.7) is None


@given(SWITCHED_ON, st.booleans())
def test_the_table_allows_what_the_core_allows(values, hires):
    """A config comes of all values that the controls can have; only from and until can exclude each other."""
    end = "hires_until" if hires else "until"
    try:
        config = to_config(values, hires=hires)
    except SettingError:
        assert values["since"] >= values[end]
        return
    assert (config is None) == (values["passes"] == ("first" if hires else "hires"))


# Infotext


def controls(parsed):
    return {row.name: infotext.reader(row.name)(parsed) for row in SETTINGS}


@given(SWITCHED_ON)
def test_infotext_round_trip_in_an_alphabet_that_all_readers_know(values):
    assert is_plain(infotext.write(values))
    text = f"a cat\nSteps: 4, Sampler: Euler a, {infotext.KEY}: {infotext.write(values)}, Version: v1.10.1"
    found = controls(dict(PAIR.findall(text.splitlines()[-1])))
    assert found == {row.name: None if row.local else values[row.name] for row in SETTINGS}


# As 1.0.0 wrote them, with the settings that differ from what it stood for
PAPER = "ratio=0.4; agent_ratio=0.95; k_scale2=0.3; k_shortcut=0.075; agent_source=similarity; until=0.4; "
EVERYTHING = (
    "ratio=0.0; agent_ratio=0.9; k_scale2=1.0; k_shortcut=0.0; fp32=on; agent_source=grid; method=corrected; "
    "since=0.2; until=1.0; passes=hires; max_downsample=4; min_tokens=1024; max_agents=256; sx=2; sy=3; use_rand=off; "
    "merge_attn=on; merge_crossattn=on; merge_mlp=on; seed=9007199254740991"
)
OLD = {
    f"{PAPER}hires_until=0.7; after=token merging":
        {"ratio": 0.4, "agent_source": "similarity", "until": 0.4, "hires_until": 0.7, "after": "token merging"},
    EVERYTHING: {
        "agent_ratio": 0.9, "k_scale2": 1.0, "k_shortcut": 0.0, "fp32": True, "method": "corrected", "since": 0.2,
        "until": 1.0, "passes": "hires", "max_downsample": "4", "min_tokens": 1024, "max_agents": 256, "sx": 2, "sy": 3,
        "use_rand": False, "merge_crossattn": True, "merge_mlp": True, "seed": 2**53 - 1,
    },
}  # fmt: skip


def test_what_1_0_0_wrote_reads_on_and_the_main_settings_are_always_named():
    """The panel's defaults changed; the images of existing infotexts do not."""
    old = {"agent_source": "grid", "method": "agent", "until": 0.6, "min_tokens": 0, "ratio": 0.0}
    for entry, values in OLD.items():
        expected = {**DEFAULTS, **old, "enabled": True, **values}
        assert infotext.read(entry) == expected
        assert infotext.read(infotext.write(expected)) == expected
    assert DEFAULTS["min_tokens"] == SMALL
    assert infotext.write(on()) == (
        "ratio=0.0; agent_ratio=0.95; k_scale2=0.3; k_shortcut=0.075; agent_source=grid; method=corrected; until=1.0; "
        "min_tokens=512"
    )


GOOD = infotext.write(on())
DAMAGED = [
    ("method=agent, agent_ratio=0.9", "method must be one of"),
    (f"{GOOD}; tuning=first tuning 1 48x48 0.05 10f083bd | method=agent agent_r", "tuning is cut off"),
    (f"{GOOD}; tuning=first {PLAN[:-1]} &", "tuning must be"),
    (f"{GOOD}; rules=downsample=2 agent_ratio=0.9", "rules is cut off"),
    (GOOD.replace("0.95", "9"), r"agent_ratio must be a number from 0\.0 to 0\.99; got 9"),
    (f"{GOOD}; brand_new=7", "unknown setting brand_new"),
    (GOOD[:-9], "unknown setting min"),
    (f"{GOOD}; sx", "sx must be a whole number"),
    ("True", "unknown setting True"),
    ("", "unknown setting"),
    (f"{GOOD}; tune=0.5", "unknown setting tune"),  # a local one
]


@pytest.mark.parametrize(("entry", "said"), DAMAGED, ids=[said for _, said in DAMAGED])
def test_a_damaged_entry_is_refused_whole_and_named(entry, said):
    found = controls({infotext.KEY: entry})
    assert {name: value for name, value in found.items() if value is not None}.keys() == {"enabled", "rules"}
    with pytest.raises(SettingError, match=rf"damaged infotext - .*{said}") as error:
        from_args([found[name] if name != schema.RECORD else None for name in schema.ARGUMENTS])
    assert "clear Rules" in schema.labelled(str(error.value))
    assert set(infotext.note([str(error.value)])) <= ALPHABET


def test_a_dictionary_beside_an_infotext_changes_what_it_names():
    """The host puts the infotext's values into the arguments, and the dictionary into the first of them."""
    read = controls({infotext.KEY: "ratio=0.3; method=pool; until=0.9"})
    args = [{"ratio": 0.1}, *(read.get(name) for name in schema.ARGUMENTS[1:])]
    assert from_args(args) == {**schema.IMPLIED, "enabled": True, "ratio": 0.1, "method": "pool", "until": 0.9}


# The alphabet of what goes into metadata

ALPHABET = {chr(c) for c in range(32, 127)} - set(",:\"'(){}<>")


def is_plain(text: str) -> bool:
    depths = list(accumulate((c == "[") - (c == "]") for c in text)) or [0]
    alone = re.fullmatch(r"\d+x\d+|[\d.+-]+|true|false|none", text, re.IGNORECASE)
    return set(text) <= ALPHABET and min(depths) >= 0 == depths[-1] and not alone and len(text) < infotext.LONGEST


def test_the_longest_entry_fits():
    longest = {row.name: max((row.choices), key=len) if row.choices else row.default for row in SETTINGS}
    longest |= {row.name: row.high - 1e-9 if row.kind == "number" else row.high for row in SETTINGS if row.numeric}
    longest |= {"rules": "x" * schema.LONGEST_RULES, "tuning": "x" * schema.LONGEST_TUNING}
    assert infotext.entries(longest).keys() == {infotext.KEY}
    told = infotext.entries({**longest, "tuning": "x" * 4000})
    assert told.keys() == {infotext.NOTE}
    assert is_plain(told[infotext.NOTE])


@example("🄐")  # is taken apart into (A)
@given(st.text(max_size=6000))
def test_any_note_keeps_to_the_alphabet(text):
    assert is_plain(infotext.note([text]))
    told = infotext.note(["4096 tokens → 256 agents", "cells of 4×4"])
    assert told == "not applied; 4096 tokens to 256 agents and cells of 4x4"


# X/Y/Z axes


@pytest.fixture
def plot():
    def option(label, type, apply, confirm=None, choices=None):
        return SimpleNamespace(label=label, type=type, apply=apply, confirm=confirm, choices=choices)

    grid = SimpleNamespace(axis_options=[], AxisOption=option)
    for _ in range(2):
        xyz.register([grid])
    return {option.label.removeprefix(xyz.PREFIX): option for option in grid.axis_options}


def test_an_axis_for_every_setting_sets_it_from_the_plots_text(plot):
    assert len(plot) == len(SETTINGS) - 1
    assert "Tune to" not in plot, "an order, not a setting of an image"

    @given(SWITCHED_ON)
    def set_values(values):
        p = SimpleNamespace()
        for row in SETTINGS:
            if row.axis:
                option = plot["Enabled" if row.name == "enabled" else row.label]
                option.apply(p, option.type(str(values[row.name])), [])
        assert from_args([False], getattr(p, XYZ)) == {**values, "tune": 0.0}

    set_values()


def test_an_axis_switches_on_and_cells_are_separate(plot):
    p = SimpleNamespace(**{XYZ: {}})
    cell = SimpleNamespace(**vars(p))
    plot["Ratio"].apply(cell, 0.4, [])
    assert from_args([False], getattr(cell, XYZ))["enabled"] is True
    assert getattr(p, XYZ) == {}
    plot["How close"].apply(cell, "0.5 %", [])
    assert from_args([True], getattr(cell, XYZ)).items() >= {"how_close": "0.5%", "tuning": "auto"}.items()
    plot["Enabled"].apply(cell, "False", [])
    assert from_args([True], getattr(cell, XYZ))["enabled"] is False


def test_a_bad_value_is_refused_before_the_plot_starts(plot):
    for label, value in (("Ratio", 1.2), ("Agent source", "tokens"), ("Random partition", "no")):
        with pytest.raises(SettingError):
            plot[label].confirm(None, [value])


# Presets

OWN = {"enabled": True, "fp32": True, "min_tokens": 4096, "seed": 5, "how_close": "5%", "tune": 0.01}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_told_from_the_others_and_leaves_the_users_own_affairs_alone(name):
    values = {**DEFAULTS, **PRESETS[name], **OWN}
    assert set(OWN) == set(KEPT) == DEFAULTS.keys() - PRESETS[name].keys()
    assert preset_of(check(values)) == name
    assert preset_of({**values, "k_scale2": 0.31}) == CUSTOM
    for hires in (False, True):
        assert to_config({**values, "passes": "both"}, hires=hires) is not None


def test_the_papers_preset_is_the_papers_config():
    values = check({**PRESETS["Paper"], "enabled": True, "min_tokens": 0})
    assert to_config(values) == AgentConfig(stages=paper_stages(), max_downsample="auto")


# The older extension's image, with its keys as the host's parser reads them
OLDER = {"Steps": "30", "AgAt Active": "True", "AgAt Use Second Pass": "True", "AgAt Second Pass Step": "12"}
OLDER |= {"AgAt First Pass sx": "3", "AgAt First Pass sy": "2", "AgAt First Pass Ratio": "0.35", "Fix Only": "False"}
OLDER |= {"AgAt First Pass Agent Ratio": "0.9", "AgAt Use FP32 Precision": "True", "AgAt Max Downsample": "2"}
OURS = {
    "enabled": True,
    "agent_source": "similarity",
    "ratio": 0.35,
    "agent_ratio": 0.9,
    "sx": 3,
    "sy": 2,
    "fp32": True,
}
OURS |= {"max_downsample": "2", "until": 0.4, "after": "token merging", "passes": "first"}
HIRES = {"passes": "hires", "hires_until": 0.8, "until": schema.IMPLIED["until"]}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {}),
        ({"Fix Only": "True", "Hires steps": "20", "Denoising strength": "0.5"}, HIRES),
        # its second step may never come
        ({"AgAt Second Pass Step": "40"}, {"until": 1.0}),
        ({"AgAt Second Pass Step": "0"}, {"until": BY_NAME["until"].low}),
        ({"AgAt Use Second Pass": "False"}, {"after": "nothing"}),
        # what can't be read is at our default
        ({"AgAt First Pass sx": "0"}, {"sx": schema.IMPLIED["sx"]}),
        ({"AgAt First Pass Ratio": "1.0"}, {"ratio": schema.IMPLIED["ratio"]}),
        ({"Steps": "many"}, {"until": schema.IMPLIED["until"]}),
    ],
    ids=str,
)
def test_an_image_of_the_older_extension_fills_our_controls(changes, found):
    values = controls({**OLDER, **changes})
    local = {row.name: None for row in SETTINGS if row.local}
    assert values == {**schema.IMPLIED, **OURS, **found, **local}
    assert to_config(check(values), hires=values["passes"] == "hires") is not None


def test_our_own_entry_counts_more_and_other_images_are_not_its():
    assert infotext.reader("ratio")({**OLDER, infotext.KEY: "ratio=0.2"}) == 0.2
    for params in ({"Steps": "20", "Fix Only": "True"}, {**OLDER, "AgAt Active": "False"}):
        assert controls(params) == {**dict.fromkeys(NAMES), "enabled": False}, "it changes nothing else"
    assert infotext.reader("ratio") is infotext.reader("ratio"), "both tabs share it"
