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

from kinds import CORRECTED, GRID  # noqa: E402
from tiny_pipelines import anatomy, picture, tiny_sd, tiny_unet, unet_inputs  # noqa: E402

TIMESTEPS = (700, 650, 600, 550, 500, 450)


def broadcast(unet: nn.Module, every: int = 2) -> None:
    """diffusers' Pyramid Attention Broadcast on self-attention."""
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=(r"attn1",),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(unet, config)


def taylor(unet: nn.Module) -> None:
    """diffusers' TaylorSeer: extrapolates the outputs of attention."""
    if not hasattr(hooks, "TaylorSeerCacheConfig"):
        pytest.skip("this diffusers has no TaylorSeer")
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, cache_identifiers=[r".*attn1"]
    )
    hooks.apply_taylorseer_cache(unet, config)


def reuse(module: nn.Module, every: int) -> None:
    """Have a module compute in one of `every` calls and repeat its output in the others."""
    forward, state = module.forward, {"calls": 0, "output": None}

    def cached(*args, **kwargs):
        if state["calls"] % every == 0:
            state["output"] = forward(*args, **kwargs)
        state["calls"] += 1
        return state["output"]

    module.forward = cached


def deep_cache(unet: nn.Module) -> None:
    """As DeepCache: in every second call all but the outermost stages give what they gave before."""
    for module in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
        reuse(module, 2)


def step_cache(unet: nn.Module) -> None:
    """As TeaCache and EasyCache: every second call of the U-Net is answered from the one before."""
    reuse(unet, 2)


CACHES = {"attention broadcast": broadcast, "TaylorSeer": taylor, "DeepCache": deep_cache, "steps": step_cache}


def cache_context(unet: nn.Module):
    """What a pipeline puts around its calls; only some caches ask for it, and not in every version."""
    try:
        from diffusers.models.cache_utils import CacheMixin

        return CacheMixin.cache_context(unet, "cond_uncond")
    except (ImportError, AttributeError):
        return nullcontext()


@torch.no_grad()
def outputs(unet: nn.Module) -> list[torch.Tensor]:
    with cache_context(unet):  # with tuples as outputs, as pipelines ask for them
        calls = [{**unet_inputs(unet), "timestep": torch.tensor(t), "return_dict": False} for t in TIMESTEPS]
        return [unet(**call)[0].clone() for call in calls]


def cached_unet(cache, settings: dict | None, first: str = "cache") -> nn.Module:
    """A U-Net of its own with a cache and, given settings, our patch, in this order or the other."""
    unet = tiny_unet()
    if settings is not None and first == "ours":
        agentsd.apply_patch(unet, **settings)
    cache(unet)
    if settings is not None and first != "ours":
        agentsd.apply_patch(unet, **settings)
    return unet


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
class TestCaches:
    @pytest.mark.parametrize("settings", [GRID, CORRECTED], ids=["grid", "corrected"])
    def test_what_is_computed_is_ours_and_what_is_not_is_theirs(self, cache, settings):
        alone, ours = outputs(cached_unet(cache, None)), outputs(cached_unet(lambda unet: None, settings))
        unet = cached_unet(cache, settings)
        both = outputs(unet)
        # the first call is computed in full
        torch.testing.assert_close(both[0], ours[0], rtol=1e-4, atol=1e-5)
        assert (both[0] - alone[0]).abs().max() > 0.01
        assert all(out.isfinite().all() for out in both)
        assert not any(map(torch.equal, alone, both)), "no call is without ours"
        assert not all(map(torch.equal, ours, both)), "the cache counts"
        # a call that the cache answers is not ours, which is all that may be said
        assert set(get_patch(unet).notes) <= {"something else answers self-attention in its place"}
        torch.testing.assert_close(outputs(cached_unet(cache, settings, first="ours")), both, rtol=1e-4, atol=1e-5)

    def test_removing_ours_leaves_the_cache_to_itself(self, cache):
        expected, unet = outputs(cached_unet(cache, None)), tiny_unet()
        cache(unet)
        before = anatomy(unet)
        agentsd.apply_patch(unet, **GRID)
        remove_patch(unet)
        assert anatomy(unet) == before
        assert all(map(torch.equal, outputs(unet), expected))


def guided_by(pipeline, **more):
    """A pipeline of this class around the tiny Stable Diffusion."""
    parts = {name: part for name, part in tiny_sd().components.items() if name != "image_encoder"}
    pipe = pipeline(**parts, requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_layers_of_perturbed_attention_guidance_stay_its_own_while_it_guides(scale):
    pipe = guided_by(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    before, plain = anatomy(pipe.unet), picture(pipe, pag_scale=scale)
    agentsd.apply_patch(pipe, **{**GRID, "max_downsample": 2})
    assert (picture(pipe, pag_scale=scale) - plain).abs().max() > 1e-3
    layers = {layer.name: layer.calls for layer in get_patch(pipe).report()}
    theirs = {name for name in layers if name.startswith("mid_block") and scale}
    assert {name for name, calls in layers.items() if not calls.get("agents")} == theirs
    assert ["attention processor is PAG" in note for note in get_patch(pipe).notes] == [True] * len(theirs)
    remove_patch(pipe)
    assert torch.equal(picture(pipe, pag_scale=scale), plain)
    assert anatomy(pipe.unet) == before


def test_controlnet_adds_to_a_patched_u_net_and_is_not_patched_itself():
    # as many residuals as the U-Net has, of random weights, so that they count
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(module.weight, std=0.1)
    pipe, hint = guided_by(diffusers.StableDiffusionControlNetPipeline, controlnet=net), torch.rand(1, 3, 128, 128)
    plain, before = picture(pipe, image=hint), anatomy(net)
    agentsd.apply_patch(pipe, **GRID)
    assert (picture(pipe, image=hint) - plain).abs().max() > 1e-3
    assert get_patch(pipe).notes == {}
    assert anatomy(net) == before
    remove_patch(pipe)
    assert torch.equal(picture(pipe, image=hint), plain)
