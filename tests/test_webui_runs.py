"""Whose run it was, how it is told, and what other extensions leave on the blocks."""

from __future__ import annotations

import time
import types
from types import SimpleNamespace

from blocks import blocks_of, inputs
from fake_webui import ON, OTHERS, Processing, fake_host, fake_unet, generate, left_to_others, step  # noqa: F401
from test_webui_session import SIMILARITY

from agentsd import get_patch
from agentsd.app import token_map as tokenmap
from agentsd.settings import infotext, schema

NAN = float("nan")


def test_a_run_is_told_to_whom_it_belongs(host):
    status = host.session.STATUS
    for task, settings in (("task(1)", ON), ("task(2)", {"ratio": 7})):
        host.progress.current_task = task
        generate(host, settings)
    host.progress.current_task = None
    assert "4096" not in status.of("task(1)")["text"]
    assert status.of("task(1)")["state"] == "acts"
    assert status.of("task(2)")["state"] == "wrong"
    assert status.of("task(3)")["text"] == status.of("")["text"] == ""
    assert status.of() == status.of("task(2)"), "the last one of all"
    assert abs(status.of("task(1)")["at"] - time.time()) < 60
    # somebody else's map is shown with a word
    host.progress.current_task = "task(1)"
    generate(host, SIMILARITY, record=True)
    own, other = (host.session.token_map(task, 1, 1) for task in ("task(1)", "task(2)"))
    assert other.text == f"{tokenmap.FOREIGN} {own.text}"


def test_from_the_page_messages_name_labels(host):
    p = Processing()
    generate(host, {"since": 0.7, "until": 0.6}, p)
    assert host.session.STATUS.text().endswith(": nothing happened. Until must be above From (0.7), got 0.6.")
    assert "Until must be above From" in p.comments[0]
    note = infotext.note(["until must be above since (0.7), got 0.6"])
    assert p.processed.extra_generation_params[infotext.NOTE] == note
    assert p.extra_generation_params == OTHERS


# Other extensions


def test_blocks_that_call_their_own_forward_again_are_nobodys(host, unet):
    """ControlNet's reference replaces the forward on the instance and, once used, leaves the original there."""
    replaced, blocks = host.session.compat.HOST.replaced_blocks, blocks_of(unet)
    for block in blocks:
        original = block._forward
        block._forward = lambda x, context=None, **more: x
        assert replaced(unet)
        block._forward = original
    generate(host)
    assert "_forward" in vars(blocks[0])
    assert host.session.STATUS.notes() == []
    blocks[0]._forward = types.MethodType(lambda block, x, context=None, **more: x, blocks[0])
    generate(host)
    assert "replaces transformer blocks" in host.session.STATUS.notes()[0]
    blocks[0]._forward = blocks[1]._forward  # another block's
    assert replaced(unet)


def test_another_extension_with_a_package_of_our_name_is_told(host, tmp_path):
    advice = host.session.compat.HOST.advice
    values = schema.check({})
    assert advice(values) == []
    host.extensions.active = lambda: [SimpleNamespace(name="sd-webui-agentattention", path=str(tmp_path))]
    assert advice(values) == [], "it has no such package"
    (tmp_path / "agentsd").mkdir()
    (tmp_path / "agentsd" / "__init__.py").touch()
    [hint] = advice(values)
    assert hint.text.startswith("the extension sd-webui-agentattention has a package of the same name as ours")
    assert hint.remedy == ("Extensions",)


# The host's "last generation": the infotext as it is before the sampling


def test_the_hosts_last_generation_has_our_settings_and_what_did_not_come_is_withdrawn(host):
    generate(host, {**ON, "until": 0.7, "method": "pool"}, p := Processing(steps=4))
    assert infotext.read(p.params_txt[infotext.KEY])["until"] == 0.7
    assert p.params_txt[infotext.KEY] == p.extra_generation_params[infotext.KEY]
    # every call is left to another extension, which nobody could know before, or no pass was announced
    for made in ({"steps": lambda: left_to_others(host)}, {"passes": ()}):
        generate(host, p=(p := Processing()), **made)
        assert infotext.KEY in p.params_txt
        assert infotext.KEY not in p.extra_generation_params


# What the last run says


def said(host):
    return [str(line) for line in host.session.STATUS.lines()]


def test_a_run_is_all_that_a_request_makes(host):
    """A plot's cells, and what another extension makes in between: alike passes are summed up."""
    host.progress.current_task = "task(plot)"
    for settings in (ON, ON, {**ON, "method": "pool"}, {"ratio": 7}):
        generate(host, settings)
    lines = said(host)
    assert [line.split(":")[0] for line in lines] == ["Not applied", "128×128, 2 times", "128×128"]
    assert "in all 2 U-Net calls" in lines[1]
    assert "pooled keys" in lines[2]
    assert host.session.STATUS.as_dict()["state"] == "wrong"
    host.progress.current_task = "task(next)"
    generate(host)
    assert len(said(host)) == 1
    assert len(host.session.STATUS.of("task(plot)")["lines"]) == 3


def test_the_reason_given_is_the_reason(host, unet):
    def reason(settings, **more):
        generate(host, settings, Processing(steps=1), **more)
        (line,) = said(host)
        return line.partition("nothing happened. ")[2]

    def call(t, height=16):
        step(host, inputs(height=height, t=[t, t]))

    late = {**ON, "since": 0.4, "until": 0.5}
    assert reason(ON, steps=lambda: None) == "The U-Net was not called."
    assert reason(late, steps=lambda: call(900)) == "No step lay between From and Until."
    assert reason({**ON, "min_tokens": 300}) == "Nothing is to be gained from layers of 256 tokens."
    assert reason({**ON, "merge_attn": False}).startswith("Self-attention is left out.")
    parts = reason({**ON, "min_tokens": 200}, steps=lambda: call(500, height=8))
    assert parts == "Nothing is to be gained from layers of 128 tokens."

    def skipping():  # as DeepCache does with most blocks, and EasyCache with all
        host.session.before_model_call()
        x, t, context = inputs()
        get_patch(unet).begin_call(unet, (x, t), {"context": context})
        get_patch(unet).end_call()

    assert reason(ON, steps=skipping).startswith("The U-Net was called, but something else skips the blocks")
    idle_rule = {**ON, "since": 0.4, "until": 0.5, "rules": "blocks=nothing.* full"}
    told = reason(idle_rule, steps=lambda: call(900))
    assert told == "No step lay between From and Until; rule 1 names no block of this model.", "which is no call"
    assert reason(ON, steps=lambda: left_to_others(host)).startswith("Left to the host: another extension answers (")


def test_parts_of_an_image_are_named(host):
    generate(host, steps=lambda: [step(host, inputs(height=height)) for height in (8, 16)])
    assert said(host)[0].startswith("128×128, in parts of 128×64: ")


def test_no_closeness_is_told_where_it_is_no_number(host, monkeypatch):
    from agentsd.patching.closeness import Closeness

    monkeypatch.setattr("agentsd.patching.closeness.Watch.read", lambda self: Closeness(0.1, NAN, "a", 1))
    generate(host)
    assert "nan" not in said(host)[0].lower()
