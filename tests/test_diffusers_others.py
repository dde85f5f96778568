"""What others do to a diffusers U-Net before, during and after the patch."""

import pytest
import torch
from torch import nn

import agentsd
from agentsd import get_patch, patched, remove_patch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0  # noqa: E402
from kinds import CORRECTED, EVERYWHERE, GRID, SIMILARITY  # noqa: E402
from tiny_pipelines import anatomy, attn1s, picture, run, tiny_sd, tiny_unet, unet_inputs  # noqa: E402


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


@pytest.mark.parametrize("settings", [SIMILARITY, EVERYWHERE, CORRECTED], ids=["similarity", "everywhere", "corrected"])
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
    projection = {"proj.weight": noise(tokens * width, embedding), "proj.bias": noise(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": projection, "ip_adapter": weights}


def attn2_processors(unet) -> dict:
    return {name: p for name, p in unet.attn_processors.items() if "attn2" in name}


def image_prompt() -> dict:
    generator = torch.Generator().manual_seed(6)
    return {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16, generator=generator)]}}


@pytest.mark.parametrize("settings", [SIMILARITY, EVERYWHERE], ids=["similarity", "everywhere"])
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
    unet._load_ip_adapter_weights([ip_adapter(unet)], low_cpu_mem_usage=False)  # which renews all processors
    patched = run(unet, **image_prompt())
    assert get_patch(unet).notes == {}
    remove_patch(unet)
    assert all(isinstance(p, IPAdapterAttnProcessor2_0) for p in attn2_processors(unet).values())
    assert all(type(attn.processor) is AttnProcessor2_0 for attn in attn1s(unet).values())
    plain = run(unet, **image_prompt())
    assert (patched - plain).abs().max() > 1e-3
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet, **image_prompt()), patched)


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


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading_changes_nothing(kind):
    pipe = tiny_sd()
    agentsd.apply_patch(pipe, **SIMILARITY)
    plain = picture(pipe)
    remove_patch(pipe)
    offload(pipe, kind)
    before, without = offloaded_anatomy(pipe.unet), picture(pipe)
    agentsd.apply_patch(pipe, **SIMILARITY)
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


class Custom(nn.Module):
    """Somebody's attention processor, with weights and with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, strength=1.0):
        self.seen.append((hidden_states.shape[1], strength))
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return self.weight * strength * out


class CustomAttnProcessor2_0(AttnProcessor2_0):
    """Plain attention under the name that InvokeAI gives it."""


def set_attn1(unet, make) -> dict:
    """Give all self-attentions a processor made by `make`; the others keep theirs."""
    new = {name: make() if "attn1" in name else p for name, p in unet.attn_processors.items()}
    unet.set_attn_processor(dict(new))
    return new


def test_an_unknown_processor_is_asked_and_not_replaced():
    unet, stronger = tiny_unet(), {"cross_attention_kwargs": {"strength": 2.0}}
    set_attn1(unet, Custom)
    before, names, plain = anatomy(unet), list(unet.state_dict()), run(unet, **stronger)
    with patched(unet, **SIMILARITY):
        assert list(unet.state_dict()) == names
        assert torch.equal(run(unet, **stronger), plain)
        assert "its attention processor is Custom" in get_patch(unet).notes
    assert anatomy(unet) == before
    assert next(iter(attn1s(unet).values())).processor.seen == [(256, 2.0)] * 2


def test_plain_attention_by_invokeai_s_name_is_ours():
    unet = tiny_unet()
    with patched(unet, **SIMILARITY):
        expected = run(unet)
    theirs = set_attn1(unet, CustomAttnProcessor2_0)
    with patched(unet, **SIMILARITY):
        assert torch.equal(run(unet), expected)
        assert get_patch(unet).notes == {}
    assert all(attn.processor is theirs[f"{name}.processor"] for name, attn in attn1s(unet).items())


def test_processors_set_while_the_patch_is_on_survive_its_removal():
    unet = tiny_unet()
    with patched(unet, **GRID):
        theirs = set_attn1(unet, Custom)
        run(unet)
    assert all(attn.processor is theirs[f"{name}.processor"] for name, attn in attn1s(unet).items())


def test_a_processor_put_back_after_removal_is_the_hosts():
    """As unfuse_qkv_projections does: what was there is remembered, and set again later."""
    unet = tiny_unet()
    plain = run(unet)
    agentsd.apply_patch(unet, **GRID)
    ours, remembered = run(unet), unet.attn_processors
    unet.set_attn_processor(AttnProcessor())
    remove_patch(unet)
    unet.set_attn_processor(remembered)
    assert torch.equal(run(unet), plain)
    agentsd.apply_patch(unet, **GRID)
    assert torch.equal(run(unet), ours)
    remove_patch(unet)
    assert all(type(attn.processor) is AttnProcessor2_0 for attn in attn1s(unet).values())
