"""The nodes for ComfyUI, on the host's signatures and real attention; tests/comfyui runs them in the host itself."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from blocks import flat_unet, inputs, sdxl_like_unet
from comfy_stub import ModelPatcher, comfy_unet, install, sample, wrapped
from patching import GOLDEN, changed, difference, patched_output, tree
from torch import nn
from tuned_models import quick_tune

import agentsd
from agentsd import SettingError, TuningError, UnsupportedModelError
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from agentsd.comfy.model import NOT_CALLED, Slot, attach, report_on, slot_of
from agentsd.comfy.nodes import (
    CELLS,
    CUSTOM,
    AgentAttention,
    AgentAttentionReport,
    AgentAttentionTuned,
    idle_inputs,
    values_of,
)
from agentsd.comfy.tuned import MAX_TRIES, attach_tuned
from agentsd.settings import check, to_config

X, T, CONTEXT = inputs(2, 32, 32)
GRID = {"method": "agent", "ratio": 0.0, "agent_ratio": 0.75, "agent_source": "grid", "sx": 2, "sy": 2}
LEFT_OUT = "self-attention was given queries and keys of different numbers, as by token merging or HyperTile"


@pytest.fixture
def host(monkeypatch):
    """The host's attention."""
    return install(monkeypatch)


@pytest.fixture
def model():
    return ModelPatcher(comfy_unet(copy.deepcopy(GOLDEN)))


def run(model, attention, timesteps=(500,), x=X, context=CONTEXT, **parts):
    return sample(model, attention, x, timesteps, context, **parts)


def values(**settings):
    return check({"enabled": True, "max_downsample": 1, "min_tokens": 0, **GRID, **settings})


def on(model, **settings):
    return attach(model, lambda unet: Slot(unet, values(**settings)))


def last(model):
    """Report of the last sampling."""
    return slot_of(model).last


class TestAnswers:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"method": "pool"}, {"method": "corrected"}, {"max_downsample": 2}, {"fp32": True}],
        ids=["grid", "pool", "corrected", "two levels", "fp32"],
    )
    def test_as_the_patch_on_the_u_net_itself(self, model, host, settings):
        patch = agentsd.patch_unet(GOLDEN, to_config(values(**settings)))
        try:
            expected = GOLDEN(X, T, context=CONTEXT).detach()
        finally:
            patch.remove()
        plain, patched = run(model, host), on(model, **settings)
        out = run(patched, host)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert changed(out, plain)
        small = {(256, 1024), (1024, 256)}  # to agents and from them
        if settings.get("fp32"):
            assert not small & set(host.calls), "it is not left to a kernel that may round"
        elif not settings:
            assert small < set(host.calls), "small attentions are the host's"
            asked = []

            def override(func, q, k, v, heads, **kwargs):
                asked.append((kwargs["transformer_options"]["block"], q.shape[1], k.shape[1]))
                return func(q, k, v, heads, **kwargs)

            patched.options["optimized_attention_override"] = override
            assert torch.equal(run(patched, host), out)
            assert (("input", 1), 1024, 256) in asked

    @pytest.mark.parametrize("settings", [{"ratio": 0.4}, {"agent_source": "similarity"}, agentsd.TOKEN_MERGING])
    def test_merging_finds_similar_tokens_by_their_keys(self, model, host, settings):
        plain = run(model, host)
        patched = on(model, **settings)
        first = run(patched, host)
        assert changed(first, plain)
        assert torch.equal(run(patched, host), first)
        assert not last(patched).notes

    @pytest.mark.parametrize(("height", "width"), [(33, 25), (9, 40)])
    def test_odd_sizes(self, host, height, width):
        given = inputs(2, height, width)
        patched = on(ModelPatcher(comfy_unet(flat_unet())))
        out = run(patched, host, x=given[0], context=given[2])
        torch.testing.assert_close(out, patched_output(flat_unet(), given, **GRID), rtol=1e-4, atol=1e-4)
        assert not last(patched).notes

    def test_sdxl_has_its_largest_layers_at_level_2(self, host):
        model = ModelPatcher(comfy_unet(sdxl_like_unet()))
        patched = on(model, max_downsample="auto")
        plain = run(model, host)
        assert difference(run(patched, host), plain) > 1e-3
        assert "256 tokens → 64 agents" in report_on(patched)


