"""Try candidates in every block of a running model, which computes full attention all the while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.grid import Grid
from ..attention.merging import Matching
from ..clock import Clock
from ..config import AgentConfig
from ..eager import not_compiled
from ..hosts import Call, Site, read_tokens
from ..methods import LayerPlan
from ..patching.call import ModelCall, Planned, current_call
from ..patching.closeness import Watch
from ..patching.layer import Answerer, Layer
from ..plan import merged_tokens, plan_block
from ..words import error_of_ours

FULL = 0
# Time, full attention = 1, above which a candidate is not tried again.
MAX_TIME_TRIED = 1.1


class Probe(Answerer):
    """Answers every call with the host's attention, and tries candidates, numbered from 1, beside it."""

    tries = True

    def __init__(self, candidates: Sequence[AgentConfig], clock: Clock) -> None:
        self.candidates, self.clock = dict(enumerate(candidates, 1)), clock
        self.number = 0  # of the call that is going on
        # by the block's name; blocks of one kind take the same time: (height, width) of the tokens, and their shape
        self.kinds: dict[str, Any] = {}
        # by the block's name and the number of the call in which it ran, the error of each candidate,
        # ‖candidate − full‖ / ‖h‖, h: the tokens that the block was given, to which attention is added
        self.errors: defaultdict[str, defaultdict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        self.full: defaultdict[Any, list[float]] = defaultdict(list)  # seconds of full attention, by the kind of block
        # time of each candidate, full attention in the same call = 1, by the kind of block and its number
        self.ratios: defaultdict[tuple[Any, int], list[float]] = defaultdict(list)
        self._streams: dict[str, float] = {}

    @contextmanager
    def watching(self, sites: Iterable[Site]) -> Iterator[None]:
        """Look at the tokens that blocks are given, during a `with` block."""

        @not_compiled
        def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = read_tokens(args, kwargs)
            self._streams[name] = norm(x) if isinstance(x, Tensor) else 1.0

        with ExitStack() as hooks:
            for each in sites:
                hooks.enter_context(each.block.register_forward_pre_hook(partial(see, each.name), with_kwargs=True))
            yield

    def seconds(self, name: str) -> Mapping[int, float]:
        """Return the seconds of each candidate, and of full attention (0), in blocks of this one's kind: medians."""
        kind = self.kinds.get(name)
        full = median(self.full[kind]) if kind in self.full else 0.0
        return {FULL: full} | {k: full * median(each) for (of, k), each in self.ratios.items() if of == kind}

    def settings(self, config: AgentConfig, site: Site) -> Iterable[AgentConfig]:
        return self.candidates.values()

    def plan(self, layer: Layer, call: ModelCall, size: Grid) -> tuple[AgentConfig, LayerPlan] | None:
        """Plan the first candidate that does anything here; which one doesn't matter: all are tried."""
        return next((plan for _, plan in self._plans(layer, call, size)), None)

    def _plans(self, layer: Layer, call: ModelCall, size: Grid) -> Iterator[tuple[int, tuple[AgentConfig, LayerPlan]]]:
        seen = set()
        for k, config in self.candidates.items():
            found = plan_block(config, layer.site.place, call.latent, None, size)
            if found is None or not found[1].acts or found[1].agents < found[1].method.tuned_from:
                continue
            # in small layers, different cells and shares come to the same
            same = found[1], replace(found[0], agent_ratio=0.0, exact_ratio=0.0)
            if same not in seen:
                seen.add(same)
                yield k, found

    def answer(
        self, layer: Layer, host: Call, planned: Planned, matching: Matching | None, watch: Watch | None = None
    ) -> Tensor:
        call, size, name, device = current_call(), planned.size, layer.site.name, host.x.device
        self.kinds[name] = kind = size, tuple(host.x.shape), layer.site.heads
        errors = self.errors[name][self.number]
        full, seconds = self.clock.timed(host.proceed, device)
        self.full[kind].append(seconds)
        for k, (config, plan) in self._plans(layer, call, size):
            if min(self.ratios.get((kind, k), (0.0,))) > MAX_TIME_TRIED:
                continue
            trial = partial(self._try, layer, host, call, Planned(config, plan, size))
            try:
                if (kind, k) not in self.ratios:
                    trial()  # the first time, kernels are loaded and tables are made
                out, spent = self.clock.timed(trial, device)
            except RuntimeError as failure:  # too little memory, say; what was not tried here is not chosen here
                layer.patch.note(error_of_ours(failure))
                continue
            self.ratios[kind, k].append(spent / max(seconds, 1e-12))
            errors[k] = norm(out.float() - full.float()) / max(self._streams[name], 1e-12)
        return full

    def _try(self, layer: Layer, host: Call, call: ModelCall, planned: Planned) -> Tensor:
        r, agent_r, matching = merged_tokens(planned.config, planned.plan), planned.plan.agent_r, None
        if r or agent_r:
            matching = call.match(planned.config, host.x, planned.size, r, agent_r)
        patch: Any = layer.patch
        return patch.answerer_class().answer(layer, host, planned, matching)


def norm(x: Tensor) -> float:
    """‖x‖; waits for the device."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float32))
