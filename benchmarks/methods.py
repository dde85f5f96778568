"""The methods that the speed benchmark compares; each installs something on a U-Net and removes it again."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import agentsd
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.hosts import Call, Handler, Seam, find_sites
from agentsd.settings.table import DEFAULTS, to_config

# A context manager; it yields a function that raises RuntimeError if the method did not do what it is measured for.
Install = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: its name on the command line.
        label: its name in the table.
        install: installs it on a U-Net in a `with` block.
        limit: the limit that it is compared with; empty if there is none.
        calls: U-Net calls that one measurement averages over, more than 1 if not all calls cost the same.
        naive: whether it keeps an N × N matrix in memory.
        quadratic: whether its time grows with the square of N, as unpatched attention's does.
    """

    name: str
    label: str
    install: Install
    limit: str = ""
    calls: int = 1
    naive: bool = False
    quadratic: bool = False


def _no_check() -> None:
    pass


@contextmanager
def _unpatched(unet: nn.Module) -> Iterator[Callable[[], None]]:
    yield _no_check


@contextmanager
def _patched(unet: nn.Module, config: agentsd.AgentConfig) -> Iterator[Callable[[], None]]:
    patch = agentsd.patch_unet(unet, config)

    def check() -> None:
        if patch.notes:
            raise RuntimeError(f"the patch stood down: {', '.join(patch.notes)}")

    try:
        yield check
    finally:
        patch.remove()


def _ours(**settings: Any) -> Install:
    return partial(_patched, config=agentsd.AgentConfig(**settings))


def _panel(unet: nn.Module) -> Any:
    """The panel, switched on and otherwise as it is."""
    return _patched(unet, to_config({**DEFAULTS, "enabled": True}))


def _by_handler(make: Callable[[nn.Module, Seam], Handler], max_downsample: int = 8) -> Install:
    """Replace every self-attention down to a level by a handler."""

    @contextmanager
    def install(unet: nn.Module) -> Iterator[Callable[[], None]]:
        seams = []
        try:
            for site in find_sites(unet):
                if site.downsample is not None and site.downsample <= max_downsample:
                    seam = site.seam()
                    seam.install(make(site.block.attn1, seam))
                    seams.append(seam)
            yield _no_check
        finally:
            for seam in seams:
                seam.remove()

    return install


def _limit(attn: nn.Module, seam: Seam) -> Handler:
    """The four projections and nothing between them: out = to_out(to_v(x)), with to_q and to_k computed."""

    def handler(call: Call) -> Tensor:
        attn.to_q(call.x)
        attn.to_k(call.x)
        return seam.project_out(attn.to_v(call.x))

    return handler


