"""Settings of the patch: one frozen, validated dataclass, and what varies them by layer and over the diffusion.

A field is all that there is to a setting: panel, X/Y/Z plot, infotext, API, rules, command line and ComfyUI read what
`agentsd.checks.Setting` documents off `FIELDS`. Imports neither torch nor a host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from inspect import cleandoc
from itertools import pairwise
from typing import Any, ClassVar

from .checks import Setting, check_names, checked_sequence, reject
from .methods import METHODS, selectable
from .schedule import ANYWHERE, DOWNSAMPLES, Block, Rule

AUTO = "auto"
AGENT_SOURCES = ("similarity", "grid")
# Layers of fewer tokens gain nothing: the speed-up of SD 1's U-Net is 1.01× at 128×128 pixels (256 tokens) and 1.07× at
# 256×256 pixels.
SMALL = 512


def _setting(kind: str, default: Any, label: str = "", help: str = "", **more: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "label": label, "help": help, **more})


_number, _whole, _choice, _flag = (partial(_setting, kind) for kind in ("number", "whole", "choice", "flag"))


@dataclass(frozen=True)
class AgentConfig:
    """All settings of `agentsd.apply_patch`. The defaults are AgentSD's (Han et al., ECCV 2024).

    Raises:
        SettingError: a value is outside its range; the message names the setting, the value and the range.

    Attributes:
        stages: rules that name no blocks, of which the first that applies counts. Where none does, or it means full
            attention, the model is untouched, and no rule changes that. Empty: the same settings throughout.
        rules: settings that vary by block and over the diffusion. They apply in order; later ones win.
    """

    # fmt: off
    ratio: float = _number(
        0.4, "Ratio", "Share of the image tokens merged before self-attention, at most 1 − 1/(sx·sy). Higher is faster "
        "and less faithful; 0 merges none.", high=0.99, step=0.01, place=(4, 1), panel=0.0, written=True)
    max_downsample: int | str = _choice(
        1, "Layers down to", "Deepest level of the U-Net to patch. auto: the level of the model's largest "
        "self-attention layers (1 in SD 1 and SD 2, 2 in SDXL).",
        choices=(AUTO, *DOWNSAMPLES), place=(6, 1), panel=AUTO, node="layers")
    sx: int = _whole(
        4, "Cell width", "sx: width in tokens of the cells of the merging partition, and of the cells of the method "
        "pool.", low=1, high=16, place=(8, 2), node=None)
    sy: int = _whole(
        4, "Cell height", "sy: height in tokens of those cells.", low=1, high=16, place=(8, 3), node=None)
    agent_ratio: float = _number(
        0.95, "Agent ratio", "Share of the tokens merged away to make the agent tokens. Higher means fewer agents: "
        "faster, less faithful. 0.95 on a grid is one agent per 4×4 tokens.",
        high=0.99, step=0.01, place=(1, 1), written=True)
    k_scale2: float = _number(
        0.3, "k_scale2", "How sharply each token chooses among the agents, as exponent of the scale (d^-½)^k_scale2: "
        "smaller is sharper, 1 is the paper's plain equation.", high=2.0, step=0.005, place=(4, 2), written=True)
    k_shortcut: float = _number(
        0.075, "k_shortcut", "How much of each token's own value is added to the result; with the method pool, of what "
        "pooling lost of it. Keeps detail; too much looks over-sharp.", step=0.005, place=(4, 3), written=True)
    attn_precision: str | None = _choice(
        None, help="fp32 computes attention in float32 whatever the dtype of the weights. With merging alone the host "
        "computes attention, and its precision applies.", choices=(None, "fp32"))
    use_rand: bool = _flag(
        True, "Random partition", "Draw the token of each cell that others merge into at random, instead of taking the "
        "first. The same settings still give the same image.", place=(9, 1), node=None)
    merge_attn: bool = _flag(
        True, "Merge self-attention", "Patch self-attention at all.", place=(9, 2), node=None)
    merge_crossattn: bool = _flag(
        False, "Merge cross-attention", "Also merge tokens by Ratio before cross-attention. Not recommended.",
        place=(10, 1), node=None)
    merge_mlp: bool = _flag(
        False, "Merge MLP", "Also merge tokens by Ratio before the feed-forward layer. Not recommended.",
        place=(10, 2), node=None)
    agent_source: str = _choice(
        "similarity", "Agent source", "grid: averages over square cells, the fastest, and right for every device. "
        "similarity: clusters of similar tokens, as in the authors' AgentSD.",
        choices=AGENT_SOURCES, place=(6, 3), panel="grid", written=True)
    method: str = _choice(
        "agent", "Method", "How self-attention is computed.", choices=METHODS, place=(3, 1), panel="corrected",
        implied="agent", more_help=lambda: "".join(f"\n{each.name}: {each.summary}." for each in selectable()))
    min_tokens: int = _whole(
        0, "Minimum tokens", "Layers with fewer tokens are left alone: they gain nothing. A 512×512 image has 4096 "
        "tokens in SD 1's largest layers.", high=2**24, place=(7, 1), panel=SMALL, implied=0, node=None)
    max_agents: int | None = _whole(
        None, "Maximum agents", "Upper limit on the number of agent tokens in a layer; 0 sets none, except for 640 "
        "with the method corrected. Similarity agents are never fewer than the partition's cells.",
        low=1, high=2**24, optional=True, place=(7, 2), node=None)
    seed: int = _whole(
        0, "Partition seed", "Seed of the random partition, independent of the image's seed.",
        high=2**63 - 1, place=(7, 3), node=None)
    exact_ratio: float = _number(
        0.0, "Exact ratio", "With the method corrected: share of the keys that each window of tokens attends to "
        "exactly, those of the cells that matter to it. 0 is the fastest, 1 is full attention; 0.14 costs about "
        "twice as much as 0.", step=0.01, place=(1, 2))
    # fmt: on
    stages: tuple[Rule, ...] = ()
    rules: tuple[Rule, ...] = ()

    # (height, width) of the latent that the settings were tuned for; None if they were not: see `agentsd.Tuning`
    tuned_for: ClassVar[tuple[int, int] | None] = None

    def __post_init__(self) -> None:
        stages, allowed = self.stages, "a sequence of agentsd.Stage with increasing `until`"
        vars(self).update(
            {name: setting.check(getattr(self, name)) for name, setting in FIELDS.items()},
            stages=checked_sequence("stages", stages, Rule, allowed),
            rules=checked_sequence("rules", self.rules, Rule, "a sequence of agentsd.Rule"),
        )
        increasing = all(a.until < b.until for a, b in pairwise(self.stages))
        if not increasing or any(stage.downsample or stage.blocks for stage in self.stages):
            raise reject("stages", stages, allowed)
        for rule in (*self.stages, *self.rules):  # reject a bad override now, not at its timestep
            self.within(rule)

    def within(self, rule: Rule) -> AgentConfig | None:
        """Return the settings of one stage or rule by itself; None where it means full attention."""
        check_names(rule.settings or {}, RULE_SETTINGS)
        return None if rule.settings is None else replace(self, stages=(), rules=(), **rule.settings)

    @property
    def timed(self) -> bool:
        """Whether settings vary over the diffusion, so that the timestep has to be known."""
        return bool(self.stages) or any(rule.timed for rule in self.rules)

    def at(self, progress: float | None, block: Block = ANYWHERE) -> AgentConfig | None:
        """Return the settings in `block` at `progress`, the fraction of the diffusion done; None for full attention.

        Where settings vary over the diffusion, a progress that is unknown (None) or outside 0–1 means full attention.
        """
        if self.timed and (progress is None or not 0.0 <= progress <= 1.0):
            return None
        return _resolve(self, progress, block) if self.stages or self.rules else self

    def parts(self) -> tuple[tuple[float, float], ...]:
        """List the intervals (since, until) of the diffusion within which no setting changes, in order."""
        rules = (*self.stages, *self.rules)
        edges = sorted({0.0, 1.0, *(edge for rule in rules for edge in (rule.since, rule.until))})
        return tuple(pairwise(edges))

    def values(self, name: str) -> tuple[Any, ...]:
        """List the values of the setting `name`: the config's own, and those of stages and rules."""
        overrides = (rule.settings or {} for rule in (*self.stages, *self.rules))
        return (getattr(self, name), *(settings[name] for settings in overrides if name in settings))


