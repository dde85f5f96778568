"""The patch on diffusers: real U-Nets and pipelines with random weights."""

from __future__ import annotations

import copy

import pytest
import torch

import agentsd
from agentsd import AgentConfig, Stage, early, get_patch, patch_unet, remove_patch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0  # noqa: E402
from tiny_pipelines import CONTEXT, randomised, tiny_sd, tiny_sdxl, tiny_sdxl_unet, tiny_unet, unet_inputs  # noqa: E402
from torch import nn  # noqa: E402

GRID = {"ratio": 0.0, "sx": 2, "sy": 2, "agent_ratio": 0.75, "agent_source": "grid"}
SIMILARITY = {"ratio": 0.4, "agent_ratio": 0.95}
MERGING = dict(agentsd.TOKEN_MERGING)
EVERYWHERE = {"ratio": 0.4, "agent_ratio": 0.9, "merge_crossattn": True, "merge_mlp": True, "max_downsample": 2}
POOL = {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0}
KINDS = {"grid": GRID, "similarity": SIMILARITY, "merging": MERGING, "everywhere": EVERYWHERE, "pool": POOL}

by_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())


@torch.no_grad()
def run(unet, **changes) -> torch.Tensor:
    return unet(**{**unet_inputs(unet), **changes}).sample


@torch.no_grad()
def picture(pipe, steps: int = 3):
    generator = torch.Generator().manual_seed(1)
    size = {"height": 128, "width": 128}
    return torch.from_numpy(
        pipe("cat", num_inference_steps=steps, generator=generator, output_type="np", **size).images
    )


