"""The patch on transformers of diffusers with random weights."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import agentsd
from agentsd import AgentConfig, Rule, TuningError, get_patch
from agentsd.attention.corrected import corrected_attention
from agentsd.checks import SettingError
from agentsd.hosts import UnsupportedModelError, family_of, find_sites, find_unet
from agentsd.methods import LayerPlan, register, unregister
from agentsd.methods.corrected import Corrected

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

import diffusers
from blocks import filled, tree
from patching import pickled
from tiny_transformers import TEXT, TINY, WIDTH

SIZE = (20, 18)
CORRECTED = {"method": "corrected", "exact_ratio": 0.2}
SDPA = F.scaled_dot_product_attention
SD3, FLUX, PIXART, QWEN, Z_IMAGE = (
    f"{name}Transformer2DModel" for name in ("SD3", "Flux", "PixArt", "QwenImage", "ZImage")
)
by_family = pytest.mark.parametrize("family", TINY)
# families whose masks close text alone, and how a mask is made
MASKED = (QWEN, Z_IMAGE, "ChromaTransformer2DModel", "CogView4Transformer2DModel")


@torch.no_grad()
def run(model, given):
    out = model(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def made(family, **changes):
    """A transformer, and arguments for calling it."""
    return TINY[family].make(**changes), TINY[family].call(*SIZE)


@pytest.fixture
def everything():
    """A method that opens every cell: full attention by way of everything that is ours."""

    @register
    class Everything(Corrected):
        name = "everything"

        def plan(self, settings, height, width, r):
            n = -(-height // 4) * -(-width // 4)
            return LayerPlan(self, height * width, height * width, n, (4, 4), opened=n)

    yield {"method": "everything"}
    unregister("everything")


class Seen(TorchFunctionMode):
    """Keeps the arguments of each attention whose queries and keys are as many."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is SDPA:
            q, k, v = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
            if q.shape == k.shape:
                self.calls.append((q, k, v))
        return func(*args, **kwargs)


# What is done


@by_family
def test_every_attention_that_sees_the_image_is_answered_and_the_patch_leaves_nothing_behind(family):
    tiny = TINY[family]
    model, given = tiny.make(), tiny.call(*SIZE)
    before, plain = tree(model), run(model, given)
    with agentsd.patched(model, **CORRECTED):
        patch, patched = get_patch(model), run(model, given)
        report = patch.report()
        assert patch.notes == {}
        assert [(layer.size, layer.calls) for layer in report] == [(SIZE, {"corrected": 1})] * tiny.attentions
        assert [plan for _, plan in patch.explain(2 * SIZE[0], 2 * SIZE[1])] == [layer.plan for layer in report]
        assert torch.equal(run(model, given), patched)
    assert get_patch(model) is None
    assert 1e-4 < (patched - plain).norm() / plain.norm() < 0.2
    assert tree(model) == before
    assert torch.equal(run(model, given), plain)


@by_family
@pytest.mark.parametrize(("size", "batch"), [((13, 22), 1), ((16, 8), 3)])
def test_with_every_cell_open_it_is_full_attention(family, size, batch, everything):
    tiny = TINY[family]
    model, given = tiny.make(), tiny.call(*size, batch=batch)
    plain = run(model, given)
    with agentsd.patched(model, **everything):
        get_patch(model).observe_closeness = batch == 1
        assert (run(model, given) - plain).norm() < 1e-5 * plain.norm()
        assert all(layer.calls == {"everything": 1} for layer in get_patch(model).report())
        assert batch > 1 or get_patch(model).closeness().mean < 1e-5


