"""Half precision, autocast, and attention in float32."""

import pytest
import torch
from blocks import HALVES, attention_calls, blocks_of, run, transformers_of
from kinds import GRID, MERGING, of
from patching import EXAMPLE, attention_dtypes, patched_output


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _host_precision(self, monkeypatch):
        # LDM's own attention mixes its float32 scores with half-precision values otherwise, and fails
        monkeypatch.setattr("ldm.modules.attention._ATTN_PRECISION", "fp16")

    @staticmethod
    def halve(unet, dtype):
        """Transformers with weights in `dtype`, between convolutions in float32."""

        def to_half(module, args, kwargs):
            return tuple(a.to(dtype) for a in args), {k: v.to(dtype) for k, v in kwargs.items()}

        for module in transformers_of(unet):
            module.to(dtype)
            module.register_forward_pre_hook(to_half, with_kwargs=True)
            module.register_forward_hook(lambda module, args, out: out.float())

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("precision", [None, "fp32"])
    @pytest.mark.parametrize(("halved", "autocast"), [(True, False), (False, True), (True, True)])
    @of("grid", "similarity", "merging", "pool")
    def test_half_weights_and_autocast(self, unet, dtype, precision, halved, autocast, kw):
        expected, plain = patched_output(unet, EXAMPLE, **kw), run(unet, EXAMPLE)
        if halved:
            self.halve(unet, dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast), attention_dtypes() as dtypes:
            out = patched_output(unet, EXAMPLE, attn_precision=precision, **kw)
        assert set(dtypes) <= {torch.float32 if precision else dtype}
        assert bool(dtypes) == (kw is not MERGING)
        # half-precision rounding may pair some tokens otherwise; most of the picture must agree
        assert (out - expected).square().mean().sqrt() < 0.3 * (plain - expected).square().mean().sqrt()

    @of("grid", "similarity")
    @pytest.mark.parametrize("dtype", HALVES[1:])
    def test_fp32_where_float16_would_overflow(self, unet, kw, dtype):
        with torch.no_grad():
            for block in (blocks_of(unet)[0], *blocks_of(unet)[5:]):  # level 0, where attention is ours
                block.attn1.to_q.weight.mul_(300)
                block.attn1.to_k.weight.mul_(300)
        self.halve(unet, dtype)
        attn = blocks_of(unet)[0].attn1
        with attention_calls(attn) as seen:
            out = patched_output(unet, EXAMPLE, attn_precision="fp32", **kw)
        assert (attn.to_q(seen[0][0]) @ attn.to_k(seen[0][0]).mT).isinf().any()
        assert out.isfinite().all()

    def test_fp32_on_a_device_without_autocast(self, unet, monkeypatch):
        """torch.autocast raises for device types that it doesn't know, such as MPS before PyTorch 2.5."""
        expected = patched_output(unet, EXAMPLE, attn_precision="fp32", **GRID)

        def unknown(device_type, *args, **kwargs):
            raise RuntimeError(f"User specified an unsupported autocast device_type '{device_type}'")

        monkeypatch.setattr(torch, "autocast", unknown)
        assert torch.equal(patched_output(unet, EXAMPLE, attn_precision="fp32", **GRID), expected)
