"""Models of diffusers other than a text-to-image U-Net: patched where they attend over an image, refused otherwise."""

import inspect

import pytest
import torch

import agentsd
from agentsd import UnsupportedModelError, get_patch
from agentsd.hosts import find_sites

D = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from blocks import filled  # noqa: E402
from tiny_pipelines import CONTEXT, SDXL_BLOCKS, tiny_sdxl_unet, tiny_unet, unet_inputs  # noqa: E402

CORRECTED = {"method": "corrected", "ratio": 0.0, "agent_ratio": 0.75, "max_downsample": "auto"}
SIMILARITY = {"ratio": 0.4, "max_downsample": "auto", "merge_mlp": True}
SIDE = 32
TINY = {"sample_size": SIDE, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": CONTEXT}
TEXT = torch.ones(1, 7, CONTEXT)


def video_unet(cls, kind, **layout):
    """A U-Net with transformers at the first level."""
    down, up = (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"), (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}")
    return cls(**TINY, **layout, down_block_types=down, up_block_types=up)


def animatediff():
    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2, "norm_num_groups": 8}
    unet = video_unet(D.UNetMotionModel, "Motion", **heads)
    return unet, lambda m: m(torch.randn(1, 4, 3, SIDE, SIDE), 500, TEXT.expand(3, -1, -1)).sample


def unet_3d():
    unet = video_unet(D.UNet3DConditionModel, "3D", attention_head_dim=8, norm_num_groups=8)
    return unet, lambda m: m(torch.randn(1, 4, 3, SIDE, SIDE), 500, TEXT).sample


def i2vgen_xl():
    unet = video_unet(D.I2VGenXLUNet, "3D", attention_head_dim=8, norm_num_groups=8)
    video, fps, image = torch.randn(1, 4, 3, SIDE, SIDE), torch.tensor([8]), torch.randn(1, CONTEXT)
    return unet, lambda m: m(video, 500, fps, video, image, TEXT).sample


def svd():
    time = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24}
    heads = {"in_channels": 8, "num_attention_heads": (2, 2)}
    unet = video_unet(D.UNetSpatioTemporalConditionModel, "SpatioTemporal", **heads, **time)
    return unet, lambda m: m(torch.randn(1, 3, 8, SIDE, SIDE), torch.tensor(0.4), TEXT[:, :1], torch.zeros(1, 3)).sample


def controlnet():
    model = D.ControlNetModel.from_unet(tiny_unet())
    given = torch.ones(1, 4, SIDE, SIDE), 500, TEXT, torch.rand(1, 3, 8 * SIDE, 8 * SIDE)
    return model, lambda m: m(*given).mid_block_res_sample


def controlnet_union():
    unet = tiny_sdxl_unet()
    known = inspect.signature(D.ControlNetUnionModel).parameters
    layout = {name: value for name, value in unet.config.items() if name in known}
    model = D.ControlNetUnionModel(**layout, num_trans_channel=32, num_trans_head=2, num_proj_channel=32)
    given = unet_inputs(unet, SIDE, SIDE, batch=1)
    given |= {"controlnet_cond": [torch.rand(1, 3, 8 * SIDE, 8 * SIDE)], "control_type": torch.eye(6)[:1]}
    return model, lambda m: m(**given, control_type_idx=[0], conditioning_scale=[1.0]).mid_block_res_sample


def controlnet_xs(**layout):
    unet = tiny_unet(layers_per_block=2, **layout)
    adapter = D.ControlNetXSAdapter.from_unet(unet, size_ratio=0.5)
    model = D.UNetControlNetXSModel.from_unet(unet, adapter)
    return model, lambda m: m(torch.randn(1, 4, SIDE, SIDE), 500, TEXT, torch.rand(1, 3, 8 * SIDE, 8 * SIDE)).sample


def controlnet_xs_of_sdxl_s_layout():
    return controlnet_xs(**SDXL_BLOCKS)


def x4_upscaler():
    unet = tiny_unet(
        in_channels=7, num_class_embeds=8, only_cross_attention=(True, False), mid_block_only_cross_attention=False
    )
    return unet, lambda m: m(torch.randn(1, 7, SIDE, SIDE), 500, TEXT, class_labels=torch.tensor([3])).sample


SERVED = [animatediff, unet_3d, i2vgen_xl, svd, controlnet, controlnet_union]
SERVED += [controlnet_xs, controlnet_xs_of_sdxl_s_layout, x4_upscaler]


@torch.no_grad()
def output(call, model):
    torch.manual_seed(1)
    return call(model)


@pytest.mark.parametrize("settings", [CORRECTED, SIMILARITY], ids=["corrected", "similarity"])
@pytest.mark.parametrize("make", SERVED, ids=lambda make: make.__name__)
def test_is_served_as_explained(make, settings):
    torch.manual_seed(0)
    model, call = make()
    filled(model)
    plain = output(call, model)
    agentsd.apply_patch(model, **settings)
    ours, patch = output(call, model), get_patch(model)
    assert patch.notes == {}
    explained = {name: plan.action for name, plan in patch.explain(SIDE, SIDE)}
    done = {layer.name: next(iter(layer.calls)) for layer in patch.report()}
    assert done == explained
    assert {"corrected", "agents"} & set(done.values())
    assert not any("motion" in name or "temp" in name or "transformer_in" in name for name in done)
    assert not torch.equal(ours, plain)
    assert all(site.downsample >= 1 for site in find_sites(model))
    agentsd.remove_patch(model)
    assert torch.equal(output(call, model), plain)


@pytest.mark.parametrize(
    ("make", "levels"), [(x4_upscaler, {2}), (controlnet_xs, {1, 2}), (controlnet_xs_of_sdxl_s_layout, {2})]
)
def test_levels_are_those_of_blocks_that_have_self_attention(make, levels):
    assert {site.downsample for site in find_sites(make()[0])} == levels


def test_a_controlnet_can_be_tuned():
    model, call = controlnet()
    filled(model)
    with agentsd.record_calls(model) as calls:
        output(call, model)
    tuning = agentsd.tune(model, calls, 0.5, methods=["pool"])
    agentsd.apply_patch(model, tuning=tuning)
    assert output(call, model).isfinite().all()


SMALL = {"num_layers": 1, "cross_attention_dim": CONTEXT}
REFUSED = {
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "embedding_dim": 8},
    "Transformer2DModel": {"num_attention_heads": 2, "in_channels": 32, "norm_num_groups": 8, **SMALL},
    "LatteTransformer3DModel": {"in_channels": 4, "sample_size": 8, "patch_size": 2, "caption_channels": 8, **SMALL},
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    model = getattr(D, name)(**REFUSED[name])
    for patch in (agentsd.apply_patch, lambda model, **kw: agentsd.patch_unet(model, agentsd.AgentConfig(**kw))):
        with pytest.raises(UnsupportedModelError, match=name):
            patch(model, **CORRECTED)
    assert get_patch(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())
