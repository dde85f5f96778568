"""The table of settings, the infotext and the XYZ axes, without a WebUI."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentsd import TOKEN_MERGING, AgentConfig, SettingError
from agentsd.config import LIMITS
from agentsd.rules import format_rules, parse_rules
from agentsd.settings import infotext, tunings
from agentsd.settings.table import (
    ARGUMENTS,
    BY_NAME,
    DEFAULTS,
    IMPLIED,
    NAMES,
    RECORD,
    SETTINGS,
    SMALL,
    check,
    from_args,
    labelled,
    to_config,
    wants_record,
)
from agentsd.tuning.result import Tuning
from agentsd.webui import xyz
from agentsd.webui.xyz import XYZ

# How the WebUI takes an infotext apart, as documented by its format: "key: value" pairs, quoted where needed
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


RULES = [
    "",
    "downsample=2+4 until=0.4 method=corrected agent_ratio=0.9",
    "blocks=middle_block.* full | blocks=input_blocks.1.*+*output* since=0.25 ratio=0.3 use_rand=off",
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
    if row.whole:
        return st.integers(int(row.low), int(row.high))
    return st.floats(row.low, row.high)


def settings_of(**fixed):
    return st.fixed_dictionaries(
        {**{row.name: values_of(row) for row in SETTINGS}, **{k: st.just(fixed[k]) for k in fixed}}
    )


# The table


def test_nothing_drifts_from_the_core():
    """Every setting of the core is in the table, with the core's limits, or made of rows that are, or the library's."""
    made_of_others = {"attn_precision": "fp32", "stages": "until"}
    for name, limits in LIMITS.items():
        row = BY_NAME[made_of_others.get(name, name)]
        if name in made_of_others or name in ("max_downsample", "rules"):
            continue
        if limits["kind"] == "choice":
            assert tuple(row.choices) == tuple(map(str, limits["choices"]))
        elif limits["kind"] == "bool":
            assert row.kind == "flag"
        elif name not in ("max_agents", "seed"):
            assert (row.low, row.high) == (limits["low"], limits["high"])


def test_labels_and_names_are_unique():
    assert len({row.label for row in SETTINGS}) == len(SETTINGS)
    assert len(BY_NAME) == len(SETTINGS)


@pytest.mark.parametrize("row", SETTINGS, ids=NAMES)
def test_row_is_complete(row):
    assert row.info.endswith(".")
    assert row.checked(row.default) == row.default
    assert type(row.checked(row.default)) is type(row.default)


def test_the_api_order_is_a_contract():
    """The token map's switch came before the rules did."""
    assert (*NAMES[:23], RECORD, "rules", "tuning", "how_close", "tune", "landmarks") == ARGUMENTS
    assert NAMES[:23] == (
        "enabled", "ratio", "agent_ratio", "k_scale2", "k_shortcut", "fp32", "agent_source", "method", "since", "until",
        "hires_until", "after", "passes", "max_downsample", "min_tokens", "max_agents", "sx", "sy", "use_rand",
        "merge_attn", "merge_crossattn", "merge_mlp", "seed",
    )  # fmt: skip


def test_imports_neither_gradio_nor_the_webui():
    code = (
        "import sys, agentsd.settings.table, agentsd.settings.infotext, agentsd.webui.xyz, agentsd.app.last_run as s; "
    )
    code += "print(sorted({'gradio', 'modules'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Values


@given(settings_of())
def test_canonical_values_stay_as_they_are(values):
    assert check(values) == values


def test_a_cleared_field_is_the_default():
    assert check(dict.fromkeys(NAMES)) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "given", "canonical"),
    [("ratio", 0, 0.0), ("sx", 3.0, 3), ("max_downsample", 2, "2"), ("max_agents", 64.0, 64), ("until", 1, 1.0)],
)
def test_what_a_browser_makes_of_a_value(name, given, canonical):
    found = check({name: given})[name]
    assert found == canonical
    assert type(found) is type(canonical)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", -1),
        ("ratio", 1.2),
        ("ratio", float("nan")),
        ("ratio", "0.4"),
        ("ratio", True),
        ("ratio", [0.4]),
        ("sx", 0),
        ("sx", 2.5),
        pytest.param("sx", 10**400, id="huge"),
        ("agent_source", "tokens"),
        ("max_downsample", 3),
        ("max_downsample", True),
        ("use_rand", "False"),
        ("use_rand", 1),
        ("until", 0),
        ("enabled", "on"),
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(SettingError, match=rf"^{name} must be .*got"):
        check({name: value})


