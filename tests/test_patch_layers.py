"""Which layers are patched, and what is computed there."""

import torch
import torch.nn.functional as F
from blocks import Recorder, actions, as_model, attention_calls, blocks_of, inputs, one_block_unet, run
from kinds import EVERYWHERE, GRID, MERGING, POOL, SIMILARITY, kinds
from patching import EXAMPLE

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

    @kinds({"grid": GRID, "similarity": SIMILARITY, "pool": POOL})
    def test_two_sdpa_calls_and_no_large_matrix(self, flat, kw, monkeypatch):
        """96 × 96 tokens of 32 channels: one N × n matrix would be larger than anything the U-Net itself makes."""
        example, N, n, asked, sdpa = inputs(1, 96, 96), 96 * 96, 24 * 24, [], F.scaled_dot_product_attention
        with patched(flat, **kw):
            for block in blocks_of(flat)[1:]:  # a first block tells it all, and is slow enough
                block.attn1.forward = lambda x, context=None, mask=None: x

            def spy(q, k, *rest, **more):
                asked.append((q.shape[-2], k.shape[-2]))
                return sdpa(q, k, *rest, **more)

            monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
            with Recorder() as seen:
                run(flat, example)
            plan = get_patch(flat).report()[0].plan
        assert seen.largest < N * n / 2
        assert asked == ([(n, plan.queries), (plan.queries, n)] if plan.action == "agents" else [(N, N // 4)])

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
