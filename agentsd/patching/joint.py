"""The patch by a model's family, and a transformer's: attention over text and image, answered from q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Matching
from ..attention.tensors import attention_by, compiling, join_heads
from ..checks import reject
from ..config import AgentConfig
from ..hosts import JointCall, Site, Transformer, UnsupportedModelError, family_of
from ..hosts.sites import sites_of
from ..hosts.transformers import ONE_GRID
from ..methods import LayerPlan, SelfAttention, method_named
from ..schedule import Moment, Rule, progress_of
from .call import KVContext, Planned
from .closeness import Watch
from .layer import Answerer, Layer
from .patch import Patch


class JointAnswerer(Answerer):
    """Answers from queries, keys and values.

    Outside of graphs, the kernel that the user chose computes text's attention, and the image's except by `corrected`.
    """

    def answer(  # type: ignore[override]
        self, layer: Layer, host: JointCall, planned: Planned, matching: Matching | None, watch: Watch | None = None
    ) -> Tensor:
        if compiling():
            image = super().answer(layer, host, planned, matching, watch)
        else:
            with attention_by(host.compute):
                image = super().answer(layer, host, planned, matching, watch)
        return host.joined(image, planned.plan.tokens)

    def attention(  # type: ignore[override]
        self, layer: Layer, host: JointCall, planned: Planned, matching: Matching | None
    ) -> SelfAttention:
        tokens = planned.plan.tokens
        parts = [tuple(map(join_heads, host.split(x, tokens))) for x in host.opened(tokens)]
        image, text = (parts[0][0], parts[1][0], parts[2][0]), (parts[1][1], parts[2][1])
        what = planned.plan, planned.config, planned.size, host.q.shape[1], matching
        return SelfAttention.projected(image, what, host.proceed, text if text[0].shape[1] else None)


class TransformerPatch(Patch):
    """A patch on one transformer. Its blocks see the same tokens: all of its attentions are at level 1.

    Arguments are those of `Patch`; `progress` is given the noise level, from 1000 for noise to 0; None: linear in it.

    Raises:
        SettingError: the settings merge tokens, or their method is none for this family.
    """

    answerer_class = JointAnswerer

    def __init__(
        self,
        model: nn.Module,
        config: AgentConfig,
        family: Transformer,
        answerer: Answerer | None = None,
        progress: Moment | None = None,
    ) -> None:
        everywhere = () if Rule(None) in config.rules else (config,)
        for settings in (*everywhere, *map(config.within, (*config.stages, *config.rules))):
            if settings is not None:
                _check(settings, family)
        self.family = family
        super().__init__(model, config, answerer=answerer, progress=progress or progress_of)
        self.sized_outside = family.reads_values

    def sites(self, model: nn.Module) -> list[Site]:
        return sites_of(model, self.family)

    def read_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        """Read (height, width) of the image's tokens off the transformer's arguments."""
        return self.family.read_grid(self._unet(), args, kwargs)

    def find_timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the noise level in thousandths."""
        return self.family.read_time(self._unet(), args, kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(args, kwargs)
        if self.last_call is not None and self.last_call.latent is None:
            self.note(ONE_GRID)

    def explain(self, height: int, width: int, progress: float | None = None) -> list[tuple[str, LayerPlan | None]]:
        """As `Patch.explain`: `height` and `width` are those of the latent before it is cut into patches."""
        return super().explain(*Grid(height, width).patches(self.family.patch), progress)

    def attention_share(self, height: int, width: int, text: int, progress: float | None = None) -> float:
        """Return the share of attention's FLOPs left, at most, beside `text` tokens of text: the attentions' average.

        The other arguments are those of `explain`.
        """
        plans = [plan for _, plan in self.explain(height, width, progress)]
        text = text if self.family.text else 0
        return sum(1.0 if plan is None else share_left(plan, text) for plan in plans) / len(plans)


def make_patch(
    model: nn.Module,
    config: AgentConfig,
    kv_context: KVContext | None = None,
    answerer: Answerer | None = None,
    progress: Moment | None = None,
) -> Patch:
    """Make a patch, not installed yet, for a U-Net or a transformer; see `Patch` and `TransformerPatch`."""
    family = family_of(model)
    if family is None:
        return Patch(model, config, kv_context, answerer, progress)
    if kv_context is not None:
        raise UnsupportedModelError(f"kv_context is for a U-Net, got {family.model}")
    return TransformerPatch(model, config, family, answerer, progress)


def share_left(plan: LayerPlan, text: int) -> float:
    """Return the share of FLOPs that a plan leaves of one attention over an image and `text` tokens of text, at most.

    Text queries meet all keys; image queries and agents meet all text beside what the plan says.
    """
    N, M = plan.tokens, plan.tokens + text
    own = plan.method.flops(plan, 1) - 8 * plan.queries  # without projections; all else is linear in the width
    return (own + 4 * text * (M + N + plan.agents)) / (4 * M * M)


def _check(settings: AgentConfig, family: Transformer) -> None:
    """Raise where settings ask for something that a transformer of this family can't have."""
    method, where = method_named(settings.method), f"on {family.model}"
    if settings.merge_attn and family.rotary and method.averages:
        why = "whose keys carry rotary positions, of which means say nothing"
        raise reject("method", settings.method, f"corrected {where}, {why}")
    if settings.merge_attn and family.text and not method.takes_text:
        raise reject("method", settings.method, f"corrected or pool {where}, where text stands beside the image")
    merging = [name for name in ("merge_crossattn", "merge_mlp") if getattr(settings, name)]
    if merging:
        raise reject(merging[0], True, f"False {where}: no tokens are merged there")
    if settings.merge_attn and method.merges and settings.ratio:
        raise reject("ratio", settings.ratio, f"0 {where}: no tokens are merged there")
    if settings.merge_attn and method.clusters(settings):
        raise reject("agent_source", settings.agent_source, f"grid {where}: no tokens are matched there")