class TestDecision:
    @pytest.mark.parametrize("side", [32, 16])
    @pytest.mark.parametrize("steps", [(500,), (900, 600, 300, 0)], ids=["one step", "four steps"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"since": 0.5, "until": 0.8},
            {"until": 0.05},
            {"min_tokens": 512},
            {"method": "pool", "max_downsample": 2},
            {"rules": "blocks=output_blocks.* full"},
            {"rules": "downsample=2 max_downsample=2 method=pool | until=0.5 full"},
            agentsd.TOKEN_MERGING,
        ],
        ids=str,
    )
    def test_what_is_decided_is_what_is_done_and_reported(self, model, host, settings, steps, side):
        x = X[..., :side, :side]
        patched, plain = on(model, **settings), run(model, host, steps, x=x)
        out = run(patched, host, steps, x=x)
        report, told = last(patched), report_on(patched)
        made = report.made
        decided, done = (
            {action: n for action, n in each.items() if n and action != "untouched"}
            for each in (made.calls, report.calls)
        )
        assert decided == done
        assert report.steps == made.steps
        assert told.startswith(f"Sampling {8 * side}×{8 * side}: ")
        if done:
            assert set(report.layers) == set(made.layers)
            assert f"in {made.steps} of {len(steps)} U-Net calls" in told or made.steps == len(steps) > 1
        else:
            assert torch.equal(out, plain)
            assert "nothing happened" in told
            assert made.patches or made.reason.text.lower() in told.lower()

    @pytest.mark.parametrize("where", ["comfy.model.decide", "attention.agent.agent_attention"])
    def test_an_error_of_ours_costs_the_speed_and_not_the_image(self, model, host, monkeypatch, where):
        plain, patched = run(model, host), on(model)
        monkeypatch.setattr(f"agentsd.{where}", lambda *args, **kwargs: 1 / 0)
        assert torch.equal(run(patched, host), plain)
        assert "an error of ours: zerodivisionerror" in report_on(patched).lower()

    def test_another_version_of_the_host_may_not_tell_its_steps(self, model, host):
        del model.model.model_sampling
        patched = on(model)
        run(patched, host)
        assert report_on(patched).startswith("Sampling 256×256: 1024 tokens → 256 agents")


class TestClones:
    def test_nothing_leaks_out_of_a_branch(self, model, host):
        before, plain = tree(model.model.diffusion_model), run(model, host)
        one, other = on(model), on(model, method="pool")
        first, second = run(one, host), run(other, host)
        assert difference(first, second) > 1e-3
        assert torch.equal(run(one.clone(), host), first), "a clone of a clone keeps the patch"
        assert slot_of(one.clone()) is slot_of(one)
        assert torch.equal(run(on(one, method="pool"), host), second), "a later node replaces an earlier one"
        assert torch.equal(run(one, host), first)
        assert torch.equal(run(model, host), plain)
        assert tree(model.model.diffusion_model).keys() == before.keys()
        assert model.options == {}
        assert slot_of(model) is None

    def test_a_model_without_transformer_blocks_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="must be a Stable Diffusion model"):
            on(ModelPatcher(nn.Linear(1, 1)))

    def test_an_error_in_the_sampling_ends_it(self, model, host):
        def fail(n, k, v, extra):
            raise KeyboardInterrupt

        patched = on(model)
        expected, broken = run(patched, host), patched.clone()
        broken.set_model_attn1_patch(fail)
        with pytest.raises(KeyboardInterrupt):
            run(broken, host)
        assert slot_of(patched).patch.call() is None
        assert torch.equal(run(patched, host), expected)

    def test_the_report_is_of_the_last_sampling(self, model, host):
        patched = on(model)
        assert "Nothing was sampled" in report_on(patched)
        assert "off" in report_on(model)
        run(patched, host, [900, 500, 100])
        assert "in all 3 U-Net calls" in report_on(patched)
        run(patched, host, [500])
        assert "in 1 of 1 U-Net calls" in report_on(patched)