def test_unknown_name_is_named():
    with pytest.raises(SettingError, match=r"unknown setting rato=0\.4 \(did you mean ratio\?\)"):
        check({"rato": 0.4})


# The API's forms


@given(settings_of(enabled=True))
def test_list_and_dictionary_mean_the_same(values):
    in_order = {**values, RECORD: False}
    assert from_args([in_order[name] for name in ARGUMENTS]) == from_args([values]) == values


@given(settings_of(enabled=True), st.integers(1, 23))
def test_short_list_keeps_the_defaults(values, n):
    head = {name: values[name] for name in NAMES[:n]}
    assert from_args(list(head.values())) == {**DEFAULTS, **head}


def test_dictionary_switches_on_and_arguments_go_on_after_it():
    assert from_args([{}])["enabled"] is True
    assert from_args([{"enabled": False}])["enabled"] is False
    assert from_args([{"k_scale2": 0.5}, 0.4])["ratio"] == 0.4
    assert from_args([{"ratio": 0.3}, 0.4])["ratio"] == 0.3


def test_no_arguments_are_the_defaults():
    assert from_args([]) == DEFAULTS


def test_off_looks_at_nothing_else():
    assert from_args([False, "abc"]) == DEFAULTS


def test_an_xyz_cell_counts_more_than_the_arguments():
    assert from_args([False, 0.2], {"enabled": True, "ratio": 0.4})["ratio"] == 0.4
    assert from_args([True, 0.2], {"enabled": False}) == DEFAULTS


# The core's config


def on(**values):
    return check({"enabled": True, **values})


def test_panel_defaults():
    config = to_config(on())
    assert (config.method, config.ratio, config.agent_ratio, config.max_downsample) == ("corrected", 0.0, 0.95, "auto")
    assert config.stages == to_config(on(), hires=True).stages == ()


def test_an_end_is_that_of_its_pass():
    config = to_config(on(until=0.6))
    assert config.at(0.59).method == "corrected"
    assert config.at(0.61) is None
    assert to_config(on(until=0.6), hires=True).stages == ()


def test_off_leaves_the_pass_alone():
    assert to_config(check({})) is None


@pytest.mark.parametrize(("passes", "first", "hires"), [("both", 1, 1), ("first", 1, 0), ("hires", 0, 1)])
def test_passes(passes, first, hires):
    found = [to_config(on(passes=passes), hires=h) is not None for h in (False, True)]
    assert found == [bool(first), bool(hires)]


def test_auto_is_the_cores_own_value():
    assert to_config(on()).max_downsample == "auto"
    assert to_config(on(max_downsample="4")).max_downsample == 4


@pytest.mark.parametrize("text", RULES)
def test_rules_reach_the_core(text):
    assert to_config(on(rules=text)).rules == parse_rules(text)


def test_rules_may_be_text_or_a_list_of_mappings():
    written = [{"settings": {"method": "pool"}, "downsample": 2, "until": 0.5}, {"settings": None, "blocks": "mid*"}]
    assert check({"rules": written})["rules"] == "downsample=2 until=0.5 method=pool | blocks=mid* full"
    assert from_args([{"rules": written}])["rules"] == check({"rules": written})["rules"]
    assert format_rules(to_config(on(rules=written)).rules) == check({"rules": written})["rules"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ratio=2", "ratio must be"),
        ("rato=0.2", "unknown setting rato"),
        ([{"levels": 2}], "unknown setting levels"),
        (7, "rules must be"),
    ],
)
def test_bad_rules_are_named(value, said):
    with pytest.raises(SettingError, match=said):
        check({"rules": value})


def test_a_tuning_may_be_text_or_a_dictionary_or_several():
    text, data = f"first {PLAN}", Tuning.from_text(PLAN).to_dict()
    for value in (PLAN, text, data, Tuning.from_text(PLAN), [data], [text, PLAN]):
        assert check({"tuning": value})["tuning"] == text
    assert check({"tuning": " auto "})["tuning"] == "auto"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tuning", "first tuning 1 64x64", "tuning must be .* damaged"),
        ("tuning", {"size": [64, 64]}, "tuning must be .* damaged"),
        ("tuning", 7, "tuning must be .* got '7'"),
        ("tune", 1.5, "tune must be a number from 0 to 1, got 1.5"),
        ("how_close", 0.3, "how_close must be one of"),
    ],
)
def test_a_bad_tuning_is_named(name, value, said):
    with pytest.raises(SettingError, match=said):
        check({name: value})


