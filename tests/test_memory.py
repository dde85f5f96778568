"""What a method holds in memory, and that it never waits for the device: on tensors that have no values."""

import pytest
import torch
from blocks import Recorder, inputs, run
from kinds import KINDS, SIMILARITY
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
import agentsd.attention.corrected
from agentsd import AgentConfig, plan_layer
from agentsd.attention import merging
from agentsd.methods import SelfAttention

NINE = {"agent_ratio": 0.9375, "ratio": 0.0}
METHODS = {
    "AgentSD's settings": {},
    "token merging": {"method": "merge"},
    "grid agents": {**NINE, "agent_source": "grid"},
    "pooled keys and values": {"method": "pool", "sx": 2, "sy": 2, "ratio": 0.0},
    "corrected agents": {**NINE, "method": "corrected"},
    "corrected agents, open cells": {**NINE, "method": "corrected", "exact_ratio": 0.14},
    "corrected agents, as many as may be": {**NINE, "method": "corrected", "exact_ratio": 0.4, "max_agents": 2000},
}


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {StorageWeakRef(t.untyped_storage()).cdata for t in given}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.given:
                    self.live[ref.cdata] = ref, storage.nbytes()
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def fused(q, k, v, attn_mask=None, scale=None):
    """What fused attention leaves in memory: its result, laid out by tokens."""
    return q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def peak(settings, size, dtype, monkeypatch) -> int:
    """Bytes of one layer of SD 1's widest, batch 2, 8 heads of 40, or of full attention where `settings` is None."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(agentsd.attention.corrected, "sdpa", fused)
    monkeypatch.setattr(merging, "_BAG_DEVICES", ("meta",))  # as on CUDA
    config = AgentConfig(**settings or {"ratio": 0.0})
    plan = plan_layer(config, *size, 1)
    x = torch.empty(2, size[0] * size[1], 320, dtype=dtype, device="meta")

    def project(x):
        return tuple(torch.empty_like(x) for _ in range(3))

    def full(x):
        q, k, v = (t.unflatten(2, (8, 40)).transpose(1, 2) for t in project(x))
        return fused(q, k, v).transpose(1, 2).flatten(2).clone()

    with torch.no_grad(), Live(x) as live:
        if settings is None:
            full(x)
            return live.peak
        matching = None
        if plan.r or plan.agent_r:
            cells = merging.partition(*size, config.sx, config.sy, 0).to(torch.device("meta"))
            matching = merging.match(x, cells, plan.r, plan.agent_r)
        # nobody wraps the projections
        given = x, plan, config, size, 8, matching, lambda: False, project, torch.empty_like, torch.clone, full
        plan.method.attend(SelfAttention(*given))
    return live.peak


SIZES = [(64, 64), (192, 128), (250, 256), (256, 256)]
# P of one head is a matrix: 2000 agents of 65,536 tokens take 500 MiB by themselves, and are never taken unasked
BOUNDED = [(name, size) for name in METHODS for size in SIZES if "max_agents" not in METHODS[name] or size[1] < 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "size"), BOUNDED)
def test_300_mib_beyond_full_attention_at_most(name, size, dtype, monkeypatch):
    plain, ours = (peak(settings, size, dtype, monkeypatch) for settings in (None, METHODS[name]))
    assert plain > 0
    assert ours <= plain + 300 * 2**20


# What waits for the device: reading a value, or making a tensor whose size depends on values
WAITS = ("_local_scalar_dense", "item", "nonzero", "bincount", "unique", "_unique2", "masked_select", "equal")


@pytest.mark.parametrize("name", {**KINDS, **METHODS})
def test_no_method_waits_for_the_device(name, flat):
    """The timestep alone is read, once a call, where a partition is drawn for it."""
    settings = {**KINDS, **METHODS}[name]
    unet, given = flat, inputs(1, 48, 40)
    with agentsd.patched(unet, **settings):
        run(unet, given)
        with Recorder() as seen:
            run(unet, given)
        assert not agentsd.get_patch(unet).notes
    draws = settings.get("ratio", SIMILARITY["ratio"]) > 0 or name in ("similarity", "merging")
    assert sum(op in WAITS for op in seen.ops) <= draws