def _tiles(n, k, v, extra):
    return (n.unflatten(1, (4, -1)).flatten(0, 1), *(t.repeat_interleave(4, dim=0) for t in (k, v)))


class TestOtherNodes:
    @pytest.mark.parametrize(
        ("patch", "after"),
        [
            (lambda n, k, v, extra: (n[:, ::2], k, v), lambda n, extra: n.repeat_interleave(2, dim=1)),
            (_tiles, lambda n, extra: n.unflatten(0, (-1, 4)).flatten(1, 2)),
            (lambda n, k, v, extra: (n, torch.cat([k, 2 * k], 1), torch.cat([v, v], 1)), lambda n, extra: n),
        ],
        ids=["token merging", "tiles", "a longer context"],
    )
    def test_what_tiles_or_merges_is_left_alone_and_said_once(self, model, host, caplog, patch, after):
        model.set_model_attn1_patch(patch)
        model.options["patches"]["attn1_output_patch"] = [after]
        plain, patched = run(model, host), on(model)
        with caplog.at_level(logging.INFO, "agentsd"):
            for _ in range(2):
                assert torch.equal(run(patched, host), plain)
        assert list(last(patched).notes) == [LEFT_OUT]
        said = [record for record in caplog.records if LEFT_OUT in record.getMessage()]
        assert len(said) == 1, "however many samplings there are"

    def test_a_node_that_only_looks_on_leaves_all_to_us(self, model, host):
        expected = run(on(model), host)
        model.set_model_attn1_patch(lambda n, k, v, extra: (n, k, v))
        assert torch.equal(run(on(model), host), expected)

    @pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
    def test_a_block_that_another_node_answers_stays_its_own(self, model, host, first):
        theirs = []

        def answer(q, k, v, extra):
            theirs.append(extra["block"])
            return v

        if first:
            model.set_model_attn1_replace(answer, "input", 1)
        patched = on(model)
        if not first:
            patched.set_model_attn1_replace(answer, "input", 1)
        run(patched, host)
        assert theirs == [("input", 1)]
        assert last(patched).notes == {"another node answers self-attention in its place": 1}
        assert last(patched).calls["agents"] == 2, "the other blocks are ours"

    def test_a_u_net_that_is_not_called_is_told(self, model, host):
        """A node that caches steps calls the blocks itself."""
        patched = attach_tuned(model, 0.2)
        run(patched, host, [])
        assert report_on(patched).startswith(f"not tuned: {NOT_CALLED}")
        q, block = torch.randn(2, 1024, 32), {"block": ("input", 1), "block_index": 0, "n_heads": 2}
        patched = on(model)
        answer = next(iter(patched.options["patches_replace"]["attn1"].values()))
        slot_of(patched).sample(lambda *args: answer(q, q, q, block))
        assert f"Left to the host: {NOT_CALLED} (1 call)" in report_on(patched)


