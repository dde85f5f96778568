"""The methods that the speed benchmarks compare; each installs something on a U-Net and removes it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import agentsd
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.hosts import Call, Seam, find_sites
from agentsd.patching.joint import make_patch
from agentsd.patching.patch import alone
from agentsd.settings import DEFAULTS, to_config

from .attentions import Attention
from .peers import Attend, downsampled

# A method is installed on a U-Net within a `with` block.
Install = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """One row of the table, by its label."""

    label: str
    install: Install


def patched(config: agentsd.AgentConfig) -> Install:
    return lambda unet: alone(unet, make_patch(unet, config))


def check(unet: nn.Module) -> None:
    """A RuntimeError says that a patch on the U-Net stood down: it is not what was measured."""
    patch = agentsd.get_patch(unet)
    if patch is not None and patch.notes:
        raise RuntimeError(f"the patch stood down: {', '.join(patch.notes)}")


def _by_handler(answer: Callable[[nn.Module, Seam, Call], Tensor], deepest: int) -> Install:
    """Replace every self-attention down to a level by what `answer` makes of its call."""

    @contextmanager
    def install(unet: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for site in find_sites(unet):
                if site.downsample is not None and site.downsample <= deepest:
                    seam = site.seam()
                    stack.callback(seam.remove)
                    seam.install(partial(answer, site.block.attn1, seam))
            yield

    return install


def _limit(attn: nn.Module, seam: Seam, call: Call) -> Tensor:
    """The four projections and nothing between them: out = to_out(to_v(x)), with to_q and to_k computed."""
    attn.to_q(call.x)
    attn.to_k(call.x)
    return seam.project_out(attn.to_v(call.x))


def _tiles(attn: nn.Module, seam: Seam, call: Call) -> Tensor:
    """Full attention within tiles of a square image (HyperTile): two or more along each axis, of at most 32 tokens."""
    side = math.isqrt(call.x.shape[1])
    count = max(2, -(-side // 32))
    sides = {"rows": count, "columns": count, "y": side // count, "x": side // count}  # einops raises where they differ
    x = rearrange(call.x, "b (rows y columns x) c -> (b rows columns) (y x) c", **sides)
    q, k, v = (split_heads(to(x), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    out = seam.project_out(join_heads(scaled_dot_product_attention(q, k, v)))
    return rearrange(out, "(b rows columns) (y x) c -> b (rows y columns x) c", **sides)


def _peer(attend: Attend, attn: nn.Module, seam: Seam, call: Call) -> Tensor:
    """A peer's answer, for a square image."""
    q, k, v = (split_heads(to(call.x), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    side = math.isqrt(call.x.shape[1])
    return seam.project_out(join_heads(attend(Attention(q, k, v, (side, side)))))


def tomesd(ratio: float, deepest: int) -> Install:
    """The tomesd library; anything that it leaves behind is removed."""

    @contextmanager
    def install(unet: nn.Module) -> Iterator[None]:
        import tomesd

        before = {module: (module.__class__, set(module.__dict__)) for module in unet.modules()}
        try:
            tomesd.apply_patch(unet, ratio=ratio, max_downsample=deepest)
            yield
        finally:
            tomesd.remove_patch(unet)
            for module, (cls, names) in before.items():
                module.__class__ = cls
                for name in set(module.__dict__) - names:
                    delattr(module, name)

    return install


def todo(s: int) -> Install:
    """ToDo, for closeness: all keys are projected, where its own code takes few."""
    return _by_handler(partial(_peer, downsampled(s)), 1)


# agent_ratio for cells of 8×8 and of 4×4 tokens
CELL_8, CELL_4 = 1 - 1 / 64, 1 - 1 / 16


def methods(deepest: int = 1) -> dict[str, Method]:
    """All methods by name, on a U-Net's layers down to level `deepest`: the largest are level 1 in SD 1, 2 in SDXL."""

    def ours(**settings: Any) -> Install:
        return patched(agentsd.AgentConfig(**{"max_downsample": deepest, **settings}))

    def whole(**settings: Any) -> Install:
        """Merging no tokens: no partition is drawn."""
        return ours(ratio=0.0, use_rand=False, **settings)

    cells_4 = {"method": "corrected", "agent_ratio": CELL_4}
    return {
        "sdpa": Method("SDPA, unpatched", nullcontext),
        "limit": Method("limit: nothing between the projections", _by_handler(_limit, deepest)),
        "idle": Method("patch installed, every layer left alone", whole(agent_source="grid", min_tokens=10**6)),
        "panel": Method("the panel's defaults", patched(to_config({**DEFAULTS, "enabled": True}))),
        "grid8": Method("grid agents, 8×8 cells", whole(agent_source="grid", agent_ratio=CELL_8)),
        "grid4": Method("grid agents, 4×4 cells", whole(agent_source="grid", agent_ratio=CELL_4)),
        "corrected8": Method("corrected agents, 8×8 cells", whole(method="corrected", agent_ratio=CELL_8)),
        "corrected4": Method("corrected agents, 4×4 cells", whole(**cells_4)),
        "opened4": Method("corrected, 4×4, 14 % exact", whole(**cells_4, exact_ratio=0.14)),
        "pool2": Method("keys and values pooled 2×2", whole(method="pool", sx=2, sy=2)),
        "similarity": Method("similarity agents, queries kept", ours(ratio=0.0)),
        "paper": Method("AgentSD's settings (similarity, .4, .95, 4×4)", ours()),
        "merge.5": Method("token merging .5 (ours)", ours(**{**agentsd.TOKEN_MERGING, "ratio": 0.5})),
        "tomesd.4": Method("tomesd .4", tomesd(0.4, deepest)),
        "tomesd.5": Method("tomesd .5", tomesd(0.5, deepest)),
        "tiles": Method("tiles of at most 32×32 tokens", _by_handler(_tiles, deepest)),
    }