FIELDS: Mapping[str, Setting] = {
    f.name: Setting(f.name, default=f.default, **f.metadata) for f in fields(AgentConfig) if f.metadata
}
SETTINGS = tuple(f.name for f in fields(AgentConfig))
RULE_SETTINGS = tuple(name for name in FIELDS if name != "seed")
AgentConfig.__doc__ = cleandoc(AgentConfig.__doc__ or "") + "".join(
    f"\n    {name}: {setting.help} {setting.allowed[:1].upper()}{setting.allowed[1:]}."
    for name, setting in FIELDS.items()
)


@lru_cache(maxsize=4096)
def _resolve(config: AgentConfig, progress: float | None, block: Block) -> AgentConfig | None:
    stages = config.stages or (Rule(),)
    own = overrides = next((stage.settings for stage in stages if stage.holds(progress)), None)
    for rule in config.rules if own is not None else ():
        if rule.holds(progress) and rule.names(block):
            overrides = None if rule.settings is None else {**(overrides or own), **rule.settings}
    return None if overrides is None else replace(config, stages=(), rules=(), **overrides)


# Token merging alone, whatever the method was before. With agent_ratio 0 no token is matched for agents.
TOKEN_MERGING: Mapping[str, Any] = {
    "method": "merge",
    "ratio": 0.4,
    "sx": 2,
    "sy": 2,
    "agent_ratio": 0.0,
    "agent_source": "similarity",
}


def early(until: float, *, since: float = 0.0, after: Mapping[str, Any] | None = None) -> tuple[Rule, ...]:
    """Build stages that use the config's own settings from progress `since` (0–1) to `until` (above that, at most 1).

    Before that the model is untouched; for the rest, `after` overrides settings, such as `agentsd.TOKEN_MERGING`. None
    leaves the rest untouched as well.
    """
    own = Rule(since=since, until=until)
    return (own,) if own.until == 1.0 or after is None else (own, Rule(after, since=own.until))


def paper_stages() -> tuple[Rule, ...]:
    """Build AgentSD's schedule: agents for the first 40% of the diffusion, then merging (ratio 0.4, 2×2 cells)."""
    return early(0.4, after=TOKEN_MERGING)
