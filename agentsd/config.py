"""Settings of the patch: one frozen, validated dataclass, and what varies them by layer and stage.

Imports neither torch nor a host, so that a panel, a command line or a cost model can use it on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

from .checks import CHECKS, check_names, checked_number, checked_sequence, reject
from .methods import METHODS
from .schedule import ANYWHERE, DOWNSAMPLES, Block, Rule, Stage, as_rules

AUTO = "auto"
AGENT_SOURCES = ("similarity", "grid")
PRECISIONS = (None, "fp32")
LANDMARKS = ("sample", "superpixel", "heavy")


def _setting(default: Any, kind: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, **limits})


def _number(default: float, low: float, high: float) -> Any:
    return _setting(default, "float", low=low, high=high)


def _integer(default: int | None, low: int, high: int, optional: bool = False) -> Any:
    return _setting(default, "int", low=low, high=high, optional=optional)


def _choice(default: Any, choices: Sequence[Any]) -> Any:
    return _setting(default, "choice", choices=choices)


def _flag(default: bool) -> Any:
    return _setting(default, "bool")


@dataclass(frozen=True)
class AgentConfig:
    """All settings of `agentsd.apply_patch`. The defaults are AgentSD's (Han et al., ECCV 2024).

    Attributes:
        ratio: share of the tokens merged away before self-attention, 0–0.99; capped at 1 − 1/(sx·sy).
        max_downsample: patch layers down to this level of the U-Net: 1, 2, 4 or 8; "auto" for the level of the U-Net's
            largest self-attention layers (1 in SD 1 and SD 2, 2 in SDXL).
        sx: width of a cell of the partition in tokens, 1–16.
        sy: height of a cell of the partition in tokens, 1–16.
        agent_ratio: share of the tokens merged away to make the agent tokens, 0–0.99; 0 means no agents.
        k_scale2: exponent of the broadcast's scale, (d^-½)^k_scale2, 0–2. Smaller is sharper.
        k_shortcut: weight of V added to the output, 0–1. With method "pool": weight of the detail that pooling V lost.
        attn_precision: None, or "fp32" to compute attention in float32 whatever the dtype of the weights. With merging
            alone the host computes attention, and its precision applies.
        use_rand: draw the partition's destination tokens at random instead of taking the first of each cell.
        merge_attn: patch self-attention at all.
        merge_crossattn: also merge the tokens of cross-attention by `ratio`.
        merge_mlp: also merge the tokens of the feed-forward layer by `ratio`.
        agent_source: "similarity" (token clusters, as AgentSD) or "grid" (queries averaged over square cells).
        method: "agent" (agent attention), "pool" (keys and values averaged over sx × sy cells), "corrected"
            (attention to one key of each square cell, as many as grid agents, with values fitted to full attention at
            the cells' queries; cells shrink in layers that would otherwise have fewer than 32), "local" (full
            attention to each token's neighbourhood, and to one fitted key of each such cell outside it), "merge"
            (token merging by `ratio`, no agents), or any other registered method.
        min_tokens: leave alone layers with fewer tokens than this, 0–2²⁴.
        max_agents: upper limit on the number of agent tokens, 1–2²⁴; None for no limit, except for 640 with the
            methods "corrected" and "local", which never takes more. Similarity agents are never fewer than
            the partition's cells, ⌊height / sy⌋ · ⌊width / sx⌋.
        seed: seed of the partition, 0–2⁶³−1.
        landmarks: the few keys of methods "corrected" and "local": "sample" (one token of each cell), "superpixel"
            (means over cells that follow the content), or "heavy" (the sample, and of each 2×2 cells the token that the
            mean query attends to most).
        stages: settings that vary over the diffusion; empty means the same settings throughout. Where a stage leaves
            the model untouched, no rule changes that.
        rules: settings that vary by block and over the diffusion. Rules apply in order, after the stages; later ones
            win.

    Raises:
        SettingError: a value is outside its range; the message names the setting, the value and the range.
    """

    ratio: float = _number(0.4, 0.0, 0.99)
    max_downsample: int | str = _choice(1, (*DOWNSAMPLES, AUTO))
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
    landmarks: str = _choice("sample", LANDMARKS)
    stages: tuple[Stage, ...] = field(default=(), metadata={"kind": "stages"})
    rules: tuple[Rule, ...] = field(default=(), metadata={"kind": "rules"})

    # (height, width) of the latent that the settings were tuned for; None if they were not: see `agentsd.Tuning`
    tuned_for: ClassVar[tuple[int, int] | None] = None

    def __post_init__(self) -> None:
        for f in fields(self):
            check = CHECKS.get(f.metadata["kind"])
            if check is not None:
                object.__setattr__(self, f.name, check(f.name, getattr(self, f.name), f.metadata))
        object.__setattr__(self, "stages", _checked_stages(self.stages))
        object.__setattr__(self, "rules", _checked_rules(self.rules))
        for part in (*self.stages, *self.rules):  # reject a bad override now, not at its timestep
            self.within(part)

    def within(self, part: Stage | Rule) -> AgentConfig | None:
        """Return the settings of one stage or rule by itself; None where it means full attention."""
        if part.settings is None:
            return None
        check_names(part.settings, STAGE_SETTINGS)
        return replace(self, stages=(), rules=(), **part.settings)

    @property
    def timed(self) -> bool:
        """Whether settings vary over the diffusion, so that the timestep has to be known."""
        return bool(self.stages) or any(rule.timed for rule in self.rules)

    def at(self, progress: float | None, block: Block = ANYWHERE) -> AgentConfig | None:
        """Return the settings in `block` at `progress`, the fraction of the diffusion done; None for full attention.

        Where settings vary over the diffusion, a progress that is unknown (None) or outside 0–1 means full attention.
        """
        if not self.stages and not self.rules:
            return self
        if self.timed and (progress is None or not 0.0 <= progress <= 1.0):
            return None
        return _resolve(self, progress, block)

    def parts(self) -> tuple[tuple[float, float], ...]:
        """List the intervals (since, until) of the diffusion within which no setting changes, in order."""
        rules = (*as_rules(self.stages), *self.rules)
        edges = sorted({0.0, 1.0, *(edge for rule in rules for edge in (rule.since, rule.until))})
        return tuple(pairwise(edges))

    def ever(self, name: str) -> bool:
        """Whether the setting `name` is on in any stage or rule, or in the config itself."""
        return any(self.values(name))

    def values(self, name: str) -> tuple[Any, ...]:
        """List the values of the setting `name`: the config's own, and those of stages and rules."""
        overrides = (rule.settings or {} for rule in (*self.stages, *self.rules))
        return (getattr(self, name), *(settings[name] for settings in overrides if name in settings))


@lru_cache(maxsize=4096)
def _resolve(config: AgentConfig, progress: float | None, block: Block) -> AgentConfig | None:
    stage_settings: dict[str, Any] = {}
    for rule in as_rules(config.stages):
        if rule.holds(progress):
            if rule.settings is None:
                return None
            stage_settings = dict(rule.settings)
    overrides: dict[str, Any] | None = stage_settings
    for rule in config.rules:
        if rule.holds(progress) and rule.names(block):
            base = stage_settings if overrides is None else overrides
            overrides = None if rule.settings is None else {**base, **rule.settings}
    return None if overrides is None else replace(config, stages=(), rules=(), **overrides)


def _checked_rules(rules: Any) -> tuple[Rule, ...]:
    return checked_sequence("rules", rules, Rule, "a sequence of agentsd.Rule")


def _checked_stages(stages: Any) -> tuple[Stage, ...]:
    allowed = "a sequence of agentsd.Stage with increasing `until`"
    checked = checked_sequence("stages", stages, Stage, allowed)
    ends = [stage.until for stage in checked]
    if any(b <= a for a, b in pairwise(ends)):
        raise reject("stages", stages, allowed)
    return checked


SETTINGS = tuple(f.name for f in fields(AgentConfig))
STAGE_SETTINGS = tuple(name for name in SETTINGS if name not in ("stages", "rules", "seed"))
LIMITS: Mapping[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(AgentConfig)}

# Token merging alone, whatever the method was before. With agent_ratio 0 no token is matched for agents.
TOKEN_MERGING: Mapping[str, Any] = {
    "method": "merge",
    "ratio": 0.4,
    "sx": 2,
    "sy": 2,
    "agent_ratio": 0.0,
    "agent_source": "similarity",
}


def early(until: float, *, since: float = 0.0, after: Mapping[str, Any] | None = None) -> tuple[Stage, ...]:
    """Build stages that use the config's own settings from `since` to `until`, and `after` from then on.

    Args:
        until: progress at which the config's own settings end, above `since` and at most 1.
        since: progress at which they begin, 0–1; before that the model is untouched.
        after: settings to override for the rest, such as `agentsd.TOKEN_MERGING`; None leaves the rest untouched.
    """
    stage = Stage(until)
    since = checked_number("since", since, {"kind": "float", "low": 0.0, "high": 1.0})
    if since >= stage.until:
        raise reject("since", since, f"below until, which is {stage.until}")
    stages = [Stage(since, None)] if since else []
    stages.append(stage)
    if stage.until < 1:
        stages.append(Stage(1.0, after))
    return tuple(stages)


def paper_stages() -> tuple[Stage, ...]:
    """Build AgentSD's schedule: agents for the first 40% of the diffusion, then merging (ratio 0.4, 2×2 cells)."""
    return early(0.4, after=TOKEN_MERGING)
