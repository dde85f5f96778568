"""Agent attention on one clone of a ComfyUI transformer: SD 3, Flux, Qwen-Image, Lumina and their kin.

ComfyUI has one slot for whoever computes attention instead of the host, `optimized_attention_override`. It is filled
anew in each model call, around what is there by then, and given back afterwards: nodes that install themselves at every
step are neither lost nor in our way, and no module is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.tensors import join_heads, split_heads
from ..config import AgentConfig
from ..eager import not_compiled
from ..hosts import JointCall, Seam, Transformer, UnsupportedModelError
from ..patching.joint import TransformerPatch
from ..words import ascii_of
from .model import KEY, OPTIONS, log, wrapped

SKIPS = "another node skips blocks"
SLOT = "optimized_attention_override"


class ComfyTransformer(Transformer):
    """A family of transformers of ComfyUI; `attentions` are lists of blocks in the order in which they run.

    The blocks of a list whose name ends in "refiner" see one of text and image alone, with a mask, and are left alone.
    """

    def seam(self, attn: nn.Module) -> Seam:
        return Seam(attn)  # the host calls us by itself

    def names(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for part in self.attentions:
            for i, block in enumerate(getattr(model, part, ())):
                yield f"{part}.{i}", block
                if getattr(getattr(block, "x_block", None), "x_block_self_attn", False):  # SD 3.5's second one
                    yield f"{part}.{i}.attn2", block


FAMILIES = {
    family.model: family
    for family in (
        ComfyTransformer("OpenAISignatureMMDITWrapper", ("joint_blocks",), rotary=False),
        ComfyTransformer("Flux", ("double_blocks", "single_blocks"), masks=True),
        ComfyTransformer("Chroma", ("double_blocks", "single_blocks"), masks=True),
        ComfyTransformer("QwenImageTransformer2DModel", ("transformer_blocks",), masks=True),
        ComfyTransformer("NextDiT", ("context_refiner", "noise_refiner", "layers")),
        ComfyTransformer("MMDiT", ("double_layers", "single_layers"), rotary=False),  # AuraFlow
    )
}


def transformer_of(model: Any) -> tuple[nn.Module, ComfyTransformer] | None:
    """Return the transformer of a ModelPatcher and its family; None if it is a U-Net or unknown."""
    module = model.model.diffusion_model
    family = FAMILIES.get(type(module).__name__)
    return None if family is None else (module, family)


class CloneTransformerPatch(TransformerPatch):
    """A patch whose attention is called by the host: no hooks, and nothing to remove.

    Attributes:
        neighbour: who else computes attention in the last call; empty if nobody does.
    """

    def __init__(
        self, model: nn.Module, family: ComfyTransformer, config: AgentConfig, hints: Sequence[str] = ()
    ) -> None:
        super().__init__(model, config, family)
        self.hints, self.active, self.neighbour, self._asked = hints, True, "", 0

    def __deepcopy__(self, memo: Any) -> CloneTransformerPatch:
        return self  # a clone of the clone has a copy of its options, and so of our methods

    def read_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        """Read the grid of patches of the latent, which the host pads to whole ones."""
        model: Any = self._unet()
        side = model.patch_size
        return None if kwargs.get("ref_latents") else Grid(*args[0].shape[-2:]).cells((side, side))

    def find_timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return 1000 * args[1]  # σ of the flow

    def sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a sampling of the host."""
        self.restart_report()
        try:
            return executor(*args, **kwargs)
        finally:
            log.info(ascii_of(self.describe()))

    def answer_in(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call of the model, answering its attention."""
        if SKIPS in self.notes and any(rule.blocks for rule in self.config.rules):
            return executor(*args, **kwargs)  # the host does not say which block asks
        try:
            options, before = self._prepare(args, kwargs)
        except Exception as error:
            self.end()
            self.note_error(error)
            return executor(*args, **kwargs)
        try:
            output = executor(*args, **kwargs)
        except BaseException:
            self.end()
            raise
        finally:
            if before is None:
                options.pop(SLOT, None)
            else:
                options[SLOT] = before
        # a call without any attention was answered from a cache
        if self._asked not in (0, len(self._layers)) and SKIPS not in self.notes:
            self.note(SKIPS)
        self.end_call()
        return output

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Begin a call of the model and fill the slot; return the host's options and what was in the slot."""
        options = args[5] if len(args) > 5 else kwargs[OPTIONS]
        before, self._asked = options.get(SLOT), 0
        self.neighbour = "" if before is None else f"{before.__module__}.{getattr(before, '__qualname__', before)}"
        self.begin_call(self._unet(), args, kwargs)
        for image in self._images:
            image.see(self.last_call.latent)  # type: ignore[union-attr]
        options[SLOT] = partial(self.answer, before)
        return options, before

    @not_compiled
    def answer(
        self,
        before: Callable[..., Tensor] | None,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Answer a call of the host's attention function `func`, or of what overrides it."""
        inner = func if before is None else partial(before, func)
        host = partial(inner, q, k, v, heads, mask=mask, **kwargs)
        if q.shape != k.shape or self._asked >= len(self._layers):
            return host()
        layer = self._layers[self._asked]
        self._asked += 1
        try:
            # by heads, whatever shapes the host asks for
            shapes = {**kwargs, "skip_reshape": True, "skip_output_reshape": True}
            if not kwargs.get("skip_reshape"):
                # SD 3's values come by heads, its queries and keys do not
                q, k, v = (split_heads(x.flatten(2), heads) for x in (q, k, v))
            given = {} if mask is None else {"attn_mask": _by_rows(mask, q)}

            def compute(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
                return inner(q, k, v, heads, mask=attn_mask, **shapes)

            call = JointCall(self.family, compute, q, k, v, given)
        except Exception as error:
            self.note_error(error)
            return host()
        single = layer.site.name.partition(".")[0].endswith("refiner")
        out = call.proceed() if single else layer.answer(call)
        try:
            return out if kwargs.get("skip_output_reshape") else join_heads(out)
        except Exception as error:  # who overrides attention has given it another shape
            self.note_error(error)
            return host()

    def describe(self) -> str:
        """Describe the last sampling."""
        calls = sum((layer.calls for layer in self._layers), start=type(self._layers[0].calls)())
        done = ", ".join(f"{n} {action}" for action, n in calls.items()) or "nothing was sampled yet"
        size = None if self.last_call is None else self.last_call.latent
        lines = [f"Agent Attention, {size or 'no'} tokens of the image: {done}."]
        lines += [f"{reason} ({n} calls)" for reason, n in self.notes.items()]
        lines += [f"attention is computed by {self.neighbour}"] if self.neighbour else []
        return "\n".join(lines)


def _by_rows(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of the host's, of two to four dimensions, as (B, heads, queries, keys)."""
    if mask.dim() == 2 and mask.shape == (len(q), q.shape[2]):
        return mask[:, None, None]
    return mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask


def attach_transformer(model: Any, config: AgentConfig, hints: Sequence[str] = ()) -> Any:
    """As `attach`; raises SettingError where the settings are none for the family. Reports repeat the `hints`."""
    clone = model.clone()
    found = transformer_of(clone)
    if found is None:
        raise UnsupportedModelError(f"{type(clone.model.diffusion_model).__name__} is no known transformer")
    patch = CloneTransformerPatch(*found, config, hints)
    return wrapped(clone, apply_model=patch.answer_in, sampler_sample=patch.sample)


def report_on_transformer(model: Any) -> str:
    """Describe what was done in the last sampling with a transformer; empty if ours has no part in it."""
    wrappers = model.model_options["transformer_options"].get("wrappers", {}).get("apply_model", {}).get(KEY, ())
    patches = (wrapper.__self__ for wrapper in wrappers)
    return next(("\n".join([patch.describe(), *patch.hints]) for patch in patches), "")
