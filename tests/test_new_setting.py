"""A setting is one row: a field of `AgentConfig`, found wherever settings are, with nothing else changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import agentsd

ROOT = Path(agentsd.__file__).parents[1]
# As a reader of docs/design.md would add it to agentsd/config.py
ROW = """
    sharpness: float = _number(
        0.5, "Sharpness", "How sharp it is.", high=2.0, step=0.1, place=(2, 3), panel=1.0, implied=0.0)
    # fmt: on
"""
USE = r"""
from types import SimpleNamespace
from agentsd import AgentConfig, Rule, SettingError, format_rules, parse_rules
from agentsd.settings import ARGUMENTS, DEFAULTS, check, from_args, infotext, to_config
from agentsd.settings.presets import PRESETS
from agentsd.cli import parser
from agentsd.webui import xyz
from agentsd.comfy.nodes import AgentAttention, values_of
from agentsd.app.preview import page_data

assert AgentConfig().sharpness == 0.5 and AgentConfig(sharpness=2).sharpness == 2.0
assert "sharpness: How sharp it is. A number from 0.0 to 2.0." in AgentConfig.__doc__
for make in (lambda: AgentConfig(sharpness=3), lambda: check({"sharpness": 3}), lambda: parse_rules("sharpness=3")):
    try: make()
    except SettingError as error: assert str(error) == "sharpness must be a number from 0.0 to 2.0, got 3", error
    else: raise AssertionError
# rules
assert parse_rules("downsample=2 sharpness=0.7") == (Rule({"sharpness": 0.7}, downsample=2),)
assert format_rules([Rule({"sharpness": 0.7})]) == "sharpness=0.7"
# API: behind all others
assert ARGUMENTS[-1] == "sharpness" and DEFAULTS["sharpness"] == 1.0
values = from_args([{"sharpness": 1.5}])
assert to_config(values).sharpness == 1.5
# infotext
assert "sharpness=1.5" in infotext.write(values) and infotext.read(infotext.write(values)) == values
assert infotext.read("ratio=0.3")["sharpness"] == 0.0
# presets, page
assert PRESETS["Balanced"]["sharpness"] == 1.0
assert page_data()["help"]["sharpness"] == "How sharp it is."
# X/Y/Z
grid = SimpleNamespace(axis_options=[], AxisOption=lambda *args, **more: SimpleNamespace(label=args[0], args=args))
xyz.register([grid])
label, kind, apply = next(option.args for option in grid.axis_options if option.label.endswith("Sharpness"))
p = SimpleNamespace()
apply(p, kind("0.9"), [])
assert from_args([False], getattr(p, xyz.XYZ))["sharpness"] == 0.9
# command line
assert parser.parse(["generate", "a rose", "--sharpness", "0.3"]).settings["sharpness"] == 0.3
assert parser.parse(["sweep", "a rose", "--x", "sharpness=0.1,0.2"]).x == ("sharpness", (0.1, 0.2))
# ComfyUI: the last input
*_, (name, (type_, options)) = AgentAttention.INPUT_TYPES()["optional"].items()
assert (name, type_, options["default"], options["min"], options["max"]) == ("sharpness", "FLOAT", 1.0, 0.0, 2.0)
assert options["tooltip"] == "How sharp it is."
assert to_config(values_of({"sharpness": 0.25})).sharpness == 0.25
# the panel
import gradio as gr
from agentsd.panel.controls import build
with gr.Blocks():
    panel = build("txt2img", lambda value, **more: gr.Accordion(**more))
slider = panel.controls["sharpness"]
assert (slider.label, slider.value, slider.minimum, slider.maximum) == ("Sharpness", 1.0, 0.0, 2.0)
"""


def test_a_setting_is_one_row_in_one_file(tmp_path):
    package = ROOT / "agentsd"
    for file in package.rglob("*"):
        if file.is_file() and file.suffix in (".py", ".json"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8")
            if file == package / "config.py":
                assert text.count("    # fmt: on\n") == 1
                text = text.replace("    # fmt: on\n", ROW.lstrip("\n"))
            copy.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
