"""What others do to a diffusers U-Net before, during and after the patch."""

import pytest
import torch

import agentsd
from agentsd import get_patch, remove_patch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from blocks import tree  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0  # noqa: E402
from kinds import CORRECTED, EVERYWHERE, GRID, SIMILARITY  # noqa: E402
from tiny_pipelines import picture, run, tiny_sd, tiny_unet, unet_inputs  # noqa: E402


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
    unet.eval().double()


@pytest.mark.parametrize("settings", [SIMILARITY, EVERYWHERE, CORRECTED], ids=["similarity", "everywhere", "corrected"])
def test_lora_acts_as_if_it_were_in_the_weights_and_may_come_and_go(settings):
    unet = tiny_unet().double()  # lest rounding decides which token is nearest
    given = {name: x.double() for name, x in unet_inputs(unet).items() if name != "timestep"}
    before = tree(unet)
    agentsd.apply_patch(unet, **settings)
    without = run(unet, **given)
    lora(unet)
    loaded = run(unet, **given)
    assert (loaded - without).abs().max() > 0.01
    remove_patch(unet)
    agentsd.apply_patch(unet, **settings)
    assert torch.equal(run(unet, **given), loaded)
    unet.disable_lora()
    torch.testing.assert_close(run(unet, **given), without, rtol=1e-6, atol=1e-6)
    unet.enable_lora()
    unet.fuse_lora()
    torch.testing.assert_close(run(unet, **given), loaded, rtol=1e-6, atol=1e-6)
    unet.unfuse_lora()
    unet.unload_lora()
    torch.testing.assert_close(run(unet, **given), without, rtol=1e-6, atol=1e-6)
    remove_patch(unet)
    assert tree(unet).keys() == before.keys()


def load_ip_adapter(unet, tokens: int = 4, embedding: int = 16) -> None:
    """Load an IP-Adapter of random weights, in the layout in which they are published."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    width = unet.config.cross_attention_dim
    attns = [attn for name, attn in unet.named_modules() if name.endswith("attn2")]
    weights = {f"{2 * i + 1}.to_{p}_ip.weight": noise(a.inner_dim, width) for i, a in enumerate(attns) for p in "kv"}
    projection = {"proj.weight": noise(tokens * width, embedding), "proj.bias": noise(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)


def processors(unet, kind: str) -> list:
    return [p for name, p in unet.attn_processors.items() if kind in name]


@pytest.mark.parametrize("settings", [SIMILARITY, EVERYWHERE], ids=["similarity", "everywhere"])
def test_ip_adapters_are_left_alone_and_can_be_loaded_while_the_patch_is_on(settings):
    generator = torch.Generator().manual_seed(6)
    prompt = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16, generator=generator)]}}
    unet, other = tiny_unet(), tiny_unet()
    load_ip_adapter(unet)
    theirs, before, plain = processors(unet, "attn2"), tree(unet), run(unet, **prompt)
    agentsd.apply_patch(unet, **settings)
    assert processors(unet, "attn2") == theirs
    patched = run(unet, **prompt)
    assert (patched - plain).abs().max() > 1e-3
    scales = [p.scale for p in theirs]
    for p in theirs:
        p.scale = [0.0]
    assert not torch.equal(run(unet, **prompt), patched), "the image prompt counts under the patch"
    for p, scale in zip(theirs, scales, strict=True):
        p.scale = scale
    agentsd.apply_patch(other, **settings)
    load_ip_adapter(other)  # which renews all processors
    assert torch.equal(run(other, **prompt), patched)
    for model in (unet, other):
        assert get_patch(model).notes == {}
        remove_patch(model)
        assert torch.equal(run(model, **prompt), plain)
    assert tree(unet) == before
    assert {type(p) for p in processors(other, "attn2")} == {IPAdapterAttnProcessor2_0}
    assert {type(p) for p in processors(other, "attn1")} == {AttnProcessor2_0}


# With the CPU as the device that computes as well; the second is what enable_sequential_cpu_offload does to a U-Net
OFFLOAD = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: accelerate.cpu_offload(pipe.unet, torch.device("cpu")),
    "group": lambda pipe: pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("kind", OFFLOAD)
def test_offloading_changes_nothing_and_may_begin_while_the_patch_is_on(kind):
    def names_and_processors() -> dict:
        """What is where; offloading renews the rest with every picture."""

        def seen(name, x):
            return [key for key, _ in x] if isinstance(x, list) else x if name == "processor" else None

        return {
            name: (cls, {name: seen(name, x) for name, x in attributes.items()})
            for name, (cls, attributes) in tree(pipe.unet).items()
        }

    pipe = tiny_sd()
    agentsd.apply_patch(pipe, **GRID)
    plain = picture(pipe)
    OFFLOAD[kind](pipe)
    torch.testing.assert_close(picture(pipe), plain, rtol=0, atol=1e-3)
    remove_patch(pipe)
    before, without = names_and_processors(), picture(pipe)
    assert not torch.equal(without, plain)
    agentsd.apply_patch(pipe, **GRID)
    torch.testing.assert_close(picture(pipe), plain, rtol=0, atol=1e-3)
    assert get_patch(pipe).notes == {}
    remove_patch(pipe)
    assert names_and_processors() == before
    assert torch.equal(picture(pipe), without)