class TestTuned:
    STEPS = (900, 600, 300)

    @pytest.fixture(autouse=True)
    def forgotten(self, monkeypatch):
        monkeypatch.setattr("agentsd.comfy.tuned._TUNINGS", {})

    @pytest.fixture
    def tunes(self, monkeypatch):
        """The calls that each tuning was made on; the tuning itself is pooling, and takes no time."""
        made = []

        def tune(unet, calls, tolerance, **given):
            made.append(calls)
            return quick_tune(unet, calls, tolerance, **given)

        monkeypatch.setattr("agentsd.comfy.tuned.tune", tune)
        return made

    def run(self, model, host, steps=STEPS, **given):
        return run(model, host, steps, **given)

    def test_the_first_sampling_is_without_and_the_next_ones_keep_the_tolerance(self, model, host, every_gain_counts):
        plain, patched = self.run(model, host), attach_tuned(model, 0.2)
        assert torch.equal(self.run(patched, host), plain)
        assert "tuned on this sampling, used from the next one on" in report_on(patched)
        assert "made without Agent Attention." in report_on(patched)
        assert "left out" not in report_on(patched)
        tuned = self.run(patched, host)
        assert difference(tuned, plain) > 1e-3
        assert (tuned - plain).norm() / plain.norm() < 0.2

    def test_it_is_kept_for_all_that_counts_and_not_for_the_node(self, model, host, tunes):
        plain, patched = self.run(model, host), attach_tuned(model, 0.2)
        self.run(patched, host)
        tuned = self.run(patched, host)
        assert torch.equal(self.run(attach_tuned(model, 0.2), host), tuned)
        assert torch.equal(self.run(model, host), plain), "another branch is as it was"
        assert len(tunes) == 1
        lora, weaker, beside = patched.clone(), patched.clone(), patched.clone()
        lora.patches = {"to_q.weight": [(0.8, ("diff", (torch.ones(4),)), 1.0)]}
        weaker.patches = {"to_q.weight": [(0.4, ("diff", (torch.ones(4),)), 1.0)]}
        beside.set_model_attn1_patch(lambda n, k, v, extra: (n, k, v))
        others = [(attach_tuned(model, 0.1), X), (patched, X[..., :16, :16]), (lora, X), (weaker, X), (beside, X)]
        for number, (other, x) in enumerate([*others, *others]):
            self.run(other, host, x=x)
            assert len(tunes) == min(number + 2, 6)

    @pytest.mark.parametrize("steps", [(200, 100), (500, 300, 100)], ids=["denoise 0.2", "denoise 0.5"])
    def test_it_is_tuned_anew_for_an_earlier_part_of_the_diffusion(self, model, host, tunes, steps):
        patched = attach_tuned(model, 0.2)
        for timesteps in (steps, self.STEPS, steps):
            self.run(patched, host, timesteps)
        assert [len(calls) for calls in tunes] == [len(steps), 3]

    @pytest.mark.parametrize(
        ("parts", "size", "told"),
        [
            ({"tile": 16}, (16, 16), "256×128, in parts of 128×128"),
            ({"area": 8}, (16, 32), "256×128, in parts of 64×64"),
            ({"tile": 16, "area": 8}, (16, 16), "256×128, in parts of 64×64 and 128×128"),
        ],
        ids=["tiles", "an area first", "tiles and an area first"],
    )
    def test_the_size_that_is_tuned_is_that_of_most_calls(self, model, host, tunes, parts, size, told):
        patched, x = attach_tuned(model, 0.2), X[..., :16, :]
        plain, first, second, again = (
            self.run(each, host, x=x, **parts) for each in (model, patched, patched, patched)
        )
        (calls,) = tunes
        assert {tuple(args[0].shape[-2:]) for args, _ in calls} == {size}
        assert report_on(patched).startswith(f"Sampling {told}: tuned, U-Net output within 20%")
        assert torch.equal(first, plain)
        assert torch.equal(second, again)
        assert changed(second, plain)

    def test_tiles_much_smaller_than_the_image_are_answered(self, model, host, monkeypatch):
        """Where the same settings would mean coarser cells on the whole image."""
        candidate = {"method": "corrected", "agent_ratio": 0.75, "max_agents": 64}
        tune = partial(quick_tune, methods=[candidate])
        monkeypatch.setattr("agentsd.comfy.tuned.tune", lambda *given, progress: tune(*given))
        patched = attach_tuned(model, 0.2)
        plain, out = (self.run(patched, host, tile=16) for _ in range(2))
        assert changed(out, plain)
        assert ": tuned, U-Net output within 20%" in report_on(patched)

    @pytest.mark.parametrize("untold", [1, MAX_TRIES + 1])
    def test_what_cannot_be_told_is_measured_again_a_few_times(self, model, host, monkeypatch, untold):
        """On a busy machine, say."""
        made, reports, plain, patched = [], [], self.run(model, host), attach_tuned(model, 0.2)

        def tune(unet, calls, tolerance, **given):
            made.append(calls)
            tuning = quick_tune(unet, calls, tolerance)
            full = replace(tuning.at(0.0).plan, tolerance=tolerance, untold=True)
            return replace(tuning, plan=full) if len(made) <= untold else tuning

        monkeypatch.setattr("agentsd.comfy.tuned.tune", tune)
        for _ in range(MAX_TRIES + 2):
            out = self.run(patched, host)
            reports.append(report_on(patched))
            assert changed(out, plain) == (len(reports) > 2 and untold == 1)
        tuned = (
            "tuned on this sampling, {}: tuned to 20% at a latent of 32×32: could not tell whether anything is faster"
        )
        assert reports[0].startswith(tuned.format("and again on the next one"))
        assert len(made) == min(untold + 1, MAX_TRIES)
        if untold > 1:
            assert reports[MAX_TRIES - 1].startswith(tuned.format("used from the next one on"))
            assert "Could not tell whether anything is faster within 20%, so full attention stays" in reports[-1]

    @pytest.mark.parametrize("prefix", ["", "plan: ", " plan: "])
    def test_a_plan_out_of_a_report_is_used_at_once(self, model, host, tunes, prefix):
        patched = attach_tuned(model, 0.2)
        self.run(patched, host)
        tuned = self.run(patched, host)
        plan = report_on(patched).rsplit("plan: ", 1)[1]
        given = attach_tuned(model, 0.2, prefix + plan)
        assert torch.equal(self.run(given, host), tuned)
        self.run(given, host, x=X[..., :16, :16])
        assert report_on(given).startswith("tuned for a latent of 32×32: this one is smaller, and gets full attention")
        assert len(tunes) == 1
        with pytest.raises(TuningError, match="for another model"):
            attach_tuned(ModelPatcher(comfy_unet(sdxl_like_unet())), 0.2, plan)

    def test_a_damaged_plan_is_an_error_before_anything_is_done(self, model):
        with pytest.raises(TuningError):
            AgentAttentionTuned().apply(model, 0.2, "nonsense")
        assert "damaged" in AgentAttentionTuned.VALIDATE_INPUTS(plan="nonsense")
        for plan in (None, "", " "):
            assert AgentAttentionTuned.VALIDATE_INPUTS(plan=plan) is True

    @pytest.mark.parametrize("what", ["fails", "is interrupted", "cannot begin"])
    def test_a_tuning_that_ends_early_costs_no_image(self, model, host, monkeypatch, what, caplog):
        import comfy.model_management as management

        def fail(*args, **kwargs):
            raise management.InterruptProcessingException if what == "is interrupted" else ZeroDivisionError("÷")

        plain, patched = self.run(model, host), attach_tuned(model, 0.2)
        before = tree(model.model.diffusion_model)
        monkeypatch.setattr(f"agentsd.comfy.tuned.{'weights_of' if what == 'cannot begin' else 'tune'}", fail)
        with caplog.at_level(logging.INFO, "agentsd"):
            assert torch.equal(self.run(patched, host), plain)
        told = {"fails": "not tuned: ZeroDiv", "is interrupted": "not tuned: interrupted"}
        assert told.get(what, "An error of ours: ZeroDiv") in report_on(patched)
        assert ("not tuned" in report_on(patched)) == (what in told)
        assert tree(model.model.diffusion_model).keys() == before.keys()
        assert all(record.getMessage().isascii() for record in caplog.records if record.name == "agentsd.comfy")


