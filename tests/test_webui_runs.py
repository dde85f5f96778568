"""Whose run it was, how it is told, and what other extensions leave on the blocks."""

from __future__ import annotations

import sys
import time
import types
from types import SimpleNamespace

from blocks import blocks_of
from fake_webui import ON, Processing, fake_host, fake_unet, generate  # noqa: F401 - fixtures
from test_webui_session import SIMILARITY

from agentsd.app import token_map as tokenmap
from agentsd.settings import infotext, schema


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


def test_somebody_elses_map_is_shown_with_a_word(host):
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
    assert p.extra_generation_params == {"Other extension": "here"}


# Other extensions


def hijacked(block, call):
    """The block's forward replaced on the instance, as ControlNet's reference does."""
    block._forward = types.MethodType(call, block)


def test_blocks_that_call_their_own_forward_again_are_nobodys(host, unet):
    """ControlNet's reference, once used, leaves the original on the blocks."""
    for block in blocks_of(unet):
        original = block._forward
        hijacked(block, lambda block, x, context=None, **more: x)
        assert host.session.compat.HOST.replaced_blocks(unet)
        block._forward = original
    generate(host)
    assert "_forward" in vars(blocks_of(unet)[0])
    assert host.session.STATUS.notes() == []
    hijacked(blocks_of(unet)[0], lambda block, x, context=None, **more: x)
    generate(host)
    assert "replaces transformer blocks" in host.session.STATUS.notes()[0]
    blocks_of(unet)[0]._forward = blocks_of(unet)[1]._forward  # another block's
    assert host.session.compat.HOST.replaced_blocks(unet)


def test_another_extension_with_a_package_of_our_name_is_told(host, tmp_path):
    sys.modules["modules.sd_models"].model_data = SimpleNamespace(sd_model=host.shared.sd_model)
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