@by_family
def test_image_tokens_get_corrected_attention_and_text_tokens_full_attention(family):
    tiny = TINY[family]
    model, given = tiny.make(), tiny.call(*SIZE)
    attn = next(site.attn for site in find_sites(model) if "refiner" not in site.name)
    with Seen() as seen:
        run(model, given)
    answers = []
    attn.to_out[0].register_forward_pre_hook(lambda _, args: answers.append(args[0]))
    with agentsd.patched(model, **CORRECTED, rules=[Rule(None, blocks="noise_refiner.*")]):
        run(model, given)
        plan = get_patch(model).report()[-1].plan
    (q, k, v), N, got = seen.calls[2 if hasattr(model, "noise_refiner") else 0], SIZE[0] * SIZE[1], answers[0]
    text = q.shape[2] - N
    cut, rest = (slice(text, None), slice(0, text)) if tiny.text_first else (slice(0, N), slice(N, None))
    image, beside = [x[:, :, cut] for x in (q, k, v)], [x[:, :, rest] for x in (k, v)] if text else None
    ours = corrected_attention(*image, size=SIZE, cell=plan.cell, opened=plan.opened, text=beside)
    expected = ours.transpose(1, 2).flatten(2)
    if got.shape[1] == N:
        torch.testing.assert_close(got, expected)
    else:  # text as well
        full = SDPA(q[:, :, rest], k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got[:, cut], expected)
        torch.testing.assert_close(got[:, rest], full)


def test_rules_name_attentions_and_parts_by_the_noise_level():
    tiny = TINY[FLUX]
    model = tiny.make()
    agentsd.apply_patch(model, **CORRECTED, rules=[Rule(None, blocks="single_*"), Rule(None, until=0.5)])
    for sigma in (0.75, 0.25):
        run(model, tiny.call(*SIZE, sigma=sigma))
        assert get_patch(model).last_call.progress == pytest.approx(1 - sigma)
    assert [(r.name, r.calls) for r in get_patch(model).report()] == [
        ("transformer_blocks.0.attn", {"untouched": 1, "corrected": 1}),
        ("single_transformer_blocks.0.attn", {"untouched": 2}),
    ]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (SD3, {"method": "pool", "sx": 2, "sy": 2}),
        (PIXART, {"method": "pool", "sx": 2, "sy": 2}),
        (PIXART, {"method": "agent", "ratio": 0, "agent_ratio": 0.9, "agent_source": "grid"}),
    ],
)
def test_other_methods_act_where_they_make_sense(family, settings):
    model, given = made(family)
    plain = run(model, given)
    with agentsd.patched(model, **settings):
        assert 1e-4 < (run(model, given) - plain).norm() / plain.norm() < 0.5
        assert get_patch(model).notes == {}


@pytest.mark.parametrize("exact", [0.0, 0.2])
def test_the_share_of_flops_is_that_of_the_counter(exact):
    tiny = TINY[FLUX]
    model, given = tiny.make(), tiny.call(32, 32, batch=1)

    def counted():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(**given)
        return counter.get_total_flops()

    full = 4 * 2 * (32 * 32 + TEXT) ** 2 * WIDTH
    rest = counted() - full
    agentsd.apply_patch(model, **CORRECTED | {"exact_ratio": exact})
    share = get_patch(model).attention_share(64, 64, TEXT)
    assert (counted() - rest) / full == pytest.approx(share, rel=0.25)


# Masks, and what is left to the host


def masked(family, given):
    """The same arguments with some text of the first row closed."""
    batch, open_text = 2, torch.ones(2, TEXT, dtype=torch.bool)
    open_text[0, 5:] = False
    if family == Z_IMAGE:
        return {**given, "cap_feats": [torch.randn(5, 32), torch.randn(40, 32)]}
    if family == "ChromaTransformer2DModel":
        image = torch.ones(batch, given["hidden_states"].shape[1], dtype=torch.bool)
        return {**given, "attention_mask": torch.cat([open_text, image], dim=1)}
    return {**given, "attention_mask" if family.startswith("CogView") else "encoder_hidden_states_mask": open_text}


