"""Peers that take the self-attention which would be ours: said once a cause, and nothing is matched for them."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from kinds import GRID, SIMILARITY
from tiny_pipelines import run, tiny_unet

import agentsd
from agentsd import get_patch
from agentsd.patching.call import ModelCall

CALLS = 8


def taken(unet, call):
    """Let `call(own, x)` answer all self-attention, where `own` is the host's; return what undoes it."""
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    for attn in attentions:
        attn.forward = partial(lambda own, x, **kwargs: call(own, x), type(attn).forward.__get__(attn))
    return lambda: [vars(attn).pop("forward") for attn in attentions]


def merged(unet):
    """tomesd, CA-ToMe: it gets fewer tokens."""
    return taken(unet, lambda own, x: own(x[:, ::2]).repeat_interleave(2, dim=1))


def answered(unet):
    """T-GATE and caches: it isn't asked."""
    return taken(unet, lambda own, x: x)


def windows(unet):
    """MSW-MSA of HiDiffusion: it gets four windows."""
    return taken(unet, lambda own, x: own(x.unflatten(1, (4, -1)).flatten(0, 1)).view_as(x))


PEERS = {
    merged: "self-attention got another number of tokens than the layer has",
    answered: "something else answers self-attention in its place",
    windows: "self-attention got another number of tokens than the layer has",
}


@pytest.fixture
def matchings(monkeypatch):
    """How often tokens were matched."""
    made, match = [], ModelCall.match
    monkeypatch.setattr(ModelCall, "match", lambda *args: made.append(1) or match(*args))
    return made


by_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)


def at(unet, sides=((16, 16),)):
    """The outputs of calls at these sizes of the latent."""
    samples = [torch.randn(2, 4, *side, generator=torch.Generator().manual_seed(3)) for side in sides]
    return [run(unet, sample=sample) for sample in samples]


@by_peer
@pytest.mark.parametrize("settings", [GRID, SIMILARITY], ids=["grid", "similarity"])
def test_one_note_and_one_warning_a_cause(peer, settings, caplog):
    unet = tiny_unet()
    peer(unet)
    sides = [(16, 16), (16, 24), (24, 24), (32, 16)]
    alone = at(unet, sides)
    agentsd.apply_patch(unet, **settings)
    with caplog.at_level(logging.INFO, "agentsd"):
        assert all(torch.equal(a, b) for a, b in zip(at(unet, sides), alone, strict=True))
    assert list(get_patch(unet).notes) == [PEERS[peer]]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@by_peer
def test_no_tokens_are_matched_for_calls_that_are_not_ours(peer, matchings):
    unet = tiny_unet()
    agentsd.apply_patch(unet, **SIMILARITY)
    (ours,) = at(unet)
    layers, undo = len(matchings), peer(unet)
    at(unet, [(16, 16)] * CALLS)
    assert len(matchings) == 4 * layers, "three calls in a row before it counts as taken"
    undo()
    assert torch.equal(at(unet, [(16, 16)] * 2)[1], ours), "a call later they are ours again"


def test_tokens_are_matched_where_others_take_every_second_call_or_the_mlp_wants_them(matchings):
    """As where one prompt of several has its attention changed."""
    unet = tiny_unet()
    agentsd.apply_patch(unet, **SIMILARITY)
    (ours,) = at(unet)
    for _ in range(CALLS):
        undo = merged(unet)
        at(unet)
        undo()
        assert torch.equal(at(unet)[0], ours)
    agentsd.apply_patch(unet, **SIMILARITY, merge_mlp=True)
    answered(unet)
    matchings.clear()
    at(unet)
    layers = len(matchings)
    at(unet, [(16, 16)] * CALLS)
    assert len(matchings) == (CALLS + 1) * layers > 0
