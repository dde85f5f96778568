"""Which layers are patched, and what is computed there."""

import pytest
import torch
from blocks import Recorder, actions, as_model, attention_calls, blocks_of, inputs, one_block_unet, run, sdxl_like_unet
from kinds import AGENTS_ALONE, EVERYWHERE, GRID, MERGING, POOL, SIMILARITY, by_kind, kinds
from patching import EXAMPLE, UNETS, answer, attention_steps, calls_of, changed, diffusers_unet

from agentsd import apply_patch, get_patch, patched


class TestWhatIsPatched:
    def test_agents_at_level_0_by_default(self, unet):
        apply_patch(as_model(unet))
        run(unet, EXAMPLE)
        patch = get_patch(unet)
        assert actions(patch) == ["agents", *["untouched"] * 4, "agents", "agents"]
        assert [layer.size for layer in patch.report()] == [(12, 12), *[(6, 6)] * 4, (12, 12), (12, 12)]
        assert [layer.calls for layer in patch.report()] == [{action: 1} for action in actions(patch)]

    def test_a_call_that_reaches_no_block_counts_none(self, unet, monkeypatch):
        apply_patch(unet)
        monkeypatch.setattr(unet, "forward", lambda x, *args, **kwargs: x)
        run(unet, EXAMPLE)
        assert not any(layer.calls for layer in get_patch(unet).report())

    @by_kind
    def test_explains_beforehand_what_it_then_does(self, any_unet, kw):
        apply_patch(any_unet, **kw)
        patch = get_patch(any_unet)
        foreseen = patch.explain(10, 14, progress=0.5)
        answer(any_unet, 10, 14)
        assert foreseen == [(layer.name, layer.plan) for layer in patch.report()]
        assert all(plan.action != "untouched" or plan.reason for _, plan in foreseen)

    @pytest.mark.parametrize(("kw", "r"), [(GRID, 0), (AGENTS_ALONE, 0), (SIMILARITY, 57)])
    def test_merged_tokens_alone_share_their_output(self, unet, kw, r):
        with patched(unet, **kw), attention_calls(blocks_of(unet)[0].attn1) as seen:
            run(unet, EXAMPLE)
            plan = get_patch(unet).report()[0].plan
        ((_, out),) = seen
        assert (plan.action, plan.queries, plan.agents, plan.r) == ("agents", 144 - r, 9, r)
        assert len({tuple(row.tolist()) for row in out[0]}) == 144 - r

    @pytest.mark.parametrize("switches", [["merge_crossattn"], ["merge_mlp"], ["merge_crossattn", "merge_mlp"]])
    @pytest.mark.parametrize("merge_attn", [True, False])
    def test_each_switch_merges_its_own_part(self, unet, switches, merge_attn):
        block, plain = blocks_of(unet)[0], run(unet, EXAMPLE)
        with attention_calls(block.attn1) as expected:
            run(unet, EXAMPLE)
        with patched(unet, **AGENTS_ALONE | {"ratio": 0.3, "merge_attn": merge_attn} | dict.fromkeys(switches, True)):
            with calls_of(block) as (one, two, ff):
                out = run(unet, EXAMPLE)
            assert actions(get_patch(unet))[0] == ("agents" if merge_attn else "untouched")
        assert one[0][0].shape[1] == 144  # attn1 sees all tokens and merges by itself
        assert torch.equal(one[0][1], expected[0][1]) == (not merge_attn)
        assert two[0][0].shape[1] == (101 if "merge_crossattn" in switches else 144)
        assert ff[0][0].shape[1] == (101 if "merge_mlp" in switches else 144)
        assert changed(out, plain)

    def test_merged_cross_attention_never_uses_agents(self, unet):
        """It equals the host's own cross-attention of the merged tokens, shortcut and all agents absent."""
        attn2 = blocks_of(unet)[0].attn2
        with patched(unet, **EVERYWHERE, k_shortcut=1.0):
            assert "forward" not in vars(attn2)
            with attention_calls(attn2) as seen:
                run(unet, EXAMPLE)
        ((x, out),) = seen
        # the hook that sees `out` runs after ours, so it is unmerged already
        with torch.no_grad():
            merged = attn2(x, context=EXAMPLE[2])
        assert x.shape[1] == 144 - 57
        assert out.shape[1] == 144
        rows = {tuple(row.tolist()) for row in merged[0]}
        assert {tuple(row.tolist()) for row in out[0]} == rows

    def test_grid_agents_need_no_sorting(self, flat):
        words = ("sort", "gather", "scatter", "topk", "index", "embedding")
        for h, w in [(12, 12), (11, 13)]:
            with patched(flat, **GRID), Recorder() as seen:
                run(flat, inputs(2, h, w))
            assert not [op for op in seen.ops if any(word in op for word in words)]
        with patched(flat, **SIMILARITY), Recorder() as seen:
            run(flat, EXAMPLE)
        assert [op for op in seen.ops if any(word in op for word in words)]  # so the recorder would have seen them

    @kinds({"grid": GRID, "similarity": SIMILARITY, "agents alone": AGENTS_ALONE, "pool": POOL})
    def test_two_sdpa_calls_and_no_large_matrix(self, flat, kw):
        """96 × 96 tokens of 32 channels: one N × n matrix would be larger than anything the U-Net itself makes."""
        example, N, n = inputs(1, 96, 96), 96 * 96, 24 * 24
        with patched(flat, **kw):
            for block in blocks_of(flat)[1:]:  # a first block tells it all, and is slow enough
                block.attn1.forward = lambda x, context=None, mask=None: x
            with Recorder() as seen, attention_steps() as calls:
                run(flat, example)
            plan = get_patch(flat).report()[0].plan
        assert seen.largest < N * n / 2
        if plan.action == "agents":
            assert plan.agents == n
            assert [(call.queries, call.keys) for call in calls] == [(n, plan.queries), (plan.queries, n)]
        else:
            assert [(call.queries, call.keys) for call in calls] == [(N, N // 4)]

    def test_attention_is_the_host_s_where_no_agents_are_used(self, unet, monkeypatch):
        """xformers, SDPA, hypernetworks, LoRA and upcast live there."""
        cls, seen = type(blocks_of(unet)[0].attn1), []
        original = cls.forward

        def forward(self, x, context=None, mask=None):
            seen.append((x.shape[1], context is not None))
            return original(self, x, context, mask)

        monkeypatch.setattr(cls, "forward", forward)
        with patched(unet, **SIMILARITY):
            run(unet, EXAMPLE)
        assert [n for n, cross in seen if cross] == [144, 36, 36, 36, 36, 144, 144]
        assert [n for n, cross in seen if not cross] == [36] * 4
        seen.clear()
        with patched(unet, **MERGING):
            expected = run(unet, EXAMPLE)
        assert [n for n, cross in seen if not cross] == [87, 36, 36, 36, 36, 87, 87]
        with patched(unet, method="merge", ratio=0.4, sx=2, sy=2):
            assert torch.equal(run(unet, EXAMPLE), expected)
            assert actions(get_patch(unet)) == ["merge", *["untouched"] * 4, "merge", "merge"]


def test_an_image_may_be_seen_in_parts_of_several_sizes():
    unet = one_block_unet()
    image = unet.input_blocks[0]

    def forward(x, timesteps, context):
        parts = unet.conv_in(x).split([8, 16], dim=-1)
        return unet.conv_out(torch.cat([image(part, context) for part in parts], dim=-1))

    unet.forward = forward
    with patched(unet, **GRID, max_downsample=8):
        run(unet, inputs(1, 16, 24))
        assert not get_patch(unet).notes
        assert get_patch(unet).report()[0].calls == {"agents": 2}


# (make the U-Net, the level of its largest self-attentions)
FIRST_LEVELS = {name: (make, 1) for name, make in UNETS.items()}
FIRST_LEVELS |= {"as SDXL": (sdxl_like_unet, 2), "diffusers, as SDXL": (lambda: diffusers_unet("tiny_sdxl_unet"), 2)}


@pytest.mark.parametrize(("make", "first"), FIRST_LEVELS.values(), ids=FIRST_LEVELS)
def test_auto_stands_for_the_largest_self_attentions(make, first):
    unet, outs, acting = make(), {}, {}
    for level in ("auto", first, 8):
        with patched(unet, ratio=0.0, agent_ratio=0.75, agent_source="grid", max_downsample=level):
            outs[level], patch = answer(unet), get_patch(unet)
            assert not patch.notes
            acting[level] = {16 // layer.size[0] for layer in patch.report() if "agents" in layer.calls}
            untouched = [plan for _, plan in patch.explain(16, 16) if not plan.acts]
            assert {plan.remedy for plan in untouched} <= {("max_downsample",)}
    assert acting["auto"] == acting[first] == {first} == {min(acting[8])}
    assert torch.equal(outs["auto"], outs[first])
    assert torch.equal(outs["auto"], outs[8]) == (len(acting[8]) == 1)