@pytest.mark.parametrize("family", MASKED)
def test_masked_text_stays_closed(family, everything):
    model, given = made(family)
    given = masked(family, given)
    plain = run(model, given)
    with agentsd.patched(model, **everything):
        assert (run(model, given) - plain).norm() < 1e-5 * plain.norm()
        assert get_patch(model).notes == {}


def two_images(given, family):
    """A second image of the same size behind the first."""
    twice = torch.cat([given["hidden_states"]] * 2, dim=1)
    if "img_shapes" in given:
        return {**given, "hidden_states": twice, "img_shapes": [shapes * 2 for shapes in given["img_shapes"]]}
    other = given["img_ids"].clone()
    other[..., 0] = 1
    return {**given, "hidden_states": twice, "img_ids": torch.cat([given["img_ids"], other], dim=-2)}


def uneven_text(given, family):
    mask = given["encoder_attention_mask"].clone()
    mask[0, 4:] = False
    return {**given, "encoder_attention_mask": mask}


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        (FLUX, two_images, "do not form one grid"),
        ("Flux2Transformer2DModel", two_images, "do not form one grid"),
        (QWEN, two_images, "do not form one grid"),
        ("Lumina2Transformer2DModel", uneven_text, "may close tokens of the image"),
    ],
)
def test_other_calls_are_the_hosts_and_noted(family, change, reason):
    tiny = TINY[family]
    model = tiny.make()
    given = change(tiny.call(*SIZE), family)
    plain = run(model, given)
    agentsd.apply_patch(model, **CORRECTED, rules=[Rule(None, blocks="noise_refiner.*")])
    assert torch.equal(run(model, given), plain)
    assert reason in " ".join(get_patch(model).notes)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        (SD3, {}, "text stands beside the image"),
        (FLUX, {}, "rotary positions"),
        (FLUX, {"method": "pool"}, "rotary positions"),
        (PIXART, {}, "no tokens are merged there, got 0.4"),
        (PIXART, {"ratio": 0}, "no tokens are matched there"),
        (SD3, {"method": "merge"}, "text stands beside the image"),
        (SD3, {**CORRECTED, "merge_mlp": True}, "no tokens are merged there"),
        (SD3, {**CORRECTED, "rules": [Rule({"method": "agent"}, since=0.5)]}, "text stands"),
    ],
)
def test_what_a_transformer_cannot_have_is_refused_at_once(family, settings, reason):
    model = TINY[family].make()
    with pytest.raises(SettingError, match=reason):
        agentsd.apply_patch(model, **settings)
    assert get_patch(model) is None


def test_unknown_transformers_are_refused():
    model = TINY[SD3].make()
    with pytest.raises(UnsupportedModelError, match="model must be a U-Net here"):
        find_unet(model)
    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer2DModel.*got Linear"):
        agentsd.apply_patch(torch.nn.Linear(2, 2), **CORRECTED)
    with pytest.raises(UnsupportedModelError, match="kv_context is for a U-Net"):
        agentsd.patch_unet(model, AgentConfig(**CORRECTED), lambda attn, x: (x, x))
    assert get_patch(model) is None


@by_family
def test_a_transformer_is_recorded_and_tuned_and_its_plan_kept_as_text(family, every_gain_counts):
    tiny = TINY[family]
    model = tiny.make()
    with agentsd.record_calls(model) as calls:
        for sigma in (0.9, 0.5, 0.1):
            plain = run(model, tiny.call(*SIZE, sigma=sigma))
    before = tree(model)
    tuning = agentsd.tune(model, calls, 0.5)
    assert tree(model) == before
    assert tuning.acts
    assert 0 < tuning.measured <= 0.5
    assert [d.progress for d in tuning.plan.deviations] == pytest.approx([0.1, 0.5, 0.9])
    assert (tuning.size, len(tuning.blocks)) == ((2 * SIZE[0], 2 * SIZE[1]), tiny.attentions)
    for given in (tuning, tuning.text):
        with agentsd.patched(model, tuning=given):
            out = run(model, tiny.call(*SIZE, sigma=0.1))
            assert get_patch(model).notes == {}
            assert any(plan and plan.acts for _, plan in get_patch(model).explain(*tuning.size, 0.9))
        assert (out - plain).norm() / plain.norm() == pytest.approx(tuning.plan.deviations[-1].measured, rel=1e-3)
    with pytest.raises(TuningError, match="another model"):
        agentsd.apply_patch(TINY[SD3].make(num_layers=3), tuning=tuning)