def test_a_pass_takes_its_own_plan_before_the_first_passs():
    plans = tunings.read(
        f"first {PLAN} & hires {PLAN.replace('0.02', '0.01')} & img2img {PLAN.replace('64x64', '8x8')}"
    )
    found = {of: [plan.tolerance for plan in tunings.matching(plans, of, (64, 64))] for of in tunings.PASSES}
    assert found == {"first": [0.02], "hires": [0.01, 0.02], "img2img": [0.02]}
    assert tunings.matching(plans, "first", (64, 128)) == []


def test_the_record_is_asked_for_after_the_settings():
    assert wants_record([True] + [None] * 22 + [True])
    assert not wants_record([True] + [None] * 22)
    assert not wants_record([True] + [None] * 22 + [False, "ratio=0.2"])
    assert from_args([True] + [None] * 22 + [True, "ratio=0.2"])["rules"] == "ratio=0.2"


def test_fp32_and_no_limit():
    assert to_config(on(fp32=True)).attn_precision == "fp32"
    assert to_config(on()).attn_precision is None
    assert to_config(on()).max_agents is None
    assert to_config(on(max_agents=64)).max_agents == 64


def test_from_until_and_afterwards():
    config = to_config(on(since=0.2, until=0.5, after="token merging"))
    assert config.at(0.1) is None
    assert config.at(0.3).agent_source == "grid"
    assert config.at(0.7) == AgentConfig(**{**plain(config), **TOKEN_MERGING})


def plain(config):
    return {name: getattr(config, name) for name in LIMITS if name != "stages"}


@pytest.mark.parametrize(("hires", "name"), [(False, "until"), (True, "hires_until")])
def test_until_must_be_above_from(hires, name):
    with pytest.raises(SettingError, match=rf"^{name} must be above since \(0\.5\), got 0\.5"):
        to_config(on(**{"since": 0.5, name: 0.5}), hires=hires)


@given(settings_of(enabled=True), st.booleans())
def test_the_table_allows_what_the_core_allows(values, hires):
    """A config comes of all values that the controls can have; only from and until can exclude each other."""
    try:
        config = to_config(values, hires=hires)
    except SettingError:
        assert values["since"] >= values["hires_until" if hires else "until"]
        return
    assert (config is None) == (values["passes"] == ("first" if hires else "hires"))


# Infotext


@given(settings_of(enabled=True))
def test_infotext_round_trip(values):
    text = f"a cat\nSteps: 4, Sampler: Euler a, {infotext.KEY}: {infotext.write(values)}, Version: v1.10.1"
    parsed = dict(PAIR.findall(text.splitlines()[-1]))
    found = {row.name: infotext.reader(row.name)(parsed) for row in SETTINGS}
    assert found == {row.name: None if row.local else values[row.name] for row in SETTINGS}


def test_infotext_names_the_main_settings_even_at_their_defaults():
    assert infotext.write(on()) == (
        "ratio=0.0; agent_ratio=0.95; k_scale2=0.3; k_shortcut=0.075; agent_source=grid; method=corrected; until=1.0; "
        "min_tokens=512"
    )


def test_an_infotext_that_names_no_minimum_means_none_as_before():
    """The panel's default changed; the images of existing infotexts do not."""
    assert DEFAULTS["min_tokens"] == SMALL
    before = infotext.read("ratio=0.0; agent_ratio=0.95; until=0.6")
    assert before["min_tokens"] == 0
    assert "min_tokens" not in infotext.write(before)
    assert infotext.read(infotext.write(on())) == on()


@pytest.mark.parametrize("entry", ["xyz", "", "xyz=1; ; foo", "=", "True"])
def test_what_names_no_setting_is_no_entry_of_ours(entry):
    assert infotext.read(entry) is None
    assert infotext.reader("enabled")({infotext.KEY: entry}) is False
    assert infotext.reader("ratio")({infotext.KEY: entry}) is None


def test_infotext_keys_have_no_full_stop():
    assert "." not in infotext.KEY + infotext.NOTE


def test_infotext_without_us_switches_off_and_changes_nothing_else():
    found = {name: infotext.reader(name)({"Steps": "4"}) for name in NAMES}
    assert found == {**dict.fromkeys(NAMES), "enabled": False}


def test_infotext_of_another_version_is_read_as_far_as_it_goes():
    found = infotext.read("ratio=0.4; brand_new=7; sx=99; ; nonsense")
    assert found == {**IMPLIED, "enabled": True, "ratio": 0.4}


