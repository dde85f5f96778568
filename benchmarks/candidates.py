"""Methods of self-attention that the zoo compares: the product's, through its planner and its own code, and others'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from agentsd.attention.merging import match, partition
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.config import AgentConfig
from agentsd.methods import SelfAttention
from agentsd.plan import plan_layer

from .attentions import Attention
from .peers import KEPT, Attend, block_sparse, downsampled, full, monarch, nystrom, tiles, tomesd, top_keys


@dataclass(frozen=True)
class Candidate:
    """One method with its settings; see `peers` for what it answers."""

    label: str
    family: str  # methods that differ in price only; the plot joins them
    attend: Attend
    ours: bool = False  # this product's own contribution
    timed: bool = True  # its price is its seconds; otherwise `attend` returns an ideal one, or there is none


@dataclass(frozen=True)
class Product:
    """A method of the product, as the patch would run it in one layer of this size.

    Clusters are matched by keys: there are no tokens here to match.
    """

    config: AgentConfig

    def __call__(self, at: Attention) -> Tensor | None:
        config, plan = self.config, plan_layer(self.config, *at.size, 1)
        if not plan.acts:
            return None
        clustered = bool(plan.r or plan.agent_r)
        cells = partition(*at.size, config.sx, config.sy, seed=0) if clustered else None
        matching = match(at.tokens[1], cells, plan.r, plan.agent_r) if clustered else None
        what = plan, config, at.size, at.heads, matching
        call = SelfAttention.projected(at.tokens, what, lambda: join_heads(full(at)))
        return split_heads(plan.method.attend(call), at.heads)

    def ideal(self, size: tuple[int, int], channels: int) -> float:
        """The price by products alone: FLOPs of attention and fit over those of full attention."""
        plan = plan_layer(self.config, *size, 1)
        N, projections = plan.tokens, 8 * plan.tokens * channels**2
        return (plan.method.flops(plan, channels) - projections) / (4 * N * N * channels)


def product(**settings: Any) -> Product:
    return Product(AgentConfig(**{"ratio": 0.0, **settings}))


_ideal = partial(Candidate, timed=False)
FULL = "full"
CANDIDATES: dict[str, Candidate] = {
    FULL: Candidate("SDPA", "full attention", full),
    **{
        f"corrected{s}-{exact:g}": Candidate(
            f"corrected {s}×{s}, {exact:.0%} exact",
            f"corrected {s}×{s}",
            product(method="corrected", agent_ratio=1 - s**-2, exact_ratio=exact),
            ours=True,
        )
        for s in (8, 4)
        for exact in (0.0, 0.04, 0.08, 0.14, 0.25, 0.4)
    },
    "agents": Candidate("grid agents 4×4", "agents", product(agent_source="grid", agent_ratio=1 - 4**-2)),
    "agentsd": Candidate("AgentSD 0.4/0.95", "agents", product(ratio=0.4, agent_ratio=0.95)),
    **{f"tomesd{ratio:.2g}": Candidate(f"tomesd {ratio:.2g}", "tomesd", tomesd(ratio)) for ratio in (0.25, 0.5, 0.75)},
    **{
        f"pool{s}": Candidate(f"K/V pooled {s}×{s}", "K/V pooled", product(method="pool", sx=s, sy=s, k_shortcut=0.0))
        for s in (2, 4)
    },
    "todo2": Candidate("ToDo 2×2", "ToDo", downsampled(2)),
    **{f"tiles{most}": Candidate(f"tiles of {most}", "tiles", tiles(most)) for most in (32, 16)},
    **{f"nystra{s}": Candidate(f"PnP-Nystra {s}×{s}", "PnP-Nystra", nystrom(s)) for s in (8, 4)},
    "nystrom": Candidate("Nyström 4×4, exact inverse", "PnP-Nystra, its ideal", nystrom(4, exact=True)),
    "sol-rows": _ideal("Sol-Attn, rows, τ 1", "Sol-Attn, rows", block_sparse(tau=1.0, tiled=False)),
    **{f"sol{tau:g}": _ideal(f"Sol-Attn, 8×8, τ {tau:g}", "Sol-Attn", block_sparse(tau=tau)) for tau in (2, 1, 0.5)},
    "sol-salient": _ideal("Sol-Attn, 8×8, 256 salient", "Sol-Attn, salient", block_sparse(tau=1.0, salient=256)),
    **{
        f"pisa{kept:g}": _ideal(f"PISA, 8×8, {kept:.0%}", "PISA", block_sparse(kept=kept, rest="first order"))
        for kept in (0.15, 0.3)
    },
    "drop": _ideal("keep or drop, 8×8, 30%", "keep or drop", block_sparse(kept=0.3, rest="")),
    **{f"monarch{steps}": _ideal(f"Monarch, {steps} steps", "Monarch", monarch(steps)) for steps in (2, 3)},
    "top": Candidate(f"oracle: top {KEPT} keys", "oracle", top_keys, timed=False),
}
