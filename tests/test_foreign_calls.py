"""What others pass to self-attention: delegated unchanged where it is not ours to answer."""

import logging

import pytest
import torch
import torch.nn.functional as F
from blocks import blocks_of, initialised, run
from kinds import GRID, MERGING, SIMILARITY, of
from patching import EXAMPLE, changed, patched_output, with_self_attention

from agentsd import UnsupportedModelError, apply_patch, get_patch, patched
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.hosts import find_sites

# Agents are ours to compute; merged tokens are given to the host's attention
whoever_attends = of("similarity", "merging")
MLP = {"method": "merge", "merge_attn": False, "merge_mlp": True, "max_downsample": 8}

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
# Forge and reForge pass `value` whenever an attn1 patch is active, and tensors of other names
FORGE_S_CALLS = {
    "value": (lambda attn, x: attn(x, value=x * 2), "given value"),
    "a copy": (lambda attn, x: attn(x, value=x.clone()), "given value"),
    "value beside the context": (lambda attn, x: attn(x, context=x, value=x.flip(1)), "given value"),
    "positional value": (lambda attn, x: attn(x, None, x + 1), "given value"),
    "value as another context": (lambda attn, x: (lambda y: attn(x, y, y))(x.flip(1)), "context of its own"),
    "the tokens beside another context": (lambda attn, x: attn(x, x.flip(1), x), "context of its own"),
    "tokens": (lambda attn, x: attn(x, additional_tokens=torch.ones(1)), "given additional_tokens"),
    "frames": (lambda attn, x: attn(x, frames=2), "given frames"),
}
# Forge's attention patches and ControlNet pass the same tensor again
SAME = {
    "nothing": lambda attn, x: attn(x, value=None, additional_tokens=None, frames=0),
    "context": lambda attn, x: attn(x, context=x),
    "value": lambda attn, x: attn(x, value=x),
    "by position": lambda attn, x: attn(x, x, x),
    "value by position": lambda attn, x: attn(x, None, x),
    "all by name": lambda attn, x: attn(value=x, context=x, x=x),
    "with options": lambda attn, x: attn(x, x, value=x, transformer_options={"block": 1}),
}


class ForgeAttention:
    """Self-attention with the parameters of Forge's and sgm's."""

    def forward(self, x, context=None, value=None, transformer_options=None, additional_tokens=None, frames=0):
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(value)))
        self.seen.append((q.shape[2], k.shape[2], v.shape[2]))
        scale = 1 + (additional_tokens is not None) + frames
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v))) * scale


@pytest.fixture
def forge(unet):
    for block in blocks_of(unet):
        block.attn1.__class__ = type("ForgeCrossAttention", (ForgeAttention, type(block.attn1)), {"seen": []})
    return unet


@pytest.mark.parametrize(
    ("host", "call", "said"),
    [pytest.param("unet", *call, id=name) for name, call in FOREIGN_CALLS.items()]
    + [pytest.param("forge", *call, id=name) for name, call in FORGE_S_CALLS.items()],
)
@whoever_attends
def test_delegated_unchanged_and_said_once(request, host, call, said, kw, caplog):
    unet = request.getfixturevalue(host)
    with_self_attention(unet, call)
    plain = run(unet, EXAMPLE)
    with patched(unet, **kw), caplog.at_level(logging.INFO, "agentsd"):
        assert torch.equal(run(unet, EXAMPLE), plain)
        run(unet, EXAMPLE)
        notes = get_patch(unet).notes
    assert all(said in note for note in notes)
    assert set(notes.values()) <= {6, 12}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == len(notes) >= 1


@pytest.mark.parametrize("name", SAME)
@whoever_attends
def test_the_same_tensor_is_self_attention(forge, name, kw):
    with_self_attention(forge, lambda attn, x: attn(x))
    expected, plain = patched_output(forge, EXAMPLE, **kw), run(forge, EXAMPLE)
    with_self_attention(forge, SAME[name])
    torch.testing.assert_close(run(forge, EXAMPLE), plain, rtol=0, atol=1e-6)
    seen = blocks_of(forge)[0].attn1.seen
    seen.clear()
    out = patched_output(forge, EXAMPLE, **kw)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert changed(out, plain)
    assert seen == ([(87, 87, 87)] if kw is MERGING else []), "merged tokens reach it, too"


def test_grid_agents_serve_rows_of_a_batch_too(unet):
    expected = patched_output(unet, EXAMPLE, **GRID)
    with_self_attention(unet, FOREIGN_CALLS["rows of a batch"][0])
    torch.testing.assert_close(patched_output(unet, EXAMPLE, **GRID), expected, rtol=0, atol=1e-5)


def test_blocks_of_cross_attention_alone_are_left_out():
    layout = {"attention_resolutions": [1], "channel_mult": [1], "disable_middle_self_attn": True}
    with pytest.raises(UnsupportedModelError):
        apply_patch(initialised(**layout, disable_self_attentions=[True]))
    unet = initialised(**layout)
    assert not any("middle" in site.name for site in find_sites(unet))
    patched_output(unet, EXAMPLE, **GRID)


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("attention.agent.agent_attention", GRID),
        ("patching.call.match", SIMILARITY),
        *((f"patching.patch.Patch.{name}", MLP) for name in ("read_size", "find_timestep")),
        *((f"patching.{name}", MLP) for name in ("finite.FiniteCheck.poll", "layer.plan_block")),
        ("attention.merging.Clusters.merge", MLP),
    ],
)
def test_an_error_of_ours_costs_the_speed_and_not_the_image(unet, what, settings, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such thing")

    plain = run(unet, EXAMPLE)
    monkeypatch.setattr(f"agentsd.{what}", fail)
    with patched(unet, **settings):
        assert torch.equal(run(unet, EXAMPLE), plain)
        assert "an error of ours: RuntimeError: no such thing" in get_patch(unet).notes


def test_self_attention_answered_by_somebody_else_is_said(unet):
    with_self_attention(unet, lambda attn, x: attn.to_out(attn.to_v(x)))
    with patched(unet):
        run(unet, EXAMPLE)
        assert len(get_patch(unet).notes) == 1
