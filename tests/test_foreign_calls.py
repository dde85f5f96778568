"""What others pass to self-attention: delegated unchanged where it is not ours to answer."""

import logging

import pytest
import torch
import torch.nn.functional as F
from blocks import blocks_of, initialised, run
from kinds import EVERYWHERE, GRID, MERGING, SIMILARITY, of
from patching import EXAMPLE, changed, patched_output, with_self_attention

from agentsd import UnsupportedModelError, apply_patch, get_patch, patched
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.hosts import find_sites

FOREIGN_CALLS = {
    "context": (lambda attn, x: attn(x, context=x.flip(1)), "context of its own"),
    "positional context": (lambda attn, x: attn(x, x.flip(1)), "context of its own"),
    "longer context": (lambda attn, x: attn(x, torch.cat([x, x * 2], 1)), "context of its own"),
    "mask": (lambda attn, x: attn(x, mask=torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 > 0), "mask"),
    "fewer tokens": (lambda attn, x: F.pad(attn(x[:, 1:]), (0, 0, 1, 0)), "another number of tokens"),
    "more tokens": (lambda attn, x: attn(torch.cat([x, x], 1))[:, : x.shape[1]], "another number of tokens"),
    "rows of a batch": (lambda attn, x: torch.cat([attn(x[:1]), attn(x[1:])]), "other tokens than the block was given"),
    "all frames at once": (lambda attn, x: attn(x.reshape(1, -1, x.shape[2])).view_as(x), "another number of tokens"),
}


# Agents are ours to compute; merged tokens are given to the host's attention
whoever_attends = of("similarity", "merging")


class TestForeignCalls:
    """What another extension does to self-attention is delegated unchanged, and said once."""

    @pytest.mark.parametrize("name", FOREIGN_CALLS)
    def test_delegated_unchanged_and_said_once(self, unet, name, caplog):
        call, said = FOREIGN_CALLS[name]
        with_self_attention(unet, call)
        plain = run(unet, EXAMPLE)
        with patched(unet, **SIMILARITY), caplog.at_level(logging.INFO, "agentsd"):
            assert torch.equal(run(unet, EXAMPLE), plain)
            run(unet, EXAMPLE)
            notes = get_patch(unet).notes
        assert all(said in note for note in notes)
        assert set(notes.values()) <= {6, 12}
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(set(messages)) == len(notes) >= 1

    def test_grid_agents_serve_rows_of_a_batch_too(self, unet):
        expected = patched_output(unet, EXAMPLE, **GRID)
        with_self_attention(unet, FOREIGN_CALLS["rows of a batch"][0])
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **GRID), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "call", [lambda attn, x: attn(x, x), lambda attn, x: attn(context=x, x=x)], ids=["position", "name"]
    )
    @whoever_attends
    def test_the_same_tensor_as_context_is_self_attention(self, unet, call, kw):
        """Forge's attention patches and ControlNet pass it so."""
        expected = patched_output(unet, EXAMPLE, **kw)
        with_self_attention(unet, call)
        torch.testing.assert_close(patched_output(unet, EXAMPLE, **kw), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("extra", [{"value": torch.ones(1)}, {"additional_tokens": torch.ones(1)}, {"frames": 2}])
    def test_unknown_arguments_are_delegated(self, unet, extra):
        cls = type(blocks_of(unet)[0].attn1)
        (name,) = extra

        class Extended(cls):
            """The real attention with the further parameters of sgm's and Forge's."""

            def forward(self, x, context=None, mask=None, value=None, additional_tokens=None, frames=0):
                given = [extra is not None and bool(extra) for extra in (value, additional_tokens, frames)]
                return super().forward(x, context, mask) * (1 + sum(given))

        for block in blocks_of(unet):
            block.attn1.__class__ = Extended
        with_self_attention(unet, lambda attn, x: attn(x, **extra))
        plain = run(unet, EXAMPLE)
        with patched(unet, **SIMILARITY):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == [f"self-attention was given {name}"]
        with_self_attention(unet, lambda attn, x: attn(x, value=None, additional_tokens=None, frames=0))
        assert changed(patched_output(unet, EXAMPLE, **SIMILARITY), run(unet, EXAMPLE))

    def test_blocks_of_cross_attention_alone_are_left_out(self):
        layout = {"attention_resolutions": [1], "channel_mult": [1], "disable_middle_self_attn": True}
        with pytest.raises(UnsupportedModelError):
            apply_patch(initialised(**layout, disable_self_attentions=[True]))
        unet = initialised(**layout)
        assert not any("middle" in site.name for site in find_sites(unet))
        patched_output(unet, EXAMPLE, **GRID)

    def test_an_error_of_ours_costs_the_speed_and_not_the_image(self, unet, monkeypatch, caplog):
        def fail(*args, **kwargs):
            raise RuntimeError("no such kernel")

        plain = run(unet, EXAMPLE)
        monkeypatch.setattr("agentsd.attention.agent.agent_attention", fail)
        with patched(unet), caplog.at_level(logging.INFO, "agentsd"):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == ["an error of ours: RuntimeError: no such kernel"]
        monkeypatch.undo()
        monkeypatch.setattr("agentsd.patching.call.match", fail)
        with patched(unet, **EVERYWHERE):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert get_patch(unet).notes

    @pytest.mark.parametrize(
        "what",
        [
            "patching.call.read_size",
            "patching.call.find_timestep",
            "patching.finite.FiniteCheck.poll",
            "patching.layer.plan_block",
            "attention.merging.Clusters.merge",
        ],
    )
    def test_an_error_in_a_hook_costs_no_image_either(self, unet, what, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("no such thing")

        plain = run(unet, EXAMPLE)
        monkeypatch.setattr(f"agentsd.{what}", fail)
        with patched(unet, method="merge", merge_attn=False, merge_mlp=True, max_downsample=8):
            assert torch.equal(run(unet, EXAMPLE), plain)
            assert list(get_patch(unet).notes) == ["an error of ours: RuntimeError: no such thing"]

    def test_self_attention_answered_by_somebody_else_is_said(self, unet):
        with_self_attention(unet, lambda attn, x: attn.to_out(attn.to_v(x)))
        with patched(unet):
            run(unet, EXAMPLE)
            assert len(get_patch(unet).notes) == 1


class ForgeAttention:
    """The parameters of Forge's and sgm's self-attention, in their order."""

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        value = context if value is None else value
        assert mask is None
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(value)))
        self.seen.append((q.shape[2], k.shape[2], v.shape[2]))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