def anatomy(unet: nn.Module) -> dict:
    """Everything about the module tree that a patch could leave behind."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            [len(getattr(module, hook)) for hook in hooks],
            id(getattr(module, "processor", None)),
            id(module.__dict__.get("forward")),
        )
        for name, module in unet.named_modules()
    }


def attn1s(unet: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn1")}


def actions(unet: nn.Module) -> dict[str, dict[str, int]]:
    return {layer.name: layer.calls for layer in get_patch(unet).report()}


# Apply and remove


@by_kind
def test_a_removed_patch_leaves_nothing_behind(settings):
    unet = tiny_unet()
    before, plain = anatomy(unet), run(unet)
    agentsd.apply_patch(unet, **settings)
    patched = run(unet)
    assert get_patch(unet).notes == {}
    remove_patch(unet)
    assert (patched - plain).abs().max() > 1e-3
    assert anatomy(unet) == before
    assert torch.equal(run(unet), plain)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_pipelines_take_the_patch_and_give_it_back(make):
    pipe = make()
    before, plain = anatomy(pipe.unet), picture(pipe)
    assert agentsd.apply_patch(pipe, max_downsample=2) is pipe
    patched = picture(pipe)
    assert torch.equal(patched, picture(pipe)), "the same settings give the same picture"
    assert get_patch(pipe) is get_patch(pipe.unet)
    assert agentsd.remove_patch(pipe) is pipe
    assert get_patch(pipe) is None
    assert anatomy(pipe.unet) == before
    assert not torch.equal(patched, plain)
    assert torch.equal(picture(pipe), plain)


def test_the_context_manager_removes_the_patch_after_an_error():
    pipe = tiny_sd()
    before = anatomy(pipe.unet)

    def fail():
        with agentsd.patched(pipe, **GRID):
            assert get_patch(pipe).active
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        fail()
    assert anatomy(pipe.unet) == before


def test_a_second_patch_replaces_the_first():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **GRID)
    once = run(unet)
    agentsd.apply_patch(unet, **SIMILARITY)
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet), once)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), "a model", None])
def test_other_models_are_refused(wrong):
    with pytest.raises(agentsd.UnsupportedModelError, match="Stable Diffusion"):
        agentsd.apply_patch(wrong)


def test_sdxl_has_no_attention_at_level_0():
    unet = tiny_sdxl_unet()
    plain = run(unet)
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet), plain)
    assert all("above 1" in plan.reason for _, plan in get_patch(unet).explain(16, 16))
    agentsd.apply_patch(unet, **GRID, max_downsample=2)
    assert not torch.equal(run(unet), plain)
    assert all(calls == {"agents": 1} for calls in actions(unet).values())


def test_the_plan_is_what_happens():
    unet = tiny_unet()
    patch = patch_unet(unet, AgentConfig(**SIMILARITY))
    foreseen = dict(patch.explain(16, 16))
    run(unet)
    assert {layer.name: layer.plan for layer in patch.report()} == foreseen
    assert {name for name, plan in foreseen.items() if plan.action == "agents"} == {
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    }


# Parity with LDM


def ldm_and_diffusers(use_linear: bool = False):
    """The same U-Net twice: as LDM builds it, and converted by diffusers."""
    openaimodel = pytest.importorskip(
        "ldm.modules.diffusionmodules.openaimodel", reason="needs stable-diffusion-sdkit's ldm"
    )
    ldm = randomised(
        openaimodel.UNetModel(
            image_size=16,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            attention_resolutions=[1, 2],
            num_res_blocks=1,
            channel_mult=[1, 2],
            num_heads=2,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=CONTEXT,
            use_linear_in_transformer=use_linear,
            use_checkpoint=False,
            legacy=False,
        )
    )
    unet = tiny_unet(use_linear_projection=use_linear)
    state = {f"model.diffusion_model.{name}": value for name, value in ldm.state_dict().items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, dict(unet.config)))
    return ldm, unet


@torch.no_grad()
def run_ldm(ldm: nn.Module, t: float = 500, **size) -> torch.Tensor:
    given = unet_inputs(tiny_unet(), **size)
    return ldm(given["sample"], torch.full((len(given["sample"]),), t), context=given["encoder_hidden_states"])


@by_kind
@pytest.mark.parametrize("use_linear", [False, True], ids=["SD1", "SD2"])
def test_ldm_and_its_conversion_give_the_same_patched_output(settings, use_linear):
    ldm, unet = ldm_and_diffusers(use_linear)
    plain = run(unet)
    torch.testing.assert_close(plain, run_ldm(ldm), rtol=1e-4, atol=1e-4)
    agentsd.apply_patch(ldm, **settings)
    agentsd.apply_patch(unet, **settings)
    ours, theirs = run(unet), run_ldm(ldm)
    assert (ours - plain).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert sorted(map(str, actions(ldm).values())) == sorted(map(str, actions(unet).values()))


def test_ldm_and_its_conversion_agree_where_the_sides_are_odd():
    size = {"height": 10, "width": 14}
    ldm, unet = ldm_and_diffusers()
    for model in (ldm, unet):
        agentsd.apply_patch(model, **{**GRID, "max_downsample": 2})
    torch.testing.assert_close(run(unet, **unet_inputs(unet, **size)), run_ldm(ldm, **size), rtol=1e-3, atol=1e-3)
    assert all(layer.plan.action == "agents" for model in (ldm, unet) for layer in get_patch(model).report())


# Stages


def test_a_stage_is_chosen_by_the_timestep():
    unet = tiny_unet()
    noisy, late, last = 800.0, 500.0, 100.0
    plain = {t: run(unet, timestep=torch.tensor(t)) for t in (noisy, late, last)}
    with agentsd.patched(unet, **GRID):
        agents = run(unet, timestep=torch.tensor(noisy))
    with agentsd.patched(unet, **MERGING):
        merged = run(unet, timestep=torch.tensor(late))
    stages = (Stage(0.4), Stage(0.6, MERGING), Stage(1.0, None))
    with agentsd.patched(unet, **GRID, stages=stages):
        assert torch.equal(run(unet, timestep=torch.tensor(noisy)), agents)
        assert torch.equal(run(unet, timestep=torch.tensor(late)), merged)
        assert torch.equal(run(unet, timestep=torch.tensor(last)), plain[last])


def test_a_pipeline_passes_through_its_stages():
    pipe = tiny_sd()
    agentsd.apply_patch(pipe, **GRID, stages=early(0.4))
    picture(pipe, steps=5)  # timesteps 800, 600, 400, 200, 0 of 1000
    level0 = [calls for name, calls in actions(pipe).items() if name.startswith("down_blocks.0")]
    assert level0 == [{"agents": 1, "untouched": 4}] or level0 == [{"agents": 2, "untouched": 3}]
    assert get_patch(pipe).notes == {}


# What others do to the U-Net


def lora(unet, seed: int = 3) -> None:
    """Put a LoRA with random weights on all projections of the attentions."""
    peft = pytest.importorskip("peft", reason="needs peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets), adapter_name="tiny")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(unet.named_parameters()):
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    unet.eval()


@by_kind
def test_lora_acts_as_if_it_were_in_the_weights(settings):
    unet = tiny_unet().double()  # lest rounding decides which token is nearest
    given = {name: x.double() for name, x in unet_inputs(unet).items() if name != "timestep"}
    agentsd.apply_patch(unet, **settings)
    without = run(unet, **given)
    remove_patch(unet)
    lora(unet)
    unet.double()
    agentsd.apply_patch(unet, **settings)
    loaded = run(unet, **given)
    assert (loaded - without).abs().max() > 0.01
    unet.disable_lora()
    torch.testing.assert_close(run(unet, **given), without, rtol=1e-6, atol=1e-6)
    unet.enable_lora()
    unet.fuse_lora()
    torch.testing.assert_close(run(unet, **given), loaded, rtol=1e-6, atol=1e-6)


def test_lora_may_come_and_go_while_the_patch_is_on():
    unet = tiny_unet()
    before = anatomy(unet)
    agentsd.apply_patch(unet, **GRID)
    without = run(unet)
    lora(unet)
    on_top = run(unet)
    remove_patch(unet)
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet), on_top)
    assert not torch.equal(on_top, without)
    unet.unload_lora()
    assert torch.equal(run(unet), without)
    remove_patch(unet)
    assert anatomy(unet).keys() == before.keys()


def ip_adapter(unet, tokens: int = 4, embedding: int = 16) -> dict:
    """The weights of an IP-Adapter for this U-Net, in the layout in which they are published."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    width = unet.config.cross_attention_dim
    weights, key = {}, 1
    for name, attn in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                weights[f"{key}.to_{part}_ip.weight"] = noise(attn.inner_dim, width)
            key += 2
    projection = {
        "proj.weight": noise(tokens * width, embedding),
        "proj.bias": noise(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def attn2_processors(unet) -> dict:
    return {name: p for name, p in unet.attn_processors.items() if "attn2" in name}


def image_prompt() -> dict:
    generator = torch.Generator().manual_seed(6)
    return {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16, generator=generator)]}}


