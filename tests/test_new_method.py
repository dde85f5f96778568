"""A method is one class: registered, it is offered and explained wherever methods are, with nothing else changed."""

from types import SimpleNamespace

import pytest
import torch
from blocks import actions, attention_calls, blocks_of, run
from kinds import GRID
from patching import EXAMPLE, changed, undisturbed

from agentsd import AgentConfig, LayerPlan, Rule, SettingError, get_patch, parse_rules, patch_unet, patched, plan_layer
from agentsd.app.decision import Program, SamplingPass
from agentsd.app.preview import preview
from agentsd.cli import parser
from agentsd.config import FIELDS
from agentsd.costs import estimate, layouts
from agentsd.methods import METHODS, Method, method_named, register, selectable, unregister, untouched
from agentsd.settings import BY_NAME, check, infotext, to_config
from agentsd.webui import xyz


@pytest.fixture(autouse=True)
def _mean():
    @register
    class Mean(Method):
        name = "mean"
        summary = "every token gets the mean of all values"
        noun = "means"
        phrase = "averaged"

        def plan(self, settings, height, width, r):
            N = height * width
            if settings.sx * settings.sy > N:
                return untouched(N, f"{N} tokens are not worth a mean", "sx", "sy")
            return LayerPlan(self, N, N, 1, (height, width))

        def attend(self, attention):
            _, _, v = attention.project(attention.x)
            return attention.project_out(v.mean(dim=1, keepdim=True).expand_as(v))

        def flops(self, plan, channels):
            return 8 * plan.tokens * channels**2

    yield
    if any(method.action == "mean" for method in selectable()):
        unregister("mean")


def test_the_patch_computes_it(unet):
    attn, plain = blocks_of(unet)[0].attn1, run(unet, EXAMPLE)
    with undisturbed(unet), patched(unet, method="mean"):
        with attention_calls(attn) as seen:
            out = run(unet, EXAMPLE)
        assert actions(get_patch(unet)) == ["mean", *["untouched"] * 4, "mean", "mean"]
        assert get_patch(unet).report()[0].calls == {"mean": 1}
        assert not get_patch(unet).notes
        ((x, answer),) = seen
        with torch.no_grad():
            expected = attn.to_out(attn.to_v(x.mean(1, keepdim=True))).expand_as(x)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    assert changed(out, plain)


def test_rules_choose_it(unet):
    rules = parse_rules("blocks=output_blocks.2.* method=mean | downsample=2 full")
    assert rules == (Rule({"method": "mean"}, blocks="output_blocks.2.*"), Rule(None, downsample=2))
    with patched(unet, **GRID, rules=rules):
        run(unet, EXAMPLE)
        assert actions(get_patch(unet)) == ["agents", *["untouched"] * 4, "mean", "agents"]


def test_plans_costs_words_and_marks_have_it(unet):
    method, plan = method_named("mean"), plan_layer(AgentConfig(method="mean"), 12, 10, 1)
    assert plan == LayerPlan(method, 120, 120, 1, (12, 10))
    assert method.words(plan) == "120 tokens → 1 mean"
    assert method.marks(plan, 12, 10, []) == [(0, 0, 12, 10)]
    assert method.caption(plan) == "Dots: 1 mean, each the mean of its cell."
    small = plan_layer(AgentConfig(method="mean"), 3, 5, 1)
    assert (small.reason, small.remedy) == ("15 tokens are not worth a mean", ("sx", "sy"))
    patch = patch_unet(unet, AgentConfig(method="mean", max_downsample=8))
    assert {plan.tokens for _, plan in patch.explain(16, 24) if plan.method is method} == {384, 96}
    found = estimate(layouts()["SD 1"], AgentConfig(method="mean"), 64, 64)
    (level,) = found.changed
    assert (level.plan.action, level.count) == ("mean", 5)
    assert found.flops - found.flops_left == 5 * (4 * 4096**2 * 320)


def test_settings_infotext_and_the_panel_s_preview_have_it():
    row = BY_NAME["method"]
    assert "mean" in row.choices
    assert "mean: every token gets the mean of all values." in row.tooltip
    values = check({"enabled": True, "method": "mean", "rules": "downsample=1 method=mean"})
    assert to_config(values).method == "mean"
    assert "method=mean" in infotext.write(values)
    assert infotext.read(infotext.write(values)) == values

    def previewed(latent, **more):
        return preview({"method": "mean", **more}, [SamplingPass(latent)], 2, Program())["lines"][0]

    assert "4096 tokens → 1 mean in 5 layers" in previewed((64, 64))["text"]
    hint = previewed((8, 8), min_tokens=0, sx=16, sy=16)["hint"]
    assert "64 tokens are not worth a mean" in hint.lower()
    assert BY_NAME["sx"].label in hint


def test_the_xyz_plot_and_the_command_line_take_it(capsys):
    grid = SimpleNamespace(AxisOption=lambda label, type, apply, **more: SimpleNamespace(apply=apply, **more))
    axis, p = xyz.axis(grid, BY_NAME["method"]), SimpleNamespace()
    assert "mean" in axis.choices()
    axis.confirm(None, ["agent", "mean"])
    axis.apply(p, "mean", [])
    assert getattr(p, xyz.XYZ) == {"enabled": True, "method": "mean"}
    assert parser.parse(["generate", "a rose", "--method", "mean"]).settings["method"] == "mean"
    assert parser.parse(["sweep", "a rose", "--x", "method=agent,mean"]).x == ("method", ("agent", "mean"))
    with pytest.raises(SystemExit):
        parser.parse(["generate", "--help"])
    assert "mean" in capsys.readouterr().out.split("--method ")[1].split("--")[0]


def test_forgotten_it_is_nowhere():
    assert "mean" in METHODS
    with pytest.raises(SettingError, match=r"method must be one of .*'mean'.*, got 'meen'"):
        AgentConfig(method="meen")
    unregister("mean")
    assert not any("mean" in each for each in (METHODS, FIELDS["method"].choices, BY_NAME["method"].tooltip))
    for use in (lambda: AgentConfig(method="mean"), lambda: infotext.read("method=mean")):
        with pytest.raises(SettingError, match="method"):
            use()


def test_another_of_its_action_takes_its_place():
    register(type("Median", (type(method_named("mean")),), {"name": "median", "action": "mean"}))
    assert "mean" not in METHODS
    assert "median" in METHODS


@pytest.mark.parametrize("missing", ["plan", "attend"])
def test_a_method_without_one_of_its_parts_is_refused_when_it_is_registered(missing):
    parts = {name: lambda self, *args: None for name in ("plan", "attend") if name != missing}
    with pytest.raises(TypeError, match=missing):
        register(type("Half", (Method,), {"name": "half", **parts}))
    assert "half" not in METHODS
