"""Which layers are patched, and what is computed there."""

import torch
from blocks import actions, as_model, inputs, one_block_unet, run
from kinds import GRID
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
