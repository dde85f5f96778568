"""Settings of the patch: one frozen, validated dataclass, and what they mean for a layer of a given size.

Imports neither torch nor a host, so that a panel, a command line or a cost model can use it alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from typing import Any

AGENT_SOURCES = ("similarity", "grid")
METHODS = ("agent", "pool", "corrected")
PRECISIONS = (None, "fp32")
DOWNSAMPLES = (1, 2, 4, 8)
MAX_TIMESTEP = 1000
# Steps of the corrected method's fit.
FIT_STEPS = 3
# With fewer agents than this, corrected values overshoot between them: docs/fidelity.md has the figures.
FEWEST_CORRECTED = 32


class SettingError(ValueError):
    """A setting has a value outside its range. The message names the setting, the value and the range."""


def _reject(name: str, value: Any, allowed: str) -> SettingError:
    return SettingError(f"{name} must be {allowed}, got {value!r}")


def _setting(default: Any, kind: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, **limits})


def _number(default: float, low: float, high: float) -> Any:
    return _setting(default, "float", low=low, high=high)


def _integer(default: int | None, low: int, high: int, optional: bool = False) -> Any:
    return _setting(default, "int", low=low, high=high, optional=optional)


def _choice(default: Any, choices: tuple[Any, ...]) -> Any:
    return _setting(default, "choice", choices=choices)


def _flag(default: bool) -> Any:
    return _setting(default, "bool")


def _checked_number(name: str, value: Any, meta: Mapping[str, Any]) -> float | int | None:
    if value is None and meta.get("optional"):
        return None
    whole = meta["kind"] == "int"
    allowed = f"{'a whole number' if whole else 'a number'} from {meta['low']} to {meta['high']}"
    if meta.get("optional"):
        allowed += ", or None"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _reject(name, value, allowed)
    if not meta["low"] <= value <= meta["high"]:  # which NaN is not
        raise _reject(name, value, allowed)
    if whole and value != int(value):
        raise _reject(name, value, allowed)
    return int(value) if whole else float(value)


def _checked_choice(name: str, value: Any, meta: Mapping[str, Any]) -> Any:
    # True == 1, but nobody who writes max_downsample=True means 1
    number = isinstance(value, Real) and not isinstance(value, bool)
    for choice in meta["choices"]:
        if (number if isinstance(choice, int) else type(value) is type(choice)) and value == choice:
            return choice
    raise _reject(name, value, "one of " + ", ".join(repr(c) for c in meta["choices"]))


def _checked_flag(name: str, value: Any, meta: Mapping[str, Any]) -> bool:
    if not isinstance(value, bool):
        raise _reject(name, value, "True or False")
    return value


_CHECKS = {"float": _checked_number, "int": _checked_number, "choice": _checked_choice, "bool": _checked_flag}


@dataclass(frozen=True)
class Stage:
    """One part of the diffusion, and what differs there.

    Args:
        until: fraction of the diffusion done at which the stage ends, in (0, 1]; done = 1 − t / 1000.
        settings: the settings that differ from the config's own; None leaves the model untouched.
    """

    until: float
    settings: Mapping[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        until = _checked_number("until", self.until, {"kind": "float", "low": 0.0, "high": 1.0})
        if until == 0.0:
            raise _reject("until", self.until, "above 0 and at most 1")
        object.__setattr__(self, "until", until)
        if self.settings is not None and not isinstance(self.settings, Mapping):
            raise _reject("settings", self.settings, "a mapping of settings, or None to leave the model untouched")
        if self.settings is not None:
            object.__setattr__(self, "settings", dict(self.settings))  # ours alone: checked once, then never changed

    def __hash__(self) -> int:
        return hash((self.until, None if self.settings is None else tuple(sorted(self.settings.items()))))


@dataclass(frozen=True)
class AgentConfig:
    """Everything that `agentsd.apply_patch` can be told. The defaults are AgentSD's (Han et al., ECCV 2024).

    Attributes:
        ratio: share of the tokens merged away before self-attention, 0–0.99; capped at 1 − 1/(sx·sy).
        max_downsample: patch layers at most this far down the U-Net: 1, 2, 4 or 8.
        sx: width of a cell of the partition in tokens, 1–16.
        sy: height of a cell of the partition in tokens, 1–16.
        agent_ratio: share of the tokens merged away to make the agent tokens, 0–0.99; 0 means no agents.
        k_scale2: exponent of the broadcast's scale, (d^-½)^k_scale2, 0–2. Smaller is sharper.
        k_shortcut: weight of V added to the output, 0–1. With method "pool": weight of what pooling V lost.
        attn_precision: None, or "fp32" to compute attention in float32 whatever the weights are. Attention that is only
            merged stays the host's, and so does its precision.
        use_rand: draw the partition's destination tokens at random instead of each cell's first one.
        merge_attn: act on self-attention at all.
        merge_crossattn: merge the tokens of cross-attention by `ratio` too.
        merge_mlp: merge the tokens of the feed-forward layer by `ratio` too.
        agent_source: "similarity" (token clusters, as AgentSD) or "grid" (queries averaged over square cells).
        method: "agent" (agent attention), "pool" (keys and values averaged over sx × sy cells), or "corrected"
            (attention to one key of each square cell, as many as grid agents; their values are fitted to full
            attention at the cells' queries; the cells are smaller in layers where there would be fewer than 32).
        min_tokens: leave layers with fewer tokens than this alone, 0–2²⁴.
        max_agents: at most so many agent tokens, 1–2²⁴; None for no limit. Similarity agents are never fewer than the
            partition's cells, ⌊height / sy⌋ · ⌊width / sx⌋.
        seed: seed of the partition, 0–2⁶³−1.
        share_match: match tokens once for all blocks of one size in a call of the U-Net, in the first of them.
        reuse_match: fraction of the diffusion for which a block's clusters are used again before its tokens are
            matched anew, 0–1; 0 matches in every call. Assumes that a falling timestep means the same image.
        stages: parts of the diffusion with settings of their own; empty means one set of settings throughout.

    Raises:
        SettingError: a value is outside its range; the message names the setting, the value and the range.
    """

    ratio: float = _number(0.4, 0.0, 0.99)
    max_downsample: int = _choice(1, DOWNSAMPLES)
    sx: int = _integer(4, 1, 16)
    sy: int = _integer(4, 1, 16)
    agent_ratio: float = _number(0.95, 0.0, 0.99)
    k_scale2: float = _number(0.3, 0.0, 2.0)
    k_shortcut: float = _number(0.075, 0.0, 1.0)
    attn_precision: str | None = _choice(None, PRECISIONS)
    use_rand: bool = _flag(True)
    merge_attn: bool = _flag(True)
    merge_crossattn: bool = _flag(False)
    merge_mlp: bool = _flag(False)
    agent_source: str = _choice("similarity", AGENT_SOURCES)
    method: str = _choice("agent", METHODS)
    min_tokens: int = _integer(0, 0, 2**24)
    max_agents: int | None = _integer(None, 1, 2**24, optional=True)
    seed: int = _integer(0, 0, 2**63 - 1)
    share_match: bool = _flag(False)
    reuse_match: float = _number(0.0, 0.0, 1.0)
    stages: tuple[Stage, ...] = field(default=(), metadata={"kind": "stages"})

    def __post_init__(self) -> None:
        for f in fields(self):
            check = _CHECKS.get(f.metadata["kind"])
            if check is not None:
                object.__setattr__(self, f.name, check(f.name, getattr(self, f.name), f.metadata))
        object.__setattr__(self, "stages", _checked_stages(self.stages))
        for stage in self.stages:  # a bad override must be found now, not at its timestep
            self.within(stage)

    def within(self, stage: Stage) -> AgentConfig | None:
        """The settings that hold in `stage`; None where it leaves the model untouched."""
        if stage.settings is None:
            return None
        check_names(stage.settings, STAGE_SETTINGS)
        return replace(self, stages=(), **stage.settings)

    def at(self, done: float | None) -> AgentConfig | None:
        """The settings when the fraction `done` of the diffusion is done; None: leave the model untouched.

        Without stages the answer is always this config. With stages, a `done` that is unknown (None) or outside
        0–1 belongs to no stage.
        """
        if not self.stages:
            return self
        if done is None or not 0.0 <= done <= 1.0:
            return None
        return _resolve(self, done)

    def every_stage(self) -> tuple[AgentConfig, ...]:
        """All the settings that can come to hold, in the order of the diffusion."""
        found = [self.within(stage) for stage in self.stages] if self.stages else [self]
        return tuple(config for config in found if config is not None)


@lru_cache(maxsize=256)
def _resolve(config: AgentConfig, done: float) -> AgentConfig | None:
    for stage in config.stages:
        if done < stage.until or stage.until == 1.0:
            return config.within(stage)
    return None


def _checked_stages(stages: Any) -> tuple[Stage, ...]:
    allowed = "a sequence of agentsd.Stage with increasing `until`"
    if isinstance(stages, (str, Stage, Mapping)) or not hasattr(stages, "__iter__"):
        raise _reject("stages", stages, allowed)
    checked = tuple(stages)
    if not all(isinstance(stage, Stage) for stage in checked):
        raise _reject("stages", stages, allowed)
    ends = [stage.until for stage in checked]
    if any(b <= a for a, b in pairwise(ends)):
        raise _reject("stages", stages, allowed)
    return checked


def check_names(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise SettingError for the first name in `given` that is not in `known`."""
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise SettingError(f"unknown setting {name}={value!r}{hint}; the settings are {', '.join(known)}")


SETTINGS = tuple(f.name for f in fields(AgentConfig))
STAGE_SETTINGS = tuple(name for name in SETTINGS if name not in ("stages", "seed"))
LIMITS: Mapping[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(AgentConfig)}

# Token merging alone: with agent_ratio 0 every token would be its own agent, so no agents are used.
TOKEN_MERGING: Mapping[str, Any] = {"ratio": 0.4, "sx": 2, "sy": 2, "agent_ratio": 0.0, "agent_source": "similarity"}


def early(until: float, *, since: float = 0.0, after: Mapping[str, Any] | None = None) -> tuple[Stage, ...]:
    """Stages that use the config's own settings from `since` to `until`, and `after` from there on.

    Args:
        until: fraction of the diffusion done at which they end, above `since` and at most 1.
        since: fraction done at which they begin, 0–1; before that the model is left untouched.
        after: settings for the rest, such as `agentsd.TOKEN_MERGING`; None leaves the rest untouched.
    """
    use = Stage(until)
    since = _checked_number("since", since, {"kind": "float", "low": 0.0, "high": 1.0})
    if since >= use.until:
        raise _reject("since", since, f"below until, which is {use.until}")
    stages = [Stage(since, None)] if since else []
    stages.append(use)
    if use.until < 1:
        stages.append(Stage(1.0, after))
    return tuple(stages)


def paper_stages() -> tuple[Stage, ...]:
    """AgentSD's schedule: agents for the first 40 % of the diffusion, then token merging (ratio .4, 2 × 2 cells)."""
    return early(0.4, after=TOKEN_MERGING)


@dataclass(frozen=True)
class LayerPlan:
    """What a config does to one transformer block of `height` × `width` tokens.

    Attributes:
        action: what happens in self-attention: "agents", "merge", "pool", "corrected" or "untouched".
        tokens: N, the number of tokens of the layer.
        queries: number of queries that attention is computed for.
        agents: n, the number of agent tokens, or of pooled or sampled keys; 0 where there are none.
        cell: (height, width) of the cell in tokens that each stands for; None where there is none.
        r: tokens merged away, in whatever parts of the block are merged.
        agent_r: tokens merged away to make similarity agents.
        reason: why self-attention is untouched; empty where it is not.
    """

    action: str
    tokens: int
    queries: int
    agents: int = 0
    cell: tuple[int, int] | None = None
    r: int = 0
    agent_r: int = 0
    reason: str = ""


def grid_cell(agent_ratio: float, height: int, width: int, max_agents: int | None = None) -> int:
    """Side s of a grid agent's square cell, in tokens.

    The power of two nearest, in log, to 1/√(1 − agent_ratio); raised until there are at most `max_agents` cells.
    """
    s = 2 ** math.floor(0.5 - 0.5 * math.log2(1 - agent_ratio))
    while max_agents is not None and _cells(height, s) * _cells(width, s) > max_agents:
        s *= 2
    return s


def _cells(length: int, side: int) -> int:
    return -(-length // side)


def _samples(length: int, side: int) -> int:
    """Cells that reach their middle, which is where `agentsd.attention.sample_tokens` takes its token."""
    return _cells(length - (min(side, length) - 1) // 2, side)


def destinations(config: AgentConfig, height: int, width: int) -> int:
    """Number of destination tokens of the partition: one for each whole sx × sy cell."""
    return (height // config.sy) * (width // config.sx)


def _similarity_agents(config: AgentConfig, tokens: int, n_dst: int) -> int:
    agent_r = int(tokens * config.agent_ratio)
    if config.max_agents is not None and agent_r:
        agent_r = max(agent_r, tokens - config.max_agents)
    return min(agent_r, tokens - n_dst) if n_dst else 0


@lru_cache(maxsize=1024)
def plan_layer(config: AgentConfig, height: int, width: int, downsample: int) -> LayerPlan:
    """Say what `config` (its stages aside) does to a block of `height` × `width` tokens.

    As in AgentSD, the numbers of merged tokens are capped at N − N_dst, and agents are used exactly where
    2 · n_agents < n_queries.
    """
    N = height * width
    if downsample > config.max_downsample:
        return LayerPlan("untouched", N, N, reason=f"downsample {downsample} is above {config.max_downsample}")
    if config.min_tokens > N:
        return LayerPlan("untouched", N, N, reason=f"{N} tokens are below min_tokens {config.min_tokens}")
    n_dst = destinations(config, height, width)
    r = min(int(N * config.ratio), N - n_dst) if n_dst else 0
    if not config.merge_attn:
        return LayerPlan("untouched", N, N, r=r, reason="merge_attn is off")
    if config.method == "pool":
        return _plan_pool(config, height, width, r)
    if config.method == "corrected":
        return _plan_corrected(config, height, width, r)
    agent_r, cell = 0, None
    if config.agent_source == "grid":
        n, cell = _grid(config, height, width)
    else:
        agent_r = _similarity_agents(config, N, n_dst)
        n = N - agent_r
    if 2 * n < N - r:
        return LayerPlan("agents", N, N - r, n, cell, r, agent_r)
    if r:
        return LayerPlan("merge", N, N - r, r=r)
    return LayerPlan("untouched", N, N, reason=f"2 × {n} agents are not below {N} queries")


def _grid(config: AgentConfig, height: int, width: int) -> tuple[int, tuple[int, int]]:
    s = grid_cell(config.agent_ratio, height, width, config.max_agents)
    return _cells(height, s) * _cells(width, s), (s, s)


def _plan_corrected(config: AgentConfig, height: int, width: int, r: int) -> LayerPlan:
    N = height * width
    s = grid_cell(config.agent_ratio, height, width, config.max_agents)
    while (n := _samples(height, s) * _samples(width, s)) < FEWEST_CORRECTED and s > 1:
        s //= 2
    if config.max_agents is not None and n > config.max_agents:
        return LayerPlan("untouched", N, N, r=r, reason=f"max_agents {config.max_agents} are too few to correct")
    if 2 * n < N:
        return LayerPlan("corrected", N, N, n, (s, s), r)
    return LayerPlan("untouched", N, N, r=r, reason=f"2 × {n} agents are not below {N} queries")


def _plan_pool(config: AgentConfig, height: int, width: int, r: int) -> LayerPlan:
    N = height * width
    n = _cells(height, config.sy) * _cells(width, config.sx)
    if n < N:
        return LayerPlan("pool", N, N, n, (config.sy, config.sx), r)
    return LayerPlan("untouched", N, N, r=r, reason="cells of 1 × 1 pool nothing")