@by_kind
def test_ip_adapters_are_left_alone(settings):
    unet = tiny_unet()
    unet._load_ip_adapter_weights([ip_adapter(unet)], low_cpu_mem_usage=False)
    theirs, before, plain = attn2_processors(unet), anatomy(unet), run(unet, **image_prompt())
    assert all(isinstance(p, IPAdapterAttnProcessor2_0) for p in theirs.values())
    agentsd.apply_patch(unet, **settings)
    assert all(now is theirs[name] for name, now in attn2_processors(unet).items())
    patched = run(unet, **image_prompt())
    assert get_patch(unet).notes == {}
    for p in theirs.values():
        p.scale = [0.0]
    assert not torch.equal(run(unet, **image_prompt()), patched), "the image prompt counts under the patch"
    for p in theirs.values():
        p.scale = [1.0]
    remove_patch(unet)
    assert anatomy(unet) == before
    assert torch.equal(run(unet, **image_prompt()), plain)


def test_an_ip_adapter_can_be_loaded_while_the_patch_is_on():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **GRID)
    unet._load_ip_adapter_weights([ip_adapter(unet)], low_cpu_mem_usage=False)
    displaced = run(unet, **image_prompt())
    assert any("in its place" in reason for reason in get_patch(unet).notes), "diffusers renews all processors"
    remove_patch(unet)
    assert all(isinstance(p, IPAdapterAttnProcessor2_0) for p in attn2_processors(unet).values())
    assert all(type(attn.processor) is AttnProcessor2_0 for attn in attn1s(unet).values())
    assert torch.equal(run(unet, **image_prompt()), displaced)


