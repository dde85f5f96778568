"""What a patch says about its closeness to full attention: the figure is right, and no pixel depends on it."""

import pytest
import torch
from blocks import attention_calls, blocks_of, inputs, run
from kinds import SELF_ATTENTION, kinds
from patching import answer

import agentsd
from agentsd.patching import closeness

WATCHED = {**SELF_ATTENTION, "exact": {"method": "corrected", "agent_ratio": 0.95, "ratio": 0.0, "exact_ratio": 0.1}}


@kinds(WATCHED)
def test_no_pixel_depends_on_it(any_unet, kw):
    with agentsd.patched(any_unet, **kw):
        plain = answer(any_unet, 40, 40)
    with agentsd.patched(any_unet, **kw):
        patch = agentsd.get_patch(any_unet)
        patch.observe_closeness = True
        assert torch.equal(answer(any_unet, 40, 40), plain)
        assert not patch.notes
        assert 0 < patch.closeness().mean < 2


@kinds(WATCHED)
def test_it_is_the_error_of_attention(unet, kw, monkeypatch):
    """Where all tokens are compared, what is said is exactly what attention is off by in the first patched block."""
    monkeypatch.setattr(closeness, "TOKENS", 10**6)
    closeness._places.cache_clear()
    example, block = inputs(2, 40, 40), blocks_of(unet)[0].attn1
    with attention_calls(block) as calls:
        run(unet, example)
        with agentsd.patched(unet, rules=[agentsd.Rule(None), agentsd.Rule({}, blocks="input_blocks.1.*")], **kw):
            patch = agentsd.get_patch(unet)
            patch.observe_closeness = True
            run(unet, example)
            said = patch.closeness()
    closeness._places.cache_clear()
    (x, full), (also_x, ours) = calls
    assert torch.equal(x, also_x)
    truth = ((ours - full).norm() / full.norm()).item()
    assert said.mean == said.worst == pytest.approx(truth, rel=1e-3)
    assert said.block == "input_blocks.1.1.transformer_blocks.0"


def test_an_estimate_of_few_tokens_is_near(flat):
    said = {}
    for tokens in (32, 10**6):
        closeness._places.cache_clear()
        with pytest.MonkeyPatch.context() as patching, agentsd.patched(flat, method="pool", ratio=0.0, sx=2, sy=2):
            patching.setattr(closeness, "TOKENS", tokens)
            patch = agentsd.get_patch(flat)
            patch.observe_closeness = True
            run(flat, inputs(2, 24, 24))
            said[tokens] = patch.closeness()
    closeness._places.cache_clear()
    assert said[32].mean == pytest.approx(said[10**6].mean, rel=0.3)


def test_one_call_in_a_few_is_observed(unet):
    with agentsd.patched(unet, method="pool", ratio=0.0):
        patch = agentsd.get_patch(unet)
        assert patch.closeness() is None
        patch.observe_closeness = True
        assert patch.closeness() is None
        said = []
        for _ in range(2 * closeness.EVERY + 1):
            run(unet, inputs(1, 8, 8))
            said.append(patch.closeness())
        assert said[-1].calls == 3
        assert [one.mean for one in said] == pytest.approx([said[0].mean] * len(said)), "the same call, seen again"
        patch.observe_closeness = True
        assert patch.closeness() is None
        patch.observe_closeness = False
        run(unet, inputs(1, 8, 8))
        assert patch.closeness() is None


@pytest.mark.parametrize(
    ("mean", "worst", "words"), [(0.0141, 0.032, "1.4% (worst block 3.2%)"), (0.2, 0.4, "20% (worst block 40%)")]
)
def test_it_is_said_in_a_sentence(mean, worst, words):
    assert str(closeness.Closeness(mean, worst, "up.1", 3)) == f"error of attention {words}"