def test_readers_are_shared_by_both_tabs():
    assert infotext.reader("ratio") is infotext.reader("ratio")


# XYZ axes


def grid():
    def option(label, type, apply, confirm=None, choices=None):
        return SimpleNamespace(label=label, type=type, apply=apply, confirm=confirm, choices=choices)

    return SimpleNamespace(axis_options=[], AxisOption=option)


def test_an_axis_for_every_setting_once():
    plot = grid()
    xyz.register([plot])
    xyz.register([plot])
    labels = [option.label for option in plot.axis_options]
    assert len(labels) == len(set(labels)) == len(SETTINGS) - 1
    assert not any("Tune to" in label for label in labels), "an order, not a setting of an image"


@given(settings_of(enabled=True))
def test_axes_set_values_from_the_plots_text(values):
    plot = grid()
    xyz.register([plot])
    p = SimpleNamespace()
    rows = [row for row in SETTINGS if row.axis]
    for option, row in zip(plot.axis_options, rows, strict=True):
        typed = str(values[row.name])
        option.apply(p, option.type(typed), [])
    assert from_args([False], getattr(p, XYZ)) == {**values, "tune": 0.0}


def test_the_axis_of_how_close_is_over_one_tuning():
    plot = grid()
    xyz.register([plot])
    option = next(option for option in plot.axis_options if option.label.endswith("How close"))
    for typed in ("0.5%", "0.5 %"):
        p = SimpleNamespace()
        option.apply(p, typed, [])
        assert from_args([True], getattr(p, XYZ)).items() >= {"how_close": "0.5%", "tuning": "auto"}.items()


def test_an_axis_switches_on_and_cells_are_separate():
    plot = grid()
    xyz.register([plot])
    axes = {option.label: option for option in plot.axis_options}
    p = SimpleNamespace(**{XYZ: {}})
    cell = SimpleNamespace(**vars(p))
    axes["[Agent Attention] Ratio"].apply(cell, 0.4, [])
    assert from_args([False], getattr(cell, XYZ))["enabled"] is True
    assert getattr(p, XYZ) == {}


def test_the_switchs_axis_can_switch_off():
    plot = grid()
    xyz.register([plot])
    p = SimpleNamespace()
    for option in plot.axis_options[1:2] + plot.axis_options[:1]:
        option.apply(p, "False" if option.type is str else 0.4, [])
    assert from_args([True], getattr(p, XYZ))["enabled"] is False


@pytest.mark.parametrize(("label", "value"), [("Ratio", 1.2), ("Agent source", "tokens"), ("Random partition", "no")])
def test_a_bad_value_is_refused_before_the_plot_starts(label, value):
    plot = grid()
    xyz.register([plot])
    option = next(o for o in plot.axis_options if o.label.endswith(label))
    with pytest.raises(SettingError):
        option.confirm(None, [value])


# Messages


@pytest.mark.parametrize("value", ["x" * 200_000, ["y"] * 50_000], ids=["text", "list"])
def test_messages_repeat_values_shortened(value):
    with pytest.raises(SettingError, match=r"^ratio must be a number") as raised:
        check({"ratio": value})
    assert len(str(raised.value)) < 200
    with pytest.raises(SettingError) as raised:
        check({"x" * 200_000: value})
    assert len(str(raised.value)) < 800


def test_messages_name_controls_by_their_labels():
    with pytest.raises(SettingError) as raised:
        to_config(on(since=0.7, until=0.6))
    assert labelled(str(raised.value)) == "Until must be above From (0.7), got 0.6"
    with pytest.raises(SettingError) as raised:
        check({"max_agents": 10**11})
    assert labelled(str(raised.value)).startswith("Maximum agents must be a whole number from 0 to")
    assert labelled("unknown setting rato=1") == "unknown setting rato=1"


def test_a_list_in_the_older_extensions_order_is_refused_with_the_order_that_is_expected():
    older = [True, True, 20, 4, 4, 0.4, 0.95, 2, 2, 0.4, 0.5, False, 1, False, True, 0.3, 0.075]
    with pytest.raises(SettingError, match=r"expected were enabled, ratio, agent_ratio, k_scale2") as raised:
        from_args(older)
    assert "sd-webui-agentattention" in str(raised.value)
    assert from_args([False, *older[1:]]) == DEFAULTS, "while it is off nothing is checked"
    with pytest.raises(SettingError, match=r"^ratio must be a number"):
        from_args([{"ratio": True}])