class TestNodes:
    def test_its_own_defaults_are_valid_and_act(self):
        assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
        given = AgentAttention.INPUT_TYPES()
        inputs = {**given["required"], **given["optional"]}
        del inputs["model"]
        given = values_of({name: options["default"] for name, (_, options) in inputs.items()})
        assert given["since"] == 0.0
        assert agentsd.plan_layer(to_config(given), 64, 64, 1).agents == 256
        for name, (kind, options) in inputs.items():
            assert options["tooltip"], name
            assert not isinstance(kind, list) or options["default"] in kind
            assert kind != "FLOAT" or options["min"] <= options["default"] <= options["max"]

    @pytest.mark.parametrize("method", ["agent", "pool"])  # others bound the number of cells
    def test_cells_are_what_their_name_says(self, method):
        for cells, side in CELLS.items():
            config = to_config(values_of({"method": method, "cells": cells, "ratio": 0.0}))
            plan = agentsd.plan_layer(config, 256, 256, 1)
            assert side is None or plan.cell == (side, side)

    def test_custom_cells_are_of_the_agent_ratio(self):
        assert values_of({"cells": CUSTOM, "agent_ratio": 0.8})["agent_ratio"] == 0.8
        assert values_of({"cells": "4×4", "agent_ratio": 0.8})["agent_ratio"] == 1 - 1 / 16
        assert values_of({"method": "corrected"})["exact_ratio"] == 0, "of a graph saved before there was one"

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ({"from": 0.5, "until": 0.4}, "until must be above from (0.5)"),
            ({"layers": "3"}, "layers must be one of"),
            ({"cells": "4×4", "agent_ratio": 1.5}, "agent_ratio must be a number"),
            ({"cells": "9×9"}, "cells must be one of"),
            ({"rules": "nonsense"}, "nonsense"),
        ],
    )
    def test_a_bad_value_is_named_before_anything_is_done(self, model, inputs, said):
        with pytest.raises(SettingError, match=re.escape(said)):
            AgentAttention().apply(model, **inputs)
        assert said in AgentAttention.VALIDATE_INPUTS(**inputs)

    def test_inputs_without_effect_are_told(self, model, host):
        """As the methods read them; a linked input is None while it is validated."""
        given = {"method": "corrected", "cells": "4×4", "k_scale2": 0.9, "agent_ratio": 0.5, "ratio": 0.0}
        assert AgentAttention.VALIDATE_INPUTS(**given, until=None) is True
        assert idle_inputs(given).keys() >= {"k_scale2", "agent_ratio", "ratio"}
        assert "cells" in idle_inputs({"method": "merge", "cells": "4×4"})
        assert not {"cells", "k_scale2"} & idle_inputs({"method": "agent", "cells": CUSTOM}).keys()
        (patched,) = AgentAttention().apply(model, **given)
        run(patched, host)
        first, *others = AgentAttentionReport().report(patched, None)[0].splitlines()
        assert first.startswith("Sampling 256×256: 1024 tokens → 64 agents")
        assert set(others) == {
            "k_scale2 is set: No effect while Method is corrected.",
            "agent_ratio is set: No effect while cells is 4×4.",
        }


