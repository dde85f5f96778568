"""What the library knows of hosts: where their U-Nets are, their blocks, and how they are called."""

from types import SimpleNamespace

import pytest
import torch
from blocks import as_model, flat_unet, golden_unet, initialised, sdxl_like_unet
from kinds import GRID
from patching import answer, changed, diffusers_unet
from torch import nn

from agentsd import get_patch, hosts, patched
from agentsd.hosts import find_sites, find_unet, output_tensor

# (make the U-Net, the level of its largest self-attentions)
UNETS = {
    "LDM": (golden_unet, 1),
    "LDM, one level": (flat_unet, 1),
    "LDM, SDXL-like": (sdxl_like_unet, 2),
    "LDM, nine channels": (lambda: initialised(attention_resolutions=[1], channel_mult=[1], in_channels=9), 1),
    "diffusers": (lambda: diffusers_unet("tiny_unet"), 1),
    "diffusers, SDXL-like": (lambda: diffusers_unet("tiny_sdxl_unet"), 2),
}


@pytest.mark.parametrize(("make", "first"), UNETS.values(), ids=UNETS)
def test_the_patch_sees_a_call_and_knows_the_levels_and_auto_is_that_of_the_largest_self_attentions(make, first):
    unet, outs, acting = make(), {}, {}
    plain = answer(unet, 16, 24, 0.25)
    for level in ("auto", first, 8):
        with patched(unet, **{**GRID, "max_downsample": level, "agent_ratio": 0.75}):
            outs[level], patch = answer(unet, 16, 24, 0.25), get_patch(unet)
            assert (patch.last_call.latent, patch.last_call.timestep) == ((16, 24), pytest.approx(750))
            assert not patch.notes
            # the levels of the structure are what the sizes in a call say
            levels = {layer.name: 16 // layer.size.height for layer in patch.report()}
            assert {site.name: site.downsample for site in find_sites(unet)} == levels
            acting[level] = {levels[layer.name] for layer in patch.report() if "agents" in layer.calls}
            assert {plan.remedy for _, plan in patch.explain(16, 24) if not plan.acts} <= {("max_downsample",)}
    assert acting["auto"] == acting[first] == {first} == {min(acting[8])}
    assert torch.equal(outs["auto"], outs[first])
    assert torch.equal(outs["auto"], outs[8]) == (len(acting[8]) == 1)
    assert changed(outs["auto"], plain)


def test_the_output_is_alone_or_first_or_of_a_controlnet_last():
    x = torch.zeros(1)
    for output in (x, (x,), [x, None], ([x + 1, x + 2], x)):
        assert output_tensor(output) is x


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
        assert [(site.name, site.downsample) for site in find_sites(UNETS[name][0]())] == list(levels.items())

    @pytest.mark.parametrize("where", ["somewhere", "up_blocks"])
    def test_are_unknown_in_a_u_net_of_no_known_layout(self, where):
        unet = nn.ModuleDict({where: golden_unet().middle_block})
        assert list(hosts.downsamples(unet)) == []
        (site,) = find_sites(unet)
        assert (site.name, site.downsample) == (f"{where}.1.transformer_blocks.0", None)


@pytest.mark.parametrize(
    "path", ["", "diffusion_model", "model.diffusion_model", "unet", "forge_objects.unet.model.diffusion_model"]
)
def test_the_u_net_is_found_where_hosts_keep_it(path):
    unet = model = flat_unet()
    for name in reversed([name for name in path.split(".") if name]):
        model = SimpleNamespace(**{name: model})
    assert find_unet(model) is unet
    assert find_unet(SimpleNamespace(unet=SimpleNamespace(_orig_mod=unet))) is unet, "of torch.compile"
    if path.startswith("forge"):  # which counts more than the original model
        model.model = as_model(golden_unet()).model
        assert find_unet(model) is unet


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
