"""Interface of a self-attention method, and the registry of all methods.

A method is one file in this folder: a subclass of `Method` under `@register`. Nothing outside the file depends on it.
Importing it loads no torch: functions that compute import it themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

from ..attention.grid import Span
from ..words import counted

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention.merging import Clusters, Matching
    from ..config import AgentConfig as Settings
else:
    Settings = Tensor = Any  # the config is a floor above

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class LayerPlan:
    """Plan of one transformer block."""

    method: Method  # what computes self-attention
    tokens: int  # N, the number of tokens of the layer
    queries: int  # number of queries that attention is computed for
    agents: int = 0  # n, the number of agent tokens, or of pooled or sampled keys; 0 if there are none
    # (height, width) in tokens of the cell that each of them stands for; None if there are no cells
    cell: tuple[int, int] | None = None
    r: int = 0  # number of tokens merged away, in all parts of the block that merge
    agent_r: int = 0  # number of tokens merged away to make similarity agents
    reason: str = ""  # why self-attention is untouched; empty if it is changed
    opened: int = 0  # number of cells that each window of queries attends to in full
    # not compared: plans that do the same are equal, however they are explained
    # why less is done than requested, such as merging without agents; empty if nothing falls short
    shortfall: str = field(default="", compare=False)
    # names of the settings that would change the reason or the shortfall
    remedy: tuple[str, ...] = field(default=(), compare=False)
    # what to know of it all the same, such as that it was tuned for another size; empty if nothing
    note: str = field(default="", compare=False)

    @property
    def action(self) -> str:
        """What happens in self-attention: "agents", "merge", "pool", "corrected" … or "untouched"."""
        return self.method.action

    @property
    def acts(self) -> bool:
        """Whether self-attention is changed."""
        return self.action != UNTOUCHED


def untouched(tokens: int, reason: str, *remedy: str, r: int = 0) -> LayerPlan:
    """Plan a layer whose self-attention is left alone; `r` as in `LayerPlan`."""
    return LayerPlan(_BY_ACTION[UNTOUCHED], tokens, tokens, r=r, reason=reason, remedy=remedy)


def too_many_agents(agents: int, queries: int) -> str:
    """Explain why agents would not pay off: AgentSD requires 2 · n_agents < n_queries."""
    verb = "is" if agents == 1 else "are"
    return f"{counted(agents, 'agents')} {verb} too many for {counted(queries, 'queries')} (fewer than half are needed)"


@dataclass(slots=True)
class SelfAttention:
    """One call of a layer's self-attention, as a method sees it."""

    x: Tensor  # tokens (B, N, C), in row-major order
    plan: LayerPlan  # the layer's plan
    settings: Settings  # the settings in force in this layer now
    size: tuple[int, int]  # (height, width) of the token grid
    heads: int  # number of heads H
    matching: Matching | None  # clusters of merged tokens and of similarity agents; None if there are none
    # tells whether another extension wraps the projections and may rely on seeing all N tokens
    wrapped: Callable[[], bool]
    # maps tokens to queries, keys and values by the host's own projections
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    project_q: Callable[[Tensor], Tensor]  # maps tokens to queries
    project_out: Callable[[Tensor], Tensor]  # the host's output projection
    # makes the host's original call; given tokens, makes the same call with these in place of x
    proceed: Callable[..., Tensor]
    # keys and values (B, T, C) that every token attends to in full beside the image's; None if there are none
    text: tuple[Tensor, Tensor] | None = None
    chosen: list[Tensor] | None = None  # takes the cells that windows open, where somebody looks on

    @classmethod
    def projected(cls, qkv: Any, what: Any, proceed: Callable[..., Tensor], text: Any = None) -> SelfAttention:
        """Make one whose queries, keys and values (B, N, C) the host has projected, and whose output it will project.

        `what` are plan, settings, size, heads and matching.
        """
        plan, settings, size, heads, matching = what
        how: tuple[Any, Any, Any, Any] = (lambda: True), (lambda x: qkv), (lambda x: qkv[0]), (lambda x: x)
        return cls(qkv[0], plan, settings, size, heads, matching, *how, proceed, text)

    @property
    def merged(self) -> Clusters | None:
        """The clusters of merged tokens; None if none are merged."""
        return None if self.matching is None else self.matching.merged

    def by_heads(self, step: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Split tensors (B, M, C) into heads (B, H, M, d), apply `step` to them, and join the heads of its result.

        The step runs in the requested precision; the result has the dtype of the tensors.
        """
        from ..attention.tensors import join_heads, no_autocast, split_heads

        inputs, first = [split_heads(t, self.heads) for t in tensors], tensors[0]
        if self.settings.attn_precision is None:
            return join_heads(step(*inputs))
        with no_autocast(first.device.type):
            return join_heads(step(*(t.float() for t in inputs))).to(first.dtype)

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute full attention of queries, keys and values, each (B, M, C), and text."""
        import torch

        from ..attention.tensors import scaled_dot_product_attention

        if self.text is not None:
            k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), self.text, strict=True))
        return self.by_heads(scaled_dot_product_attention, q, k, v)