FOLDER = Path(agentsd.__file__).parents[1] / "docs/comfyui"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*-api.json")), ids=lambda file: file.stem)
def test_graphs_of_the_docs(file):
    """The graph for the API gives our nodes what they take, and the graph for the page is the same."""
    api = json.loads(file.read_text(encoding="utf-8"))
    text = file.with_name(file.name.replace("-api", "")).read_text(encoding="utf-8")
    page = {str(node["id"]): node for node in json.loads(text)["nodes"]}
    nulls = set()
    json.loads(text, object_hook=lambda entry: nulls.update(k for k, v in entry.items() if v is None) or entry)
    assert nulls <= {"link", "links"}, "newer frontends refuse a graph with others"
    assert {name: node["type"] for name, node in page.items()} == {
        name: node["class_type"] for name, node in api.items()
    }
    ours = {name: node["inputs"] for name, node in api.items() if node["class_type"] in NODE_CLASS_MAPPINGS}
    assert len(ours) == 2
    for name, given in ours.items():
        kinds = NODE_CLASS_MAPPINGS[api[name]["class_type"]].INPUT_TYPES()
        required, every = kinds["required"], {**kinds["required"], **kinds.get("optional", {})}
        assert set(required) <= set(given) <= set(every)
        assert all(given[n] in kind for n, (kind, *_) in required.items() if isinstance(kind, list))
        assert [each["name"] for each in page[name]["inputs"]] == [*every]
        widgets = [n for n in every if n not in ("model", "after")]
        shown = dict(zip(widgets, page[name].get("widgets_values", ()), strict=bool(widgets)))
        assert {n: shown.get(n, value) for n, value in given.items()} == given


