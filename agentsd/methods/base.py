"""What a method of self-attention is, and the registry of all methods.

A method is one file in this folder: a subclass of `Method` under `@register`. It says what it would do with a grid of
tokens, does it, counts its FLOPs, names itself in a sentence and marks tokens for the token map. Nothing else knows it.

Importing a method loads no torch: what computes imports it where it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from ..merging import Clusters, Matching

UNTOUCHED = "untouched"


class Settings(Protocol):
    """The settings that methods read: `agentsd.AgentConfig`, which says what each means."""

    ratio: float
    sx: int
    sy: int
    agent_ratio: float
    k_scale2: float
    k_shortcut: float
    agent_source: str
    max_agents: int | None
    attn_precision: str | None


@dataclass(frozen=True)
class LayerPlan:
    """What a config does to one transformer block.

    Attributes:
        action: what happens in self-attention: "agents", "merge", "pool", "corrected" … or "untouched".
        tokens: N, the number of tokens of the layer.
        queries: number of queries that attention is computed for.
        agents: n, the number of agent tokens, or of pooled or sampled keys; 0 where there are none.
        cell: (height, width) of the cell in tokens that each stands for; None where there is none.
        r: tokens merged away, in whatever parts of the block are merged.
        agent_r: tokens merged away to make similarity agents.
        reason: why self-attention is untouched; empty where it is not.
        shortfall: why less is done than was asked for, such as merging without agents; empty where it is not.
        remedy: names of the settings that would change either.
    """

    action: str
    tokens: int
    queries: int
    agents: int = 0
    cell: tuple[int, int] | None = None
    r: int = 0
    agent_r: int = 0
    reason: str = ""
    # words for people: two plans that do the same are equal
    shortfall: str = field(default="", compare=False)
    remedy: tuple[str, ...] = field(default=(), compare=False)

    @property
    def acts(self) -> bool:
        """Whether self-attention is changed."""
        return self.action != UNTOUCHED


def untouched(tokens: int, reason: str, *remedy: str, r: int = 0) -> LayerPlan:
    """The plan of a layer whose self-attention is left alone; `r` as in `LayerPlan`."""
    return LayerPlan(UNTOUCHED, tokens, tokens, r=r, reason=reason, remedy=remedy)


def too_many_agents(agents: int, queries: int) -> str:
    """Why agents are not used where they would not pay: AgentSD asks for 2 · n_agents < n_queries."""
    return f"{agents} agents are too many for {queries} queries (fewer than half are needed)"


@dataclass
class SelfAttention:
    """One call of a layer's self-attention, as a method sees it.

    Attributes:
        x: tokens (B, N, C), in row-major order.
        plan: what is to be done.
        settings: the settings that hold in this layer now.
        size: (height, width) of the grid of tokens.
        heads: number of heads H.
        matching: the clusters of merged tokens and of similarity agents; None where there are none.
        wrapped: whether somebody wraps the projections and may count on seeing all N tokens.
        project: queries, keys and values of tokens, by the host's own projections.
        project_q: queries of tokens.
        project_out: the host's output projection.
        proceed: the call that the host made; given tokens, the same call with these in place of x.
    """

    x: Tensor
    plan: LayerPlan
    settings: Settings
    size: tuple[int, int]
    heads: int
    matching: Matching | None
    wrapped: bool
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    project_q: Callable[[Tensor], Tensor]
    project_out: Callable[[Tensor], Tensor]
    proceed: Callable[..., Tensor]

    @property
    def merged(self) -> Clusters | None:
        """The clusters of merged tokens; None where none are merged."""
        return None if self.matching is None else self.matching.merged

    def by_heads(self, step: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Split tensors (B, M, C) into heads (B, H, M, d), take a `step` of attention on them, and join its result.

        The step is taken in the precision that was asked for; the result has the tensors' own.
        """
        from ..tensors import join_heads, no_autocast, split_heads

        def joined(given: Sequence[Tensor]) -> Tensor:
            return join_heads(step(*(split_heads(t, self.heads) for t in given)))

        if self.settings.attn_precision is None:
            return joined(tensors)
        first = tensors[0]
        with no_autocast(first.device.type):
            return joined([t.float() for t in tensors]).to(first.dtype)

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention among these queries, keys and values, each (B, M, C)."""
        from torch.nn.functional import scaled_dot_product_attention

        return self.by_heads(scaled_dot_product_attention, q, k, v)


# (top, left, bottom, right) in tokens, bottom and right not included
Span = tuple[int, int, int, int]


class Method(ABC):
    """One way to compute self-attention.

    Attributes:
        name: the value of the setting `method` that asks for it.
        action: what plans and reports call it; the name where it is not set.
        summary: what it does, for the panel's help: a clause without a full stop.
        noun: what its agents are called in a sentence, in the plural.
        phrase: what is said of a number of calls: "40 `phrase`".
        selectable: whether `method` can ask for it.
        merges: whether its self-attention works on the `r` merged tokens.
    """

    name: str
    action: str = ""
    summary: str = ""
    noun: str = "agents"
    phrase: str = ""
    selectable: bool = True
    merges: bool = False

    def __init_subclass__(cls) -> None:
        cls.action = cls.__dict__.get("action") or cls.name
        cls.phrase = cls.__dict__.get("phrase") or cls.action

    @abstractmethod
    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        """What it would do with a grid of `height` × `width` tokens of which `r` may be merged away."""

    @abstractmethod
    def attend(self, attention: SelfAttention) -> Tensor:
        """The layer's output (B, N, C) for one call of its self-attention."""

    @abstractmethod
    def flops(self, plan: LayerPlan, channels: int) -> int:
        """FLOPs of self-attention with its projections under `plan`, one row of the batch, C = `channels`."""

    def words(self, plan: LayerPlan) -> str:
        """What it does to a layer, such as "4096 tokens → 256 agents"."""
        merged = f" ({plan.queries} queries)" if plan.queries < plan.tokens else ""
        return f"{plan.tokens} tokens → {plan.agents} {self.noun}{merged}"

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        """Where its agents are on the grid; a mark is drawn in the middle of each span.

        Args:
            plan: what was done.
            height: rows of the grid.
            width: columns of the grid.
            agent_tokens: the tokens at which similarity agents are; empty where there are none.
        """
        if plan.cell is None:
            return []
        sy, sx = plan.cell
        return [
            (y, x, min(y + sy, height), min(x + sx, width)) for y in range(0, height, sy) for x in range(0, width, sx)
        ]

    def caption(self, plan: LayerPlan) -> str:
        """What the marks are, in a sentence; empty where there are none."""
        return f"Dots: {plan.agents} {self.noun}, each the mean of its cell." if plan.cell else ""


_BY_ACTION: dict[str, Method] = {}

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known everywhere. One of the same action takes its place."""
    _BY_ACTION[cls.action] = cls()
    return cls


def unregister(action: str) -> None:
    """Forget a method."""
    del _BY_ACTION[action]


def method_of(action: str) -> Method:
    """The method whose plans have this `action`."""
    return _BY_ACTION[action]


def method_named(name: str) -> Method:
    """The method that the setting `method` asks for by this name."""
    return next(method for method in selectable() if method.name == name)


def selectable() -> list[Method]:
    """All methods that can be asked for, as they are registered now."""
    return [method for method in _BY_ACTION.values() if method.selectable]


class _Names(Sequence[str]):
    """The names of all methods that can be asked for, as they are registered now."""

    def __getitem__(self, index: Any) -> Any:
        return [method.name for method in selectable()][index]

    def __len__(self) -> int:
        return len(selectable())

    def __repr__(self) -> str:
        return repr(tuple(self))


METHODS: Sequence[str] = _Names()
