"""What the library knows of hosts: where their U-Nets are, their blocks, and how they are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from blocks import CONTEXT, flat_unet, golden_unet, initialised, run, sdxl_like_unet
from patching import EXAMPLE, GRID, changed, diffusers_unet
from torch import nn

from agentsd import get_patch, patched
from agentsd.hosts import (
    downsamples,
    example_call,
    find_sites,
    find_timestep,
    find_unet,
    output_tensor,
    read_size,
    read_timestep,
    read_tokens,
)
from agentsd.schedule import timestep_at

POOLED = 40  # channels of the pooled prompt


def sgm_like_unet() -> nn.Module:
    """LDM's U-Net with the vector conditioning of sgm's SDXL."""
    unet = sdxl_like_unet()
    time = unet.time_embed[-1].out_features
    unet.label_emb = nn.Sequential(nn.Sequential(nn.Linear(POOLED, time), nn.SiLU(), nn.Linear(time, time)))
    unet.num_classes = "sequential"
    return unet.eval()


UNETS = {
    "LDM": golden_unet,
    "LDM, one level": flat_unet,
    "LDM, SDXL-like": sdxl_like_unet,
    "sgm": sgm_like_unet,
    "LDM, nine channels": lambda: initialised(attention_resolutions=[1], channel_mult=[1], in_channels=9),
    "diffusers": lambda: diffusers_unet("tiny_unet"),
    "diffusers, SDXL-like": lambda: diffusers_unet("tiny_sdxl_unet"),
}
by_unet = pytest.mark.parametrize("make", UNETS.values(), ids=UNETS)


@torch.no_grad()
def answer(unet: nn.Module, *arguments: float, **more: int) -> torch.Tensor:
    call = example_call(unet, *arguments, **more)
    return output_tensor(unet(*call.args, **call.kwargs))


class TestExampleCall:
    @by_unet
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_the_u_net_takes_it(self, make, rows):
        unet = make()
        out = answer(unet, 16, 24, 0.5, rows=rows)
        assert out.shape == (rows, 4, 16, 24)
        assert out.isfinite().all()

    @by_unet
    def test_it_is_always_the_same(self, make):
        unet = make()
        state = torch.get_rng_state()
        first = answer(unet, 16, 16, 0.3)
        torch.rand(3)
        assert torch.equal(answer(unet, 16, 16, 0.3), first)
        torch.set_rng_state(state)
        example_call(unet, 16, 16, 0.3)
        assert torch.equal(torch.get_rng_state(), state)

    @by_unet
    def test_the_patch_sees_its_latent_and_its_progress(self, make):
        unet = make()
        plain = answer(unet, 16, 24, 0.25)
        with patched(unet, **{**GRID, "max_downsample": "auto", "agent_ratio": 0.75}):
            out = answer(unet, 16, 24, 0.25)
            patch = get_patch(unet)
            assert patch.last_call.latent == (16, 24)
            assert patch.last_call.timestep == pytest.approx(timestep_at(0.25))
            assert any(layer.calls.get("agents") for layer in patch.report())
            assert not patch.notes
        assert changed(out, plain)

    def test_sdxl_of_diffusers_is_given_its_added_conditions(self):
        unet = diffusers_unet("tiny_sdxl_unet")
        added = example_call(unet, 16, 16, 0.5).kwargs["added_cond_kwargs"]
        assert added["text_embeds"].shape == (2, 32)
        assert added["time_ids"].shape == (2, 6)

    def test_sgm_is_given_its_vector(self):
        assert example_call(sgm_like_unet(), 16, 16, 0.5).kwargs["y"].shape == (2, POOLED)

    @pytest.mark.parametrize("name", ["LDM", "diffusers"])
    def test_it_is_in_the_dtype_that_the_host_computes_in(self, name):
        unet = UNETS[name]().to(torch.bfloat16)
        call = example_call(unet, 16, 16, 0.5)
        given = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() > 1]
        assert {t.dtype for t in given} == {torch.bfloat16}

    def test_forge_computes_in_a_dtype_of_its_own(self):
        unet = flat_unet()
        unet.computation_dtype = torch.float16
        call = example_call(unet, 16, 16, 0.5)
        assert call.args[0].dtype == call.kwargs["context"].dtype == torch.float16


class TestOutputTensor:
    def test_alone_in_a_tuple_and_in_an_output_object(self):
        x = torch.zeros(1)
        for output in (x, (x,), [x, None], SimpleNamespace(sample=x)):
            assert output_tensor(output) is x

    @pytest.mark.parametrize("name", ["tiny_unet", "tiny_sdxl_unet"])
    @torch.no_grad()
    def test_of_diffusers(self, name):
        unet = diffusers_unet(name)
        call = example_call(unet, 16, 16, 0.5)
        expected = unet(*call.args, **call.kwargs).sample
        for more in ({}, {"return_dict": False}, {"return_dict": True}):
            assert torch.equal(output_tensor(unet(*call.args, **call.kwargs, **more)), expected)


class TestPlaces:
    def test_of_ldm(self):
        assert [(site.name, site.downsample) for site in find_sites(golden_unet())] == [
            ("input_blocks.1.1.transformer_blocks.0", 1),
            ("input_blocks.3.1.transformer_blocks.0", 2),
            ("middle_block.1.transformer_blocks.0", 2),
            ("output_blocks.0.1.transformer_blocks.0", 2),
            ("output_blocks.1.1.transformer_blocks.0", 2),
            ("output_blocks.2.1.transformer_blocks.0", 1),
            ("output_blocks.3.1.transformer_blocks.0", 1),
        ]

    def test_of_diffusers(self):
        sites = find_sites(diffusers_unet("tiny_unet"))
        assert {(site.name, site.downsample) for site in sites} == {
            ("down_blocks.0.attentions.0.transformer_blocks.0", 1),
            ("down_blocks.1.attentions.0.transformer_blocks.0", 2),
            ("mid_block.attentions.0.transformer_blocks.0", 2),
            ("up_blocks.0.attentions.0.transformer_blocks.0", 2),
            ("up_blocks.0.attentions.1.transformer_blocks.0", 2),
            ("up_blocks.1.attentions.0.transformer_blocks.0", 1),
            ("up_blocks.1.attentions.1.transformer_blocks.0", 1),
        }

    @by_unet
    def test_are_what_the_sizes_in_a_call_say(self, make):
        unet = make()
        with patched(unet):
            answer(unet, 16, 16, 0.5)
            sizes = {layer.name: layer.size for layer in get_patch(unet).report()}
        assert {site.name: 16 // site.downsample for site in find_sites(unet)} == {
            name: height for name, (height, _) in sizes.items()
        }

    @pytest.mark.parametrize(("name", "first"), [("LDM", 1), ("LDM, SDXL-like", 2), ("diffusers, SDXL-like", 2)])
    def test_every_block_knows_where_the_first_are(self, name, first):
        assert {site.place.largest_level for site in find_sites(UNETS[name]())} == {first}

    def test_are_unknown_in_a_u_net_of_no_known_layout(self):
        unet = nn.ModuleDict({"somewhere": golden_unet().middle_block})
        assert list(downsamples(unet)) == []
        (site,) = find_sites(unet)
        assert (site.name, site.downsample) == ("somewhere.1.transformer_blocks.0", None)


class TestModels:
    @pytest.mark.parametrize(
        "path", ["", "diffusion_model", "model.diffusion_model", "unet", "forge_objects.unet.model.diffusion_model"]
    )
    def test_the_u_net_is_found_where_hosts_keep_it(self, path):
        unet = model = flat_unet()
        for name in reversed([name for name in path.split(".") if name]):
            model = SimpleNamespace(**{name: model})
        assert find_unet(model) is unet

    def test_forge_s_own_object_counts_more_than_the_original_model(self):
        ours, original = flat_unet(), flat_unet()
        unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=ours))
        model = SimpleNamespace(
            forge_objects=SimpleNamespace(unet=unet), model=SimpleNamespace(diffusion_model=original)
        )
        assert find_unet(model) is ours

    def test_a_compiled_u_net_is_the_u_net(self):
        unet = flat_unet()
        assert find_unet(SimpleNamespace(unet=SimpleNamespace(_orig_mod=unet))) is unet


class TestArguments:
    def test_a_timestep_is_the_largest_of_the_batch(self):
        for t, read in [
            (torch.tensor([3, 500]), 500.0),
            (torch.tensor(7.5), 7.5),
            (3, 3.0),
            (2.5, 2.5),
            (torch.tensor([]), None),
            (None, None),
            ("500", None),
        ]:
            assert read_timestep(t) == read

    def test_arguments_are_found_by_position_and_by_any_host_s_name(self):
        x, t = torch.zeros(1, 4, 8, 6), torch.tensor([1])
        for name in ("x", "sample", "hidden_states"):
            assert read_size((), {name: x}) == (8, 6)
        assert read_size((x,), {}) == (8, 6)
        assert read_size((x[0],), {}) is None
        for name in ("timesteps", "timestep", "t"):
            assert find_timestep((x,), {name: t}) is t
        assert find_timestep((x, t), {}) is t
        assert find_timestep((x,), {}) is None
        for name in ("x", "hidden_states"):
            assert read_tokens((), {name: x}) is x
        assert read_tokens((), {}) is None

    def test_a_u_net_may_be_called_by_names_alone(self):
        unet, (x, t, context) = golden_unet(), EXAMPLE
        with patched(unet, **GRID):
            expected = run(unet, EXAMPLE)
            with torch.no_grad():
                assert torch.equal(unet(x=x, timesteps=t, context=context), expected)
            assert not get_patch(unet).notes
        assert context.shape[-1] == CONTEXT
