"""The planner: the one place that decides which layers are patched, and how.

Execution, `Patch.explain`, the cost model, the panel's preview and the token map all ask here. The first of these
vetoes leaves a layer alone:

1. a stage or a rule means full attention there (`AgentConfig.at`);
2. it is further down the U-Net than `max_downsample`;
3. it has fewer tokens than `min_tokens`;
4. `merge_attn` is off;
5. the method has nothing to do there, or would not pay off (`Method.plan`).

What only the call itself shows is checked there: a mask or a foreign context by `Call.veto` (`agentsd.hosts.base`),
an attention that cannot be patched by `agentsd.patching.layer`. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .attention.grid import Grid, destinations
from .config import AUTO, FIELDS, AgentConfig
from .methods import LayerPlan, method_named, untouched
from .schedule import Block


def deepest_level(config: AgentConfig, largest_level: int) -> int:
    """Return the deepest level to patch, where the U-Net's largest self-attention layers are at `largest_level`."""
    return largest_level if config.max_downsample == AUTO else int(config.max_downsample)


def plan_block(
    config: AgentConfig,
    block: Block,
    latent: tuple[int, int],
    progress: float | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[AgentConfig, LayerPlan] | None:
    """Plan one block of a U-Net: the settings in force there, and its plan; None where full attention stays.

    `latent` is (height, width); `progress`, 0–1, is needed only where settings vary over the diffusion. `size` is that
    of the block's tokens in a call; None derives it from the block's level, and there is no plan where it is unknown.
    """
    if size is None and block.downsample is None:
        return None
    size = size or Grid(*latent).at(block.downsample)
    d = Grid(*latent).level_of(size)
    settings = config.at(progress, Block(block.name, d, block.largest_level))
    if settings is None:
        return None
    height, width = size
    return settings, plan_layer(settings, height, width, d, largest_level=block.largest_level)


def plan_layer(config: AgentConfig, height: int, width: int, downsample: int, *, largest_level: int = 1) -> LayerPlan:
    """Plan a block of `height` × `width` tokens under `config`, ignoring its stages and rules.

    As in AgentSD, the number of merged tokens is capped at N − N_dst. Settings of a tuning are kept at another size
    where that is sound: with as many tokens or more, in cells that are not coarser. `downsample` is the level of the
    block, 1, 2, 4 …; `largest_level` that of the U-Net's largest self-attention layers, for which "auto" stands.
    """
    N, deepest = height * width, deepest_level(config, largest_level)
    tuned = config.tuned_for and Grid(*config.tuned_for).at(downsample)
    if downsample > deepest:
        return untouched(N, f"layers at level {downsample} are further down than level {deepest}", "max_downsample")
    if tuned and tuned.tokens > N:
        return untouched(N, f"{N} tokens are fewer than the {tuned.tokens} that were tuned for")
    if config.min_tokens > N:
        return untouched(N, f"{N} tokens are fewer than the minimum of {config.min_tokens}", "min_tokens")
    n_dst = destinations(config.sx, config.sy, height, width)
    r = min(int(N * config.ratio), N - n_dst) if n_dst else 0
    if not config.merge_attn:
        return untouched(N, "self-attention is left out", "merge_attn", r=r)
    plan = method_named(config.method).plan(config, height, width, r)
    if tuned in (None, (height, width)) or not plan.acts:
        return plan
    return _at_another_size(plan, plan_layer(config, *tuned, downsample, largest_level=largest_level))


def _at_another_size(plan: LayerPlan, tuned: LayerPlan) -> LayerPlan:
    """Say what becomes of settings that were tuned for another grid of tokens, where the plan was `tuned`."""
    cell, tuned_cell = Grid(*(plan.cell or (1, 1))), Grid(*(tuned.cell or (1, 1)))
    if not tuned.acts or cell.tokens > tuned_cell.tokens:
        return untouched(plan.tokens, f"cells of {cell} are coarser than those that were tuned")
    return replace(plan, note=f"tuned for {tuned.tokens} tokens, the deviation was not measured for {plan.tokens}")


def settings_read(config: Any) -> set[str]:
    """Return the names of the settings that have an effect under the others, stages and rules aside."""
    method, outside = method_named(config.method), config.merge_crossattn or config.merge_mlp
    merges = outside or (config.merge_attn and method.merges)
    read = {"max_downsample", "min_tokens", "merge_attn"}
    if config.merge_attn:
        read |= {"method", *(FIELDS if method.reads is None else method.reads)}
    if merges:
        read.add("ratio")
    if config.ratio:
        read |= {"merge_crossattn", "merge_mlp"}
    if (merges and config.ratio) or (config.merge_attn and method.clusters(config)):
        read |= {"sx", "sy", "use_rand", *(("seed",) if config.use_rand else ())}
    return read


def may_match(config: AgentConfig) -> bool:
    """Whether some block may need clusters of tokens: those of merged tokens, or those of similarity agents."""
    clustered = any(config.values("ratio")) or set(config.values("agent_source")) != {"grid"}
    merges = [*(method_named(name).merges for name in config.values("method"))]
    return clustered and any((*merges, *config.values("merge_crossattn"), *config.values("merge_mlp")))


def merged_tokens(config: AgentConfig, plan: LayerPlan) -> int:
    """Count the tokens actually merged away in a block: none unless a part of it works on merged tokens."""
    return plan.r if config.merge_crossattn or config.merge_mlp or plan.method.merges else 0