def _tiles(attn: nn.Module, seam: Seam) -> Handler:
    """Full attention within tiles of a square image (HyperTile): two or more along each axis, of at most 32 tokens."""

    def handler(call: Call) -> Tensor:
        B, N, C = call.x.shape
        side = math.isqrt(N)
        count = max(2, -(-side // 32))
        tile = side // count
        if count * tile != side or side * side != N:
            raise ValueError(f"{N} tokens are no square that {count}×{count} tiles cover")
        x = call.x.view(B, count, tile, count, tile, C).transpose(2, 3).reshape(B * count * count, tile * tile, C)
        q, k, v = (split_heads(to(x), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        out = seam.project_out(join_heads(scaled_dot_product_attention(q, k, v)))
        return out.view(B, count, count, tile, tile, C).transpose(2, 3).reshape(B, N, C)

    return handler


def _naive(attn: nn.Module, seam: Seam) -> Handler:
    """softmax(Q Kᵀ) V as three operations."""

    def handler(call: Call) -> Tensor:
        q, k, v = (
            to(call.x).unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        weights = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        out = weights.softmax(dim=-1) @ v
        return seam.project_out(out.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2))

    return handler


def _foreign(package: Any, **settings: Any) -> Install:
    """A package with apply_patch and remove_patch; anything that it leaves behind is removed."""

    @contextmanager
    def install(unet: nn.Module) -> Iterator[Callable[[], None]]:
        before = {module: (module.__class__, set(module.__dict__)) for module in unet.modules()}
        # such packages recognise a diffusers model by its class, and find the U-Net of an LDM model by its path
        model = unet if hasattr(unet, "down_blocks") else _LatentDiffusion(unet)
        try:
            package.apply_patch(model, **settings)
            yield _no_check
        finally:
            package.remove_patch(model)
            for module, (cls, names) in before.items():
                module.__class__ = cls
                for name in set(module.__dict__) - names:
                    delattr(module, name)

    return install


class _LatentDiffusion(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = unet


def _tomesd(ratio: float, **settings: Any) -> Install:
    def install(unet: nn.Module) -> Any:
        import tomesd

        return _foreign(tomesd, ratio=ratio, **settings)(unet)

    return install


def peer(folder: Path, settings: dict[str, Any], name: str) -> Method:
    """A method from a folder that is a Python package with apply_patch and remove_patch.

    Raises:
        ValueError: the folder is no such package.
    """
    init = folder / "__init__.py"
    if not init.is_file():
        raise ValueError(f"--peer must be the folder of a Python package, got {folder}")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    for function in ("apply_patch", "remove_patch"):
        if not hasattr(package, function):
            raise ValueError(f"--peer must be a package with {function}, {folder} has none")
    label = f"peer {folder.name} " + ", ".join(f"{k} {v}" for k, v in settings.items())
    install = _foreign(package, **settings)
    return Method(f"peer:{folder.name}", label.strip(), install, naive=True, quadratic=True)


# Merge no tokens: no partition is drawn, and nothing waits for the device to read the timestep.
WHOLE: dict[str, Any] = {"ratio": 0.0, "use_rand": False}
# agent_ratio for cells of 8×8 and of 4×4 tokens.
CELL_8, CELL_4 = 1 - 1 / 64, 1 - 1 / 16
# A stage that leaves the model untouched throughout: the patch is installed, and idle.
NEVER = (agentsd.Stage(1.0, None),)


def _grid(agent_ratio: float, **settings: Any) -> Install:
    return _ours(**WHOLE, agent_source="grid", agent_ratio=agent_ratio, **settings)


def _corrected(agent_ratio: float) -> Install:
    return _ours(**WHOLE, method="corrected", agent_ratio=agent_ratio)


METHODS = {
    method.name: method
    for method in (
        Method("sdpa", "SDPA, unpatched", _unpatched, quadratic=True),
        Method("limit", "limit: nothing between the projections", _by_handler(_limit, 1)),
        Method("limit2", "limit, two levels", _by_handler(_limit, 2)),
        Method("limit4", "limit, three levels", _by_handler(_limit, 4)),
        Method("limit8", "limit, all levels", _by_handler(_limit, 8)),
        Method("naive", "naive attention", _by_handler(_naive), naive=True, quadratic=True),
        Method("idle", "patch installed, stage inactive", _grid(CELL_8, stages=NEVER)),
        Method("grid8", "grid agents, 8×8 cells", _grid(CELL_8), "limit"),
        Method("grid4", "grid agents, 4×4 cells", _grid(CELL_4), "limit"),
        Method("grid8d2", "grid agents, 8×8 cells, two levels", _grid(CELL_8, max_downsample=2), "limit2"),
        Method("grid4d2", "grid agents, 4×4 cells, two levels", _grid(CELL_4, max_downsample=2), "limit2"),
        Method("grid8d4", "grid agents, 8×8 cells, three levels", _grid(CELL_8, max_downsample=4), "limit4"),
        Method("panel", "the panel's defaults, while their stage lasts", _panel),
        Method("grid64", "grid agents, at most 64", _grid(CELL_8, max_agents=64), "limit"),
        Method(
            "grid64d8",
            "grid agents, at most 64, all levels",
            _grid(CELL_8, max_agents=64, max_downsample=8),
            "limit8",
        ),
        Method("grid256", "grid agents, at most 256", _grid(CELL_4, max_agents=256), "limit"),
        Method("paper", "AgentSD's settings (similarity, .4, .95, 4×4)", _ours(), "limit"),
        Method(
            "reuse",
            "AgentSD's settings, clusters shared, and reused in every second call",
            _ours(share_match=True, reuse_match=0.1),
            "limit",
            calls=2,
        ),
        Method("similarity", "similarity agents, .95, 4×4, queries kept", _ours(ratio=0.0), "limit"),
        Method("corrected8", "corrected agents, 8×8 cells", _corrected(CELL_8), "limit"),
        Method("corrected4", "corrected agents, 4×4 cells", _corrected(CELL_4), "limit"),
        Method("merge.3", "token merging .3 (ours)", _ours(**{**agentsd.TOKEN_MERGING, "ratio": 0.3}), "limit"),
        Method("merge.5", "token merging .5 (ours)", _ours(**{**agentsd.TOKEN_MERGING, "ratio": 0.5}), "limit"),
        Method("pool2", "keys and values pooled 2×2", _ours(**WHOLE, method="pool", sx=2, sy=2), "limit"),
        Method("pool4", "keys and values pooled 4×4", _ours(**WHOLE, method="pool", sx=4, sy=4), "limit"),
        Method("tomesd.3", "tomesd .3", _tomesd(0.3), quadratic=True),
        Method("tomesd.4", "tomesd .4", _tomesd(0.4), quadratic=True),
        Method("tomesd.5", "tomesd .5", _tomesd(0.5), quadratic=True),
    )
}


def on_largest(downsample: int) -> dict[str, Method]:
    """Methods on a U-Net's largest self-attention layers, which are at level `downsample`: 1 in SD 1, 2 in SDXL."""
    level: dict[str, Any] = {"max_downsample": downsample}
    whole = {**WHOLE, **level}

    def cells(label: str, ratio: float, **settings: Any) -> Method:
        return Method("", label, _ours(**whole, agent_ratio=ratio, **settings), "limit")

    rows = {
        "sdpa": Method("", "SDPA, unpatched", _unpatched, quadratic=True),
        "limit": Method("", "limit: nothing between the projections", _by_handler(_limit, downsample)),
        "grid4": cells("grid agents, 4×4 cells", CELL_4, agent_source="grid"),
        "grid8": cells("grid agents, 8×8 cells", CELL_8, agent_source="grid"),
        "corrected4": cells("corrected agents, 4×4 cells", CELL_4, method="corrected"),
        "corrected8": cells("corrected agents, 8×8 cells", CELL_8, method="corrected"),
        "local": cells("local attention", CELL_4, method="local"),
        "pool2": Method("", "keys and values pooled 2×2", _ours(**whole, method="pool", sx=2, sy=2), "limit"),
        "paper": Method("", "AgentSD's settings", _ours(**level), "limit"),
        "similarity": Method("", "similarity agents, queries kept", _ours(ratio=0.0, **level), "limit"),
        "merge.5": Method(
            "", "token merging 0.5 (ours)", _ours(**{**agentsd.TOKEN_MERGING, "ratio": 0.5}, **level), "limit"
        ),
        "tomesd.5": Method("", "tomesd 0.5", _tomesd(0.5, **level), quadratic=True),
        "tiles": Method("", "tiles of at most 32×32 tokens", _by_handler(_tiles, downsample), "limit"),
        "idle": Method("", "patch installed, stage inactive", _ours(**whole, agent_source="grid", stages=NEVER)),
    }
    return {name: replace(row, name=name) for name, row in rows.items()}
