"""What every method does with tokens: heads, and pooling over the cells of a grid."""

from collections import Counter

import pytest
import torch
from blocks import HALVES, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from patching import patched_output

from agentsd.attention.grid import landmark_places
from agentsd.attention.tensors import add_scaled, attention_by, lost_by_pooling, pool_tokens
from agentsd.attention.tensors import scaled_dot_product_attention as sdpa
from agentsd.methods import METHODS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class TestHeads:
    def test_add_scaled_keeps_what_autograd_needs(self):
        out, v = torch.randn(3, requires_grad=True), torch.ones(3)
        y = out.exp()
        assert add_scaled(y, v, 0.0) is y
        total = add_scaled(y, v, 0.5)
        torch.testing.assert_close(total, y + 0.5)
        total.sum().backward()
        torch.testing.assert_close(out.grad, out.detach().exp())
        assert add_scaled(v, v, 0.5) is v


class TestAHostsKernel:
    """A host's own attention is used instead of PyTorch's, wherever it can do the same."""

    @staticmethod
    def kernel(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v

    @pytest.mark.parametrize("scale", [None, 0.575])
    def test_it_is_asked_at_any_scale_but_for_no_mask(self, scale):
        q, k, v = torch.randn(3, 2, 4, 16, 8)
        mask = torch.randn(1, 4, 1, 16)  # which a fast kernel may disregard
        expected, masked, asked = sdpa(q, k, v, scale=scale), sdpa(q, k, v, mask), []
        with attention_by(lambda *tensors: asked.append(1) or self.kernel(*tensors)):
            with pytest.raises(RuntimeError), attention_by(self.kernel):  # an error puts the one before back
                raise RuntimeError
            torch.testing.assert_close(sdpa(q, k, v, scale=scale), expected, **CLOSE)
            assert torch.equal(sdpa(q, k, v, mask), masked)
        sdpa(q, k, v, scale=scale)
        assert asked == [1]

    # the keys of corrected agents have a channel of biases, −∞ among them, which a kernel that rounds keys cannot take
    @pytest.mark.parametrize("method", [name for name in METHODS if name != "corrected"])
    def test_every_method_asks_it(self, method, unet):
        settings = {"method": method, "agent_source": "grid", "ratio": 0.0 if method != "merge" else 0.4}
        settings |= {"agent_ratio": 0.75, "sx": 2, "sy": 2}
        given = inputs(height=64, width=64)
        expected = patched_output(unet, given, **settings)
        asked = []
        with attention_by(lambda *tensors: asked.append(tensors) or self.kernel(*tensors)):
            out = patched_output(unet, given, **settings)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        # merging lets the host make its own call
        assert bool(asked) == (method != "merge")


class TestPooling:
    @settings(max_examples=60)
    @given(h=st.integers(1, 20), w=st.integers(1, 20), sy=st.integers(1, 32), sx=st.integers(1, 32))
    def test_pooling_averages_each_cell_over_what_it_has(self, h, w, sy, sx):
        x = torch.randn(2, h * w, 3)
        image = x.view(2, h, w, 3)
        expected = [
            image[:, top : top + sy, left : left + sx].mean((1, 2))
            for top in range(0, h, sy)
            for left in range(0, w, sx)
        ]
        pooled = pool_tokens(x, h, w, (sy, sx))
        torch.testing.assert_close(pooled, torch.stack(expected, 1), **CLOSE)
        lost = lost_by_pooling(x, pooled, h, w, (sy, sx))
        for i in range(h * w):
            cell = (i // w // sy) * -(-w // sx) + i % w // sx
            torch.testing.assert_close(lost[:, i], x[:, i] - expected[cell], **CLOSE)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("h", [8, 7])
    def test_pooling_in_half_precision(self, dtype, h):
        x = torch.randn(1, h * 8, 4)
        pooled = pool_tokens(x.to(dtype), h, 8, (4, 4))
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled.float(), pool_tokens(x, h, 8, (4, 4)), rtol=0.02, atol=0.02)


class TestLandmarks:
    @pytest.mark.parametrize(("height", "width", "cell"), [(8, 8, 4), (9, 7, 4), (3, 10, 4), (1, 5, 2), (6, 6, 1)])
    def test_every_cell_has_one_of_its_tokens(self, height, width, cell):
        found = [(y // cell, x // cell) for y, x in landmark_places((height, width), (cell, cell))]
        assert found == [(y, x) for y in range(-(-height // cell)) for x in range(-(-width // cell))]

    def test_each_place_in_a_cell_is_taken_equally_often(self):
        assert Counter(Counter((y % 4, x % 4) for y, x in landmark_places((32, 32), (4, 4))).values()) == {4: 16}
