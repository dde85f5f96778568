"""Tuning diffusers' models: whole pipelines, outputs of each kind, and plans that LDM and diffusers share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")

from blocks import tree
from tiny_pipelines import ldm_and_diffusers, picture, run, tiny_sd, tiny_sdxl, tiny_unet, unet_inputs
from tuned_models import TRY

import agentsd
from agentsd import Tuning
from agentsd.tuning.fingerprint import adapters_of, agree, ordered_sites, structure_of, weights_of


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_pipeline_is_recorded_tuned_and_patched(make, every_gain_counts):
    pipe = make()
    with agentsd.record_calls(pipe, 2) as calls:
        plain = picture(pipe)
    before = tree(pipe.unet)
    tuning = agentsd.tune(pipe, calls, 0.5, methods=TRY)
    assert tree(pipe.unet) == before
    assert tuning.measured <= 0.5
    with agentsd.patched(pipe, tuning=tuning):
        ours = picture(pipe)
        assert not agentsd.get_patch(pipe).notes
    assert not torch.equal(plain, ours)
    assert torch.equal(picture(pipe), plain)
    with agentsd.patched(pipe, tuning=Tuning.from_text(tuning.text)):
        assert torch.equal(picture(pipe), ours)


def test_ldm_and_diffusers_are_one_model_and_share_plans(every_gain_counts):
    ldm, unet = ldm_and_diffusers()
    assert structure_of(ordered_sites(ldm)) == structure_of(ordered_sites(unet))
    assert agree(weights_of(ldm), weights_of(unet))
    tuning = agentsd.tune(unet, [((), unet_inputs(unet, t=t)) for t in (900, 300)], 0.3, methods=TRY)
    given = unet_inputs(unet, t=900)
    with torch.no_grad(), agentsd.patched(unet, tuning=tuning), agentsd.patched(ldm, tuning=tuning):
        theirs = run(unet, **given)
        ours = ldm(given["sample"], given["timestep"][None].expand(2), context=given["encoder_hidden_states"])
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert set("".join(tuning.choices)) != {"."}


def test_weights_that_are_not_in_memory_are_not_compared():
    away = weights_of(tiny_unet().to("meta"))
    assert agree(away, weights_of(tiny_unet()))


@pytest.mark.parametrize("fused", [False, True])
def test_a_lora_is_seen_fused_or_not(fused):
    pytest.importorskip("peft")
    from peft import LoraConfig

    unet = tiny_unet()
    before = weights_of(unet), adapters_of(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    beside = adapters_of(unet)
    if fused:
        unet.fuse_lora()
    assert agree(before[0], weights_of(unet))
    assert not agree(before[1], adapters_of(unet))
    assert agree(beside, adapters_of(unet))


def test_an_adapter_that_is_no_lora_costs_no_tuning():
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    before = adapters_of(unet)
    unet.add_adapter(peft.LoHaConfig(r=2, target_modules=["to_q"]))
    assert agree(before, adapters_of(unet))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_tuned_and_takes_the_tuning_of_the_one_it_was(every_gain_counts, bits):
    quantization = pytest.importorskip("torchao.quantization")
    unet = tiny_unet()
    calls = [((), unet_inputs(unet, t=t)) for t in (900, 300)]
    before = agentsd.tune(unet, calls, 0.5, methods=TRY)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"))
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig() if bits == 8 else config)
    after = agentsd.tune(unet, calls, 0.5, methods=TRY)
    assert 0 < after.measured <= 0.5
    plain = run(unet, **calls[0][1])
    for tuning in (before, after):
        with agentsd.patched(unet, tuning=tuning):
            assert not torch.equal(run(unet, **calls[0][1]), plain)
            assert not agentsd.get_patch(unet).notes
