"""Ours beside what reuses results from step to step, or puts its own attention in: caches, guidance, ControlNet."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import agentsd
from agentsd import get_patch, remove_patch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
hooks = pytest.importorskip("diffusers.hooks", reason="needs diffusers' cache hooks")

from blocks import tree  # noqa: E402
from kinds import CORRECTED, GRID  # noqa: E402
from tiny_pipelines import picture, tiny_sd, tiny_unet, unet_inputs  # noqa: E402

TIMESTEPS = (700, 650, 600, 550)


def broadcast(unet: nn.Module) -> None:
    """diffusers' Pyramid Attention Broadcast on self-attention."""
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(r"attn1",),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(unet, config)


def taylor(unet: nn.Module) -> None:
    """diffusers' TaylorSeer: extrapolates the outputs of attention."""
    if not hasattr(hooks, "TaylorSeerCacheConfig"):
        pytest.skip("this diffusers has no TaylorSeer")
    given = {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1, "cache_identifiers": [r".*attn1"]}
    hooks.apply_taylorseer_cache(unet, hooks.TaylorSeerCacheConfig(**given))


def reuse(*modules: nn.Module) -> None:
    """Have modules compute in every second call and repeat their output in the others."""
    for module in modules:

        def cached(*args, forward=module.forward, outputs=[], **kwargs):  # noqa: B006
            if not outputs:
                outputs.append(forward(*args, **kwargs))
                return outputs[0]
            return outputs.pop()

        module.forward = cached


CACHES = {
    "attention broadcast": broadcast,
    "TaylorSeer": taylor,
    # all but the outermost stages
    "DeepCache": lambda unet: reuse(*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]),
    "TeaCache and EasyCache": lambda unet: reuse(unet),
}


def cache_context(unet: nn.Module):
    """What a pipeline puts around its calls; only some caches ask for it, and not in every version."""
    try:
        from diffusers.models.cache_utils import CacheMixin

        return CacheMixin.cache_context(unet, "cond_uncond")
    except (ImportError, AttributeError):
        return nullcontext()


@torch.no_grad()
def outputs(*steps) -> list[torch.Tensor]:
    """What a U-Net of its own gives call by call, with a cache or our patch put on it by these steps."""
    unet = tiny_unet()
    for step in steps:
        step(unet)
    with cache_context(unet):  # with tuples as outputs, as pipelines ask for them
        calls = [{**unet_inputs(unet), "timestep": torch.tensor(t), "return_dict": False} for t in TIMESTEPS]
        out = [unet(**call)[0].clone() for call in calls]
    if (patch := get_patch(unet)) is not None:
        # a call that the cache answers is not ours, which is all that may be said
        assert set(patch.notes) <= {"something else answers self-attention in its place"}
    return out


@pytest.mark.parametrize("settings", [GRID, CORRECTED], ids=["grid", "corrected"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_what_is_computed_is_ours_and_what_is_not_is_the_cache_s(cache, settings):
    def ours(unet: nn.Module) -> None:
        agentsd.apply_patch(unet, **settings)

    def removed(unet: nn.Module) -> None:
        before = tree(unet)
        ours(unet)
        remove_patch(unet)
        assert tree(unet) == before

    alone, uncached, both = outputs(cache), outputs(ours), outputs(cache, ours)
    # the first call is computed in full
    torch.testing.assert_close(both[0], uncached[0], rtol=1e-4, atol=1e-5)
    assert (both[0] - alone[0]).abs().max() > 0.01
    assert not any(map(torch.equal, alone, both)), "no call is without ours"
    assert not all(map(torch.equal, uncached, both)), "the cache counts"
    torch.testing.assert_close(outputs(ours, cache), both, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, outputs(cache, removed), alone))


def guided_by(pipeline, **more):
    """A pipeline of this class around the tiny Stable Diffusion."""
    parts = {name: part for name, part in tiny_sd().components.items() if name != "image_encoder"}
    pipe = pipeline(**parts, requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_layers_of_perturbed_attention_guidance_stay_its_own_while_it_guides(scale):
    pipe = guided_by(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    before, plain = tree(pipe.unet), picture(pipe, pag_scale=scale)
    agentsd.apply_patch(pipe, **{**GRID, "max_downsample": 2})
    assert (picture(pipe, pag_scale=scale) - plain).abs().max() > 1e-3
    layers = {layer.name: layer.calls for layer in get_patch(pipe).report()}
    theirs = {name for name in layers if name.startswith("mid_block") and scale}
    assert {name for name, calls in layers.items() if not calls.get("agents")} == theirs
    assert ["attention processor is PAG" in note for note in get_patch(pipe).notes] == [True] * len(theirs)
    remove_patch(pipe)
    assert torch.equal(picture(pipe, pag_scale=scale), plain)
    assert tree(pipe.unet) == before


def test_controlnet_adds_to_a_patched_u_net_and_is_not_patched_itself():
    # as many residuals as the U-Net has, of random weights, so that they count
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(module.weight, std=0.1)
    pipe, hint = guided_by(diffusers.StableDiffusionControlNetPipeline, controlnet=net), torch.rand(1, 3, 128, 128)
    plain, before = picture(pipe, image=hint), tree(net)
    agentsd.apply_patch(pipe, **GRID)
    assert (picture(pipe, image=hint) - plain).abs().max() > 1e-3
    assert get_patch(pipe).notes == {}
    assert tree(net) == before
    remove_patch(pipe)
    assert torch.equal(picture(pipe, image=hint), plain)