def offload(pipe, kind: str) -> None:
    """Offload, with the CPU as the device that computes as well."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        # what enable_sequential_cpu_offload does to a U-Net
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    else:
        pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offloaded_anatomy(unet: nn.Module) -> dict:
    """As `anatomy`, but without the identity of `forward`: model offload renews it after every picture."""
    return {name: entry[:-1] for name, entry in anatomy(unet).items()}


@by_kind
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading_changes_nothing(kind, settings):
    pipe = tiny_sd()
    agentsd.apply_patch(pipe, **settings)
    plain = picture(pipe)
    remove_patch(pipe)
    offload(pipe, kind)
    before, without = offloaded_anatomy(pipe.unet), picture(pipe)
    agentsd.apply_patch(pipe, **settings)
    torch.testing.assert_close(picture(pipe), plain, rtol=0, atol=1e-3)
    assert get_patch(pipe).notes == {}
    remove_patch(pipe)
    assert offloaded_anatomy(pipe.unet) == before
    assert torch.equal(picture(pipe), without)


def test_offloading_may_begin_while_the_patch_is_on():
    pipe = tiny_sd()
    agentsd.apply_patch(pipe, **GRID)
    plain = picture(pipe)
    offload(pipe, "sequential")
    assert pipe.unet.conv_in.weight.device.type == "meta"
    torch.testing.assert_close(picture(pipe), plain, rtol=0, atol=1e-3)
    remove_patch(pipe)
    picture(pipe)


class Custom:
    """Somebody's attention processor, with a parameter of its own."""

    def __init__(self):
        self.seen = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, strength=1.0):
        self.seen.append((hidden_states.shape[1], strength))
        return strength * AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class CustomModule(nn.Module):
    """Somebody's attention processor with weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, attn, hidden_states, *args, **kwargs):
        return self.weight * AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


def set_attn1(unet, make) -> dict:
    """Give all self-attentions a processor made by `make`; the others keep theirs."""
    new = {name: make() if "attn1" in name else p for name, p in unet.attn_processors.items()}
    unet.set_attn_processor(dict(new))
    return new


@by_kind
def test_an_unknown_processor_is_asked_and_not_replaced(settings):
    unet = tiny_unet()
    set_attn1(unet, Custom)
    plain = run(unet, cross_attention_kwargs={"strength": 0.5})
    agentsd.apply_patch(unet, **{**settings, "merge_crossattn": False, "merge_mlp": False})
    assert torch.equal(run(unet, cross_attention_kwargs={"strength": 0.5}), plain)
    assert "its attention processor is Custom" in get_patch(unet).notes
    custom = next(iter(attn1s(unet).values()))
    remove_patch(unet)
    assert custom.processor.seen == [(256, 0.5)] * 2


def test_a_processor_with_weights_stays_in_the_module_tree():
    unet = tiny_unet()
    set_attn1(unet, CustomModule)
    before, names, plain = anatomy(unet), list(unet.state_dict()), run(unet)
    agentsd.apply_patch(unet, **GRID)
    assert list(unet.state_dict()) == names
    assert torch.equal(run(unet), plain)
    assert "its attention processor is CustomModule" in get_patch(unet).notes
    remove_patch(unet)
    assert anatomy(unet) == before


def test_processors_set_while_the_patch_is_on_survive_its_removal():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **GRID)
    theirs = set_attn1(unet, Custom)
    run(unet)
    remove_patch(unet)
    assert all(attn.processor is theirs[f"{name}.processor"] for name, attn in attn1s(unet).items())


def test_a_processor_put_back_after_removal_is_the_hosts():
    """As unfuse_qkv_projections does: what was there is remembered, and set again later."""
    unet = tiny_unet()
    plain = run(unet)
    agentsd.apply_patch(unet, **GRID)
    patched, remembered = run(unet), unet.attn_processors
    unet.set_attn_processor(AttnProcessor())
    remove_patch(unet)
    unet.set_attn_processor(remembered)
    assert torch.equal(run(unet), plain)
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet), patched)
    remove_patch(unet)
    assert all(type(attn.processor) is AttnProcessor2_0 for attn in attn1s(unet).values())


def test_diffusers_own_switches_work_while_the_patch_is_on():
    unet = tiny_unet()
    plain = run(unet)
    agentsd.apply_patch(unet, **GRID)
    unet.set_attention_slice(1)
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    unet.set_default_attn_processor()
    remove_patch(unet)
    torch.testing.assert_close(run(unet), plain, rtol=1e-4, atol=1e-4)


def test_sliced_and_fused_attention_take_the_patch():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **GRID)
    patched = run(unet)
    remove_patch(unet)
    for switch in (lambda: unet.set_attention_slice(1), unet.fuse_qkv_projections):
        switch()
        before = anatomy(unet)
        agentsd.apply_patch(unet, **GRID)
        torch.testing.assert_close(run(unet), patched, rtol=1e-4, atol=1e-4)
        remove_patch(unet)
        assert anatomy(unet) == before


# What the U-Net is given


def test_a_mask_is_the_hosts_business():
    unet = tiny_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,  # the mask fits level 0 only
    )
    mask = {"attention_mask": torch.arange(256).expand(2, 256) % 2}
    plain = run(unet, **mask)
    assert not torch.equal(plain, run(unet))
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet, **mask), plain)
    assert get_patch(unet).notes["self-attention was given a mask"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_kind
def test_half_precision(settings, dtype):
    unet = tiny_unet()
    half = copy.deepcopy(unet).to(dtype)
    given = unet_inputs(unet)
    for model in (unet, half):
        agentsd.apply_patch(model, **settings)
    out = run(half, sample=given["sample"].to(dtype), encoder_hidden_states=given["encoder_hidden_states"].to(dtype))
    assert out.dtype == dtype
    assert get_patch(half).notes == {}
    if settings in (GRID, POOL):  # the others depend on which tokens are nearest, which rounding may change
        deviation = (out.float() - run(unet)).norm() / run(unet).norm()
        assert deviation < 0.05


def test_gradient_checkpointing_gives_the_same_gradients():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **SIMILARITY)

    def gradient() -> torch.Tensor:
        unet.zero_grad()
        unet(**unet_inputs(unet)).sample.square().mean().backward()
        return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.grad.clone()

    direct = gradient()
    unet.train()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), direct)
    assert direct.abs().max() > 0
    assert get_patch(unet).notes == {}


def test_a_row_does_not_depend_on_the_batch():
    unet = tiny_unet()
    agentsd.apply_patch(unet, **SIMILARITY)
    given = unet_inputs(unet)
    whole = run(unet)
    row = run(unet, sample=given["sample"][1:], encoder_hidden_states=given["encoder_hidden_states"][1:])
    torch.testing.assert_close(whole[1:], row, rtol=1e-4, atol=1e-4)
