"""Ours beside what reuses results from step to step, or puts its own attention in: caches, guidance, ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

import agentsd
from agentsd import get_patch, remove_patch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
hooks = pytest.importorskip("diffusers.hooks", reason="needs diffusers' cache hooks")

from tiny_pipelines import CORRECTED, GRID, POOL, anatomy, attn1s, picture, run, tiny_sd, tiny_unet, unet_inputs  # noqa: E402

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


CACHES = {
    "attention broadcast": broadcast,
    "TaylorSeer": taylor,
    "DeepCache": deep_cache,
    "steps": step_cache,
}
by_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
METHODS = {"grid": GRID, "pool": POOL, "corrected": CORRECTED}


def cache_context(unet: nn.Module) -> AbstractContextManager:
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


def cached_unet(cache: Callable[[nn.Module], None], settings: dict | None, first: str = "cache") -> nn.Module:
    """A U-Net of its own with a cache and, given settings, our patch, in this order or the other."""
    unet = tiny_unet()
    if settings is not None and first == "ours":
        agentsd.apply_patch(unet, **settings)
    cache(unet)
    if settings is not None and first != "ours":
        agentsd.apply_patch(unet, **settings)
    return unet


@by_cache
class TestCaches:
    @pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
    def test_what_is_computed_is_ours_and_what_is_not_is_theirs(self, cache, settings):
        alone, ours = outputs(cached_unet(cache, None)), outputs(cached_unet(lambda unet: None, settings))
        unet = cached_unet(cache, settings)
        both = outputs(unet)
        # a call that the cache answers is not ours, which is all that may be said
        assert set(get_patch(unet).notes) <= {"something else answers self-attention in its place"}
        # the first call is computed in full
        torch.testing.assert_close(both[0], ours[0], rtol=1e-4, atol=1e-5)
        assert (both[0] - alone[0]).abs().max() > 0.01
        for step, (one, out) in enumerate(zip(alone, both, strict=True)):
            assert out.isfinite().all()
            assert not torch.equal(out, one), f"call {step} is not without ours"
        assert any(not torch.equal(out, other) for other, out in zip(ours, both, strict=True)), "the cache counts"

    def test_in_either_order(self, cache):
        one, other = (outputs(cached_unet(cache, GRID, first)) for first in ("cache", "ours"))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_removing_ours_leaves_the_cache_to_itself(self, cache):
        expected = outputs(cached_unet(cache, None))
        unet = tiny_unet()
        cache(unet)
        before = anatomy(unet)
        agentsd.apply_patch(unet, **GRID)
        remove_patch(unet)
        assert anatomy(unet) == before
        torch.testing.assert_close(outputs(unet), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["FirstBlockCache", "MagCache"])
def test_caches_of_transformers_alone_refuse_a_u_net_with_and_without_ours(name):
    """They look for a list of transformer blocks at the top of the model, which no U-Net has."""
    if not hasattr(hooks, f"{name}Config"):
        pytest.skip(f"this diffusers has no {name}")
    given = {} if name == "FirstBlockCache" else {"mag_ratios": [1.0] * 4, "num_inference_steps": 4}
    config = getattr(hooks, f"{name}Config")(**given)
    apply = {"FirstBlockCache": "apply_first_block_cache", "MagCache": "apply_mag_cache"}[name]
    unet = tiny_unet()
    agentsd.apply_patch(unet, **GRID)
    patched = run(unet)
    for model in (tiny_unet(), unet):
        try:
            getattr(hooks, apply)(model, config)
            had_an_effect = any(m._diffusers_hook.hooks for m in model.modules() if hasattr(m, "_diffusers_hook"))
        except (IndexError, ValueError):
            had_an_effect = False
        assert not had_an_effect
    assert torch.equal(run(unet), patched)


class TestGuidanceByAttention:
    def pipe(self):
        pipe = tiny_sd()
        guided = diffusers.StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"])
        guided.set_progress_bar_config(disable=True)
        return guided

    def test_its_layers_stay_its_own(self):
        pipe = self.pipe()
        before, plain = anatomy(pipe.unet), picture(pipe)
        agentsd.apply_patch(pipe, **{**GRID, "max_downsample": 2})
        both = picture(pipe)
        assert (both - plain).abs().max() > 1e-3
        layers = {layer.name: layer.calls for layer in get_patch(pipe).report()}
        assert not any(calls for name, calls in layers.items() if name.startswith("mid_block"))
        assert all(calls.get("agents") for name, calls in layers.items() if not name.startswith("mid_block"))
        (note,) = get_patch(pipe).notes
        assert "attention processor is PAG" in note
        remove_patch(pipe)
        assert torch.equal(picture(pipe), plain)
        assert anatomy(pipe.unet) == before

    def test_without_guidance_they_are_ours(self):
        pipe = self.pipe()
        agentsd.apply_patch(pipe, **{**GRID, "max_downsample": 2})
        pipe("cat", num_inference_steps=1, output_type="latent", height=128, width=128, pag_scale=0.0)
        assert get_patch(pipe).notes == {}
        assert all(layer.calls.get("agents") for layer in get_patch(pipe).report())


def test_controlnet_adds_to_a_patched_u_net_and_is_not_patched_itself():
    pipe = tiny_sd()
    # as many residuals as the U-Net has, of random weights, so that they count
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(module.weight, std=0.1)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    guided = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    guided.set_progress_bar_config(disable=True)
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))

    def drawn():
        given = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
        return torch.from_numpy(guided("cat", image=hint, height=128, width=128, **given).images)

    plain, before = drawn(), anatomy(net)
    agentsd.apply_patch(guided, **GRID)
    assert (drawn() - plain).abs().max() > 1e-3
    assert get_patch(guided).notes == {}
    assert anatomy(net) == before
    assert not any("agentsd" in type(attn.processor).__module__ for attn in attn1s(net).values())
    remove_patch(guided)
    assert torch.equal(drawn(), plain)
