"""What the tests of the patch share: settings of each kind, and what they look at in a patched U-Net."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from blocks import attention_calls, blocks_of, flat_unet, golden_unet, inputs, run, tree
from torch import Tensor, nn

from agentsd import get_patch, patched
from agentsd.hosts import output_tensor, weight_of
from agentsd.schedule import MAX_TIMESTEP

EXAMPLE = inputs(2, 12, 12)
CHANGED = 1e-2  # what patching changes at least, in an output of about 1
GOLDEN, FLAT = golden_unet(), flat_unet()


def diffusers_unet(name: str, **layout: Any) -> nn.Module:
    """One of the tiny U-Nets of diffusers; a test that asks for it is skipped where there is no diffusers."""
    import tiny_pipelines

    return getattr(tiny_pipelines, name)(**layout)


UNETS = {"LDM": lambda: copy.deepcopy(GOLDEN), "diffusers": lambda: diffusers_unet("tiny_unet")}


def example_call(unet: Any, height: int, width: int, progress: float, rows: int = 2) -> Any:
    """(args, kwargs) of a call of any host's U-Net on noise, the same every time; `rows` are those of its batch."""
    generator, weight, more = torch.Generator().manual_seed(0), weight_of(unet), {}

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(weight)

    prompt = noise(77, next(m for name, m in unet.named_modules() if name.endswith("attn2.to_k")).in_features)
    if hasattr(unet, "add_embedding"):  # SDXL of diffusers
        ids = 6  # original size, crop and target size, two numbers each
        pooled = unet.add_embedding.linear_1.in_features - ids * unet.config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(ids)}
    channels = next(m for m in unet.modules() if isinstance(m, nn.Conv2d)).in_channels
    t = torch.full((rows,), MAX_TIMESTEP * (1 - progress), device=weight.device)
    return (noise(channels, height, width), t, prompt), more


@torch.no_grad()
def answer(
    unet: nn.Module, height: int = 16, width: int = 16, progress: float = 0.5, t: float | None = None, **more: Any
) -> Tensor:
    """The output of any host's U-Net for the example call of this size at a progress, or at timestep t to the bit."""
    (x, timesteps, prompt), given = example_call(unet, height, width, progress, **more)
    timesteps = timesteps if t is None else torch.full((len(timesteps),), float(t))
    return output_tensor(unet(x, timesteps, prompt, **given))


def at(t: Any) -> Any:
    """The example at timestep t, or at one for each row."""
    return EXAMPLE[0], torch.as_tensor(t).expand(2), EXAMPLE[2]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def changed(a: Tensor, b: Tensor) -> bool:
    """Whether one of two outputs is that of a patch."""
    return difference(a, b) > CHANGED


def pickled(model: nn.Module) -> nn.Module:
    """What is read of what was written."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@contextmanager
def undisturbed(unet: nn.Module) -> Iterator[Tensor]:
    """Asserts that the module tree and the answer after the block are those before it, and yields the answer."""
    before, out = tree(unet), answer(unet)
    yield out
    assert tree(unet) == before
    assert torch.equal(answer(unet), out)
    assert get_patch(unet) is None


def hooks_of(unet: nn.Module) -> dict[str, dict[str, int]]:
    """How many hooks of each kind each module has, and whether its `forward` is replaced."""
    return {
        name: {**{k: len(v) for k, v in seen.items() if "hooks" in k}, "forward": "forward" in seen}
        for name, (_, seen) in tree(unet).items()
    }


def patched_output(unet: nn.Module, example: Any, **kw: Any) -> Tensor:
    """The output under the patch, which must not have stood down anywhere."""
    with patched(unet, **kw):
        out = run(unet, example)
        assert not get_patch(unet).notes
    return out


@contextmanager
def calls_of(block: nn.Module) -> Iterator[Any]:
    """(input, output) of each call of attn1, attn2 and ff."""
    with attention_calls(block.attn1) as one, attention_calls(block.attn2) as two, attention_calls(block.ff) as ff:
        yield one, two, ff


@contextmanager
def attention_dtypes() -> Iterator[list[torch.dtype]]:
    """Collects what F.scaled_dot_product_attention is asked to compute in."""
    calls, original = [], F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert q.dtype == k.dtype == v.dtype
        calls.append(q.dtype)
        return original(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


def with_self_attention(unet: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Have each block call its self-attention by `call(attn1, x)`, as ControlNet does on the instance."""

    def forward(block: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = call(block.attn1, block.norm1(x)) + x
        x = block.attn2(block.norm2(x), context=context) + x
        return block.ff(block.norm3(x)) + x

    for block in blocks_of(unet):
        block._forward = partial(forward, block)
