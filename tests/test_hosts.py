"""What the library knows of hosts: where their U-Nets are, their blocks, and how they are called."""

from types import SimpleNamespace

import pytest
import torch
from blocks import as_model, flat_unet, golden_unet, initialised, run, sdxl_like_unet
from kinds import GRID
from patching import EXAMPLE, answer, changed, diffusers_unet
from torch import nn

from agentsd import get_patch, hosts, patched
from agentsd.hosts import example_call, find_sites, find_unet, output_tensor
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


class TestExampleCall:
    @by_unet
    def test_the_u_net_takes_it_and_it_is_always_the_same(self, make):
        unet = make()
        for rows in (1, 3):
            out = answer(unet, 16, 24, rows=rows)
            assert out.shape == (rows, 4, 16, 24)
            assert out.isfinite().all()
        state = torch.get_rng_state()
        assert torch.equal(answer(unet, 16, 24, rows=3), out)
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
            # the levels of the structure are what the sizes in a call say
            sizes = {layer.name: layer.size for layer in patch.report()}
        assert {site.name: 16 // site.downsample for site in find_sites(unet)} == {
            name: height for name, (height, _) in sizes.items()
        }
        assert changed(out, plain)

    def test_sdxl_is_given_its_added_conditions(self):
        added = example_call(diffusers_unet("tiny_sdxl_unet"), 16, 16, 0.5).kwargs["added_cond_kwargs"]
        assert (added["text_embeds"].shape, added["time_ids"].shape) == ((2, 32), (2, 6))
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
    def test_alone_or_first_or_of_a_controlnet_last(self):
        x = torch.zeros(1)
        for output in (x, (x,), [x, None], ([x + 1, x + 2], x)):
            assert output_tensor(output) is x

    @pytest.mark.parametrize("name", ["tiny_unet", "tiny_sdxl_unet"])
    @torch.no_grad()
    def test_of_diffusers(self, name):
        unet = diffusers_unet(name)
        call = example_call(unet, 16, 16, 0.5)
        expected = unet(*call.args, **call.kwargs).sample
        for more in ({}, {"return_dict": False}, {"return_dict": True}):
            assert torch.equal(output_tensor(unet(*call.args, **call.kwargs, **more)), expected)


IN = {f"input_blocks.{i}.1": d for i, d in ((1, 1), (3, 2))}
OUT = {f"output_blocks.{i}.1": d for i, d in enumerate((2, 2, 1, 1))}
UP = {f"up_blocks.{i}.attentions.{j}": 2 - i for i in (0, 1) for j in (0, 1)}
LEVELS = {
    "LDM": {**IN, "middle_block.1": 2, **OUT},
    "diffusers": {"down_blocks.0.attentions.0": 1, "down_blocks.1.attentions.0": 2, **UP, "mid_block.attentions.0": 2},
}


class TestPlaces:
    @pytest.mark.parametrize("name", LEVELS)
    def test_of_a_u_net_of_two_levels(self, name):
        levels = {f"{block}.transformer_blocks.0": level for block, level in LEVELS[name].items()}
        assert [(site.name, site.downsample) for site in find_sites(UNETS[name]())] == list(levels.items())

    @pytest.mark.parametrize(("name", "first"), [("LDM", 1), ("LDM, SDXL-like", 2), ("diffusers, SDXL-like", 2)])
    def test_every_block_knows_where_the_first_are(self, name, first):
        assert {site.place.largest_level for site in find_sites(UNETS[name]())} == {first}

    def test_are_unknown_in_a_u_net_of_no_known_layout(self):
        unet = nn.ModuleDict({"somewhere": golden_unet().middle_block})
        assert list(hosts.downsamples(unet)) == []
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
        model = as_model(original)
        model.forge_objects = SimpleNamespace(unet=as_model(ours))
        assert find_unet(model) is ours

    def test_a_compiled_u_net_is_the_u_net(self):
        unet = flat_unet()
        assert find_unet(SimpleNamespace(unet=SimpleNamespace(_orig_mod=unet))) is unet


class TestArguments:
    def test_a_timestep_is_the_largest_of_the_batch(self):
        for t, read in [(torch.tensor([3, 500]), 500.0), (torch.tensor(7.5), 7.5), (3, 3.0), (2.5, 2.5)]:
            assert hosts.read_timestep(t) == read
        for t in (torch.tensor([]), None, "500"):
            assert hosts.read_timestep(t) is None

    def test_arguments_are_found_by_position_and_by_any_host_s_name(self):
        x, t = torch.zeros(1, 4, 8, 6), torch.tensor([1])
        for name in ("x", "sample", "hidden_states"):
            assert hosts.read_size((), {name: x}) == (8, 6)
        assert hosts.read_size((x,), {}) == (8, 6)
        assert hosts.read_size((x[0],), {}) is None
        for name in ("timesteps", "timestep", "t"):
            assert hosts.find_timestep((x,), {name: t}) is t
        assert hosts.find_timestep((x, t), {}) is t
        assert hosts.find_timestep((x,), {}) is None
        for name in ("x", "hidden_states"):
            assert hosts.read_tokens((), {name: x}) is x
        assert hosts.read_tokens((), {}) is None

    def test_a_u_net_may_be_called_by_names_alone(self):
        unet, (x, t, context) = golden_unet(), EXAMPLE
        with patched(unet, **GRID):
            expected = run(unet, EXAMPLE)
            with torch.no_grad():
                assert torch.equal(unet(x=x, timesteps=t, context=context), expected)
            assert not get_patch(unet).notes