class Method(ABC):
    """One way to compute self-attention."""

    name: str  # the value of the setting `method` that selects it
    action = ""  # its name in plans and reports; `name` unless set
    summary = ""  # what it does, for the panel's help: a clause without a full stop
    noun = "agents"  # plural noun for its agents in sentences
    phrase = ""  # description of its calls after their number, as in "40 merged"; `action` unless set
    selectable = True  # whether the setting `method` can select it
    merges = False  # whether its self-attention works on the `r` merged tokens
    averages = False  # whether it takes means of tokens, which say nothing where positions are rotations
    takes_text = False  # whether it attends to `SelfAttention.text`
    # names of the settings that `plan` and `attend` read, beside those of merging tokens; None for any
    reads: tuple[str, ...] | None = None
    # settings that are worth trying when a model is tuned, beside `method` itself
    candidates: tuple[Mapping[str, Any], ...] = ()
    tuned_from = 0  # number of agents below which tuning doesn't try it, for what few recorded calls would not show

    def __init_subclass__(cls) -> None:
        cls.action = cls.__dict__.get("action") or cls.name
        cls.phrase = cls.__dict__.get("phrase") or cls.action

    @abstractmethod
    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        """Plan a grid of `height` × `width` tokens, of which `r` may be merged away."""

    def clusters(self, settings: Settings) -> bool:
        """Whether its agents are clusters of tokens, as the partition of `sx` × `sy` cells makes them."""
        return False

    @abstractmethod
    def attend(self, attention: SelfAttention) -> Tensor:
        """Compute the layer's output (B, N, C) for one self-attention call."""

    def flops(self, plan: LayerPlan, channels: int) -> int:
        """Count the FLOPs of self-attention and its projections under `plan`: one row of the batch, C = `channels`.

        Unless overridden, those of queries that attend to as many keys as there are agents, or to each other.
        """
        C, M = channels, plan.queries
        return 8 * M * C * C + 4 * M * (plan.agents or M) * C

    def __repr__(self) -> str:
        return self.action

    def words(self, plan: LayerPlan) -> str:
        """Describe what it does to a layer, such as "4096 tokens → 256 agents"."""
        merged = f" ({counted(plan.queries, 'queries')})" if plan.queries < plan.tokens else ""
        return f"{counted(plan.tokens, 'tokens')} → {counted(plan.agents, self.noun)}{merged}"

    def marks(self, plan: LayerPlan, height: int, width: int, agent_tokens: Sequence[int]) -> list[Span]:
        """Locate its agents on a grid of `height` × `width`; the token map draws a mark in the middle of each span.

        `agent_tokens` are those at which similarity agents sit; empty if there are none.
        """
        if plan.cell is None:
            return []
        (sy, sx), corners = plan.cell, product(range(0, height, plan.cell[0]), range(0, width, plan.cell[1]))
        return [(y, x, min(y + sy, height), min(x + sx, width)) for y, x in corners]

    def caption(self, plan: LayerPlan) -> str:
        """Explain the marks in a sentence; empty if there are none."""
        return f"Dots: {counted(plan.agents, self.noun)}, each the mean of its cell." if plan.cell else ""


_BY_ACTION: dict[str, Method] = {}
METHODS: list[str] = []  # names of the selectable methods


def selectable() -> list[Method]:
    """List the selectable methods that are registered now, by name."""
    return sorted((method for method in _BY_ACTION.values() if method.selectable), key=lambda method: method.name)


M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: register a method. A later one with the same action replaces it."""
    _BY_ACTION[cls.action] = cls()
    METHODS[:] = [method.name for method in selectable()]
    return cls


@register
class Full(Method):
    """Full attention, which is the host's. Rules and stages ask for it with settings of None, not by its name."""

    name = UNTOUCHED
    selectable = False

    def plan(self, settings: Settings, height: int, width: int, r: int) -> LayerPlan:
        return untouched(height * width, "full attention was asked for", "rules", r=r)

    def attend(self, attention: SelfAttention) -> Tensor:
        return attention.proceed()

    def words(self, plan: LayerPlan) -> str:
        return f"{plan.tokens} tokens, full attention"


def unregister(action: str) -> None:
    """Remove a method from the registry."""
    del _BY_ACTION[action]
    METHODS[:] = [method.name for method in selectable()]


def method_named(name: str) -> Method:
    """Return the method that the setting `method` selects by this name."""
    return next(method for method in selectable() if method.name == name)