def test_a_tuning_tries_what_a_transformer_can_have():
    tiny = TINY[FLUX]
    model, calls = tiny.make(), [((), tiny.call(*SIZE))]
    assert {each["method"] for each in agentsd.tune(model, calls, 0.5).candidates} == {"corrected"}
    with pytest.raises(SettingError, match="rotary positions"):
        agentsd.tune(model, calls, 0.5, methods=["corrected", "pool"])


@pytest.mark.parametrize(
    ("family", "given"),
    [
        (FLUX, {}),
        (QWEN, {}),
        (QWEN, {"img_shapes": [[]]}),
        (Z_IMAGE, {}),
        (Z_IMAGE, {"x": []}),
        (Z_IMAGE, {"x": [torch.zeros(3)]}),
    ],
)
def test_odd_calls_have_no_grid(family, given):
    assert family_of(TINY[family].make()).read_grid(TINY[family].make(), (), given) is None


def test_a_patch_that_is_removed_meanwhile_answers_to_the_end():
    model, given = made(SD3)
    agentsd.apply_patch(model, **CORRECTED)
    expected = run(model, given)
    attn = model.transformer_blocks[0].attn
    attn.to_q.register_forward_hook(lambda *call: setattr(attn.processor, "handler", None))
    assert torch.equal(run(model, given), expected)


# What diffusers does beside it


@pytest.mark.parametrize("family", [FLUX, QWEN])
@pytest.mark.parametrize("after", [False, True])
def test_the_chosen_backend_computes_what_is_full_attention(family, after, monkeypatch):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    model, given = made(family)
    used = []
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    backends = registry._backends
    math = backends["_native_math"]
    monkeypatch.setitem(backends, "_native_math", lambda **kw: (used.append(kw["query"].shape[1]), math(**kw))[1])
    with agentsd.patched(model, **CORRECTED):
        expected = run(model, given)
    if not after:
        model.set_attention_backend("_native_math")
    agentsd.apply_patch(model, **CORRECTED)
    if after:
        model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(model, given), expected)
    assert used
    assert set(used) == {TEXT}, "text queries alone"
    agentsd.remove_patch(model)
    used.clear()
    run(model, given)
    assert used == [TEXT + SIZE[0] * SIZE[1]] * 2, "the choice stays"


@pytest.mark.parametrize("family", [SD3, FLUX])
def test_fused_projections_and_other_processors_are_answered_as_well(family):
    tiny = TINY[family]
    # diffusers itself can't fuse a second attention, and forgets norms
    changes = {"dual_attention_layers": (), "qk_norm": None} if family.startswith("SD3") else {}
    model, given = tiny.make(**changes), tiny.call(*SIZE)
    agentsd.apply_patch(model, **CORRECTED)
    expected = run(model, given)
    model.set_attn_processor({name: type(p.previous)() for name, p in model.attn_processors.items()})
    assert torch.equal(run(model, given), expected)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, given), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, given), expected)
    assert get_patch(model).notes == {}
    assert all(layer.calls == {"corrected": 4} for layer in get_patch(model).report())
    agentsd.remove_patch(model)
    assert not any(hasattr(p, "handler") for p in model.attn_processors.values())