class Flux(nn.Module):
    """A transformer that asks the host's attention as ComfyUI's does; `skipped` blocks are skipped by another node."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(nn.Identity() for _ in range(3))
        self.patch_size, self.skipped = 2, ()

    def forward(self, x, t, c_concat, context, control, transformer_options):
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT
        h = torch.cat([context, tokens], dim=1)
        for i in range(3):
            if i not in self.skipped:
                q = split_heads(h, 2)
                h = h + self.attention(
                    q, q.roll(1, -1), q, 2, skip_reshape=True, transformer_options=transformer_options
                )
        return h[:, context.shape[1] :]

    def attention(self, q, k, v, heads, transformer_options, **kwargs):
        override = transformer_options.get("optimized_attention_override")
        return (partial(override, self.full) if override else self.full)(q, k, v, heads, **kwargs)

    def full(self, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False):
        if not skip_reshape:
            q, k, v = (split_heads(x, heads) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out if skip_output_reshape else join_heads(out)


class TestTransformers:
    X, SIGMA = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])

    @pytest.fixture
    def flux(self):
        return Flux()

    def node(self, flux, **inputs):
        return AgentAttention().apply(ModelPatcher(flux), method="corrected", cells="2×2, closest", **inputs)[0]

    @torch.no_grad()
    def run(self, model, skipping=((),)):
        """Sample in calls that skip these blocks; return the outputs."""
        flux, options = model.model.diffusion_model, dict(model.options)
        context = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))

        def steps():
            outs = []
            for flux.skipped in skipping:
                outs.append(wrapped("apply_model", options, flux)(self.X, self.SIGMA, None, context, None, options))
                assert options.get("optimized_attention_override") is model.options.get("optimized_attention_override")
            return outs

        return wrapped("sampler_sample", options, steps)()

    def report(self, model):
        return AgentAttentionReport().report(model, None)[0]

    def test_rules_stand_down_where_another_node_skips_blocks(self, flux):
        calls = ((), (0,), (0,), ())
        plain = self.run(ModelPatcher(flux), calls)
        named = self.node(flux, rules="blocks=double_blocks.0 full | min_tokens=0")
        any_block = self.node(flux, rules="min_tokens=0")
        first, _, *later = self.run(named, calls)
        assert changed(first, plain[0])
        assert all(map(torch.equal, later, plain[2:])), "it is not known which block asks"
        assert all(map(changed, self.run(any_block, calls), plain)), "all blocks are treated alike"
        for model in (named, any_block):
            assert "another node skips blocks (1 calls)" in self.report(model)
        assert changed(self.run(named, ((), (0, 1, 2), ()))[0], plain[0]), "the next sampling is free of it"
        assert "skips" not in self.report(named), "a model answered from a cache skips no blocks"
        self.run(named.clone(), ((0,),))
        assert "skips" in self.report(named), "a clone of the clone is answered by the same patch"

    @pytest.mark.parametrize("where", ["begin_call", "read_size", "JointCall", "join_heads"])
    def test_an_error_of_ours_costs_the_speed_and_not_the_image(self, flux, monkeypatch, where):
        plain, model = self.run(ModelPatcher(flux), ((), ())), self.node(flux, rules="min_tokens=0")
        owner = "" if where in ("JointCall", "join_heads") else "CloneTransformerPatch."
        monkeypatch.setattr(f"agentsd.comfy.transformers.{owner}{where}", lambda *args, **kwargs: 1 / 0)
        assert all(map(torch.equal, self.run(model, ((), ())), plain))
        assert "an error of ours: ZeroDivisionError" in self.report(model)

    def test_who_empties_the_slot_meanwhile_costs_no_image(self, flux, monkeypatch):
        model, full = self.node(flux, rules="min_tokens=0"), flux.forward
        (out,) = self.run(model)
        monkeypatch.setattr(flux, "forward", lambda *args: (full(*args), args[-1].clear())[0])
        assert torch.equal(self.run(model)[0], out)