SAME_VALUE = {
    "value": lambda attn, x: attn(x, value=x),
    "context and value": lambda attn, x: attn(x, context=x, value=x),
    "by position": lambda attn, x: attn(x, x, x),
    "value by position": lambda attn, x: attn(x, None, x),
    "all by name": lambda attn, x: attn(value=x, context=x, x=x),
    "with options": lambda attn, x: attn(x, x, value=x, transformer_options={"block": 1}),
}
OTHER_VALUE = {
    "value": (lambda attn, x: attn(x, value=x * 2), "given value"),
    "a copy": (lambda attn, x: attn(x, value=x.clone()), "given value"),
    "beside the context": (lambda attn, x: attn(x, context=x, value=x.flip(1)), "given value"),
    "by position": (lambda attn, x: attn(x, None, x + 1), "given value"),
    "the context, which is another": (lambda attn, x: (lambda y: attn(x, y, y))(x.flip(1)), "context of its own"),
    "the tokens beside another context": (lambda attn, x: attn(x, x.flip(1), x), "context of its own"),
}


class TestValue:
    """Forge and reForge pass `value` whenever an attn1 patch is active."""

    @pytest.fixture
    def forge(self, unet):
        for block in blocks_of(unet):
            cls = type(block.attn1)
            block.attn1.__class__ = type("ForgeCrossAttention", (ForgeAttention, cls), {"seen": []})
        return unet

    @pytest.mark.parametrize("name", SAME_VALUE)
    @whoever_attends
    def test_the_same_tensor_is_self_attention(self, forge, name, kw):
        with_self_attention(forge, lambda attn, x: attn(x))
        expected, plain = patched_output(forge, EXAMPLE, **kw), run(forge, EXAMPLE)
        with_self_attention(forge, SAME_VALUE[name])
        torch.testing.assert_close(run(forge, EXAMPLE), plain, rtol=0, atol=1e-6)
        seen = blocks_of(forge)[0].attn1.seen
        seen.clear()
        out = patched_output(forge, EXAMPLE, **kw)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert changed(out, plain)
        assert seen == ([(87, 87, 87)] if kw is MERGING else []), "merged tokens reach it, too"

    @pytest.mark.parametrize("name", OTHER_VALUE)
    @whoever_attends
    def test_any_other_is_delegated(self, forge, name, kw):
        call, said = OTHER_VALUE[name]
        with_self_attention(forge, call)
        plain = run(forge, EXAMPLE)
        with patched(forge, **kw):
            assert torch.equal(run(forge, EXAMPLE), plain)
            (note,) = get_patch(forge).notes
        assert said in note