def test_tokens_spread_over_devices_are_left_to_the_host():
    model, given = made(FLUX)
    agentsd.apply_patch(model, **CORRECTED)
    for processor in model.attn_processors.values():
        processor._parallel_config = object()
    with pytest.raises(Exception, match="context_parallel_config"):  # the host's own call
        run(model, given)
    assert all(layer.seam.obstacle.endswith("by context parallelism") for layer in get_patch(model)._layers)


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def cpu_offload(model):
    """What `enable_sequential_cpu_offload` does to a part of a pipeline."""
    pytest.importorskip("accelerate").cpu_offload(model, "cpu")


def cached(kind, **settings):
    return lambda model: model.enable_cache(getattr(diffusers, kind)(**settings))


def broadcast(model):
    settings = {"timestep_skip_range": (-1, 1001), "block_identifiers": ("transformer_blocks",), "block_skip_range": 2}
    spatial = {f"spatial_attention_{name}": value for name, value in settings.items()}
    cached("PyramidAttentionBroadcastConfig", **spatial, current_timestep_callback=lambda: 500)(model)


BOTH, CACHED = (SD3, FLUX), (FLUX,)  # SD 3 has no caches
SITUATIONS = {
    "calls for cond and for uncond": (BOTH, lambda model: None),
    "LoRA": (BOTH, lora),
    "float8": (BOTH, casting),
    "group offload": (BOTH, group_offload),
    "CPU offload": (BOTH, cpu_offload),
    "FirstBlockCache": (CACHED, cached("FirstBlockCacheConfig", threshold=10.0)),
    "MagCache": (CACHED, cached("MagCacheConfig", threshold=1.0, num_inference_steps=4, mag_ratios=[1.0] * 4)),
    "TaylorSeer": (CACHED, cached("TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=1)),
    "Pyramid Attention Broadcast": (CACHED, broadcast),
}


@torch.no_grad()
def passes(model, tiny, more=lambda given: {}):
    """What a transformer answers to cond and uncond, of several prompts, at some steps."""
    made = []
    for sigma, name in itertools.product((0.9, 0.7, 0.5, 0.3), ("cond", "uncond")):
        given = tiny.call(*SIZE, batch=3, sigma=sigma)
        given["encoder_hidden_states"] *= 1 if name == "cond" else -1
        with getattr(model, "cache_context", nullcontext)(name):
            made.append(model(**given, **more(given), return_dict=False)[0])
    return torch.stack(made)


@pytest.mark.parametrize("first", [True, False], ids=["patched first", "patched last"])
@pytest.mark.parametrize(
    ("family", "situation"), [(family, name) for name, (families, _) in SITUATIONS.items() for family in families]
)
def test_what_diffusers_puts_on_a_model_works_beside_it(family, situation, first, everything):
    tiny, (families, setup) = TINY[family], SITUATIONS[situation]
    reference, model = tiny.make(), tiny.make()
    if first:
        agentsd.apply_patch(model, **everything)
    setup(reference)
    setup(model)
    if not first:
        agentsd.apply_patch(model, **everything)
    expected = passes(reference, tiny)
    assert (passes(model, tiny) - expected).norm() < 1e-4 * expected.norm()
    calls, caches = [layer.calls["everything"] for layer in get_patch(model).report()], families == CACHED
    assert 0 < min(calls) < 8 if caches else set(calls) == {8}
    assert list(get_patch(model).notes) == ["something else answers self-attention in its place"] * caches
    agentsd.remove_patch(model)
    assert caches or torch.equal(passes(model, tiny), expected)


@pytest.mark.parametrize("situation", ["LoRA", "float8", "group offload", "CPU offload"])
def test_it_is_tuned_beside_it(situation, every_gain_counts):
    tiny = TINY[FLUX]
    model = tiny.make()
    SITUATIONS[situation][1](model)
    with agentsd.record_calls(model, 2) as calls:
        plain = passes(model, tiny)
    tuning = agentsd.tune(model, calls, 0.5)
    assert 0 < tuning.measured <= 0.5
    assert torch.equal(passes(model, tiny), plain)
    agentsd.apply_patch(model, tuning=tuning)
    assert not torch.equal(passes(model, tiny), plain)


@pytest.mark.parametrize("family", [SD3, FLUX])
def test_a_controlnet_adds_its_residuals(family, everything):
    tiny = TINY[family]
    model, flux = tiny.make(), family.startswith("Flux")
    kind = diffusers.FluxControlNetModel if flux else diffusers.SD3ControlNetModel
    heads = {"num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    settings = heads if flux else {"num_extra_conditioning_channels": 0}
    control = filled(kind.from_transformer(model, num_layers=1, **settings, load_weights_from_transformer=False))

    def more(given):
        found = control(**given, controlnet_cond=given["hidden_states"], return_dict=False)
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        return dict(zip(names if flux else ("block_controlnet_hidden_states",), found, strict=False))

    plain, expected = passes(model, tiny), passes(model, tiny, more)
    agentsd.apply_patch(model, **everything)
    assert (passes(model, tiny, more) - expected).norm() < 1e-5 * expected.norm()
    assert (expected - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("family", [SD3, FLUX])
def test_a_copy_has_a_patch_of_its_own(family, copied):
    model, given = made(family)
    plain = run(model, given)
    agentsd.apply_patch(model, **CORRECTED)
    patched, twin = run(model, given), copied(model)
    agentsd.remove_patch(model)
    assert torch.equal(run(twin, given), patched)
    agentsd.remove_patch(twin)
    assert torch.equal(run(twin, given), plain)


def test_the_whole_is_one_graph():
    model, given = made(SD3)
    agentsd.apply_patch(model, **CORRECTED)
    expected = run(model, given)
    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True), given), expected)


def test_blocks_are_one_graph_each():
    tiny = TINY[FLUX]
    model, given = tiny.make(), tiny.call(*SIZE)
    plain = run(model, given)
    agentsd.apply_patch(model, **CORRECTED)
    expected = run(model, given)
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model, given), expected)
    torch.testing.assert_close(run(model, tiny.call(12, 14)).shape, (2, 168, 4))
    agentsd.remove_patch(model)
    torch.testing.assert_close(run(model, given), plain)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_pipelines_take_a_tuning_and_a_patch_and_give_it_back(name, every_gain_counts):
    flux = name == "FluxPipeline"
    transformer = TINY[FLUX if flux else SD3].make()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=1,
        latent_channels=1 if flux else 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    parts = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")[: 3 - flux]}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)
    pipe = getattr(diffusers, name)(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    # of two prompts
    given = {"prompt_embeds": torch.randn(2, TEXT, 32), "pooled_prompt_embeds": torch.randn(2, 32 if flux else 64)}
    given |= {} if flux else {f"negative_{key}": -value for key, value in given.items()}
    given |= {"height": 320, "width": 288, "num_inference_steps": 4, "output_type": "latent"}

    def picture():
        return pipe(**given, generator=torch.Generator().manual_seed(1))[0]

    with agentsd.record_calls(pipe, 2) as calls:
        plain = picture()
    tuning = agentsd.tune(pipe, calls, 0.5)
    assert tuning.size == (40, 36)
    assert [each.progress for each in tuning.plan.deviations] == pytest.approx([0, 1 - pipe.scheduler.sigmas[3].item()])
    assert 0 < tuning.measured <= 0.5
    with agentsd.patched(pipe, tuning=tuning.text):
        assert not torch.equal(picture(), plain)
        assert get_patch(pipe).notes == {}
    assert agentsd.apply_patch(pipe, **CORRECTED, rules=[Rule(None, since=0.45)]) is pipe
    patched = picture()
    report = get_patch(pipe).report()
    assert get_patch(pipe).notes == {}
    assert {layer.size for layer in report} == {SIZE}
    assert all(layer.calls == report[0].calls and set(layer.calls) == {"corrected", "untouched"} for layer in report)
    agentsd.remove_patch(pipe)
    assert (patched - plain).abs().max() > 1e-4
    assert torch.equal(picture(), plain)
