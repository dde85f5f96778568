"""How close each method stays to the unpatched model, on the embedded model.

The relative deviation of single U-Net forwards from the unpatched model over the timestep, on noised training pictures:
as the model is, and with its self-attention queries multiplied, which sharpens attention.

    python -m benchmarks.fidelity                    # what is missing in docs/measurements/fidelity.csv, then the page
    python -m benchmarks.fidelity --again corrected  # measure anew what has this in its name
    python -m benchmarks.fidelity --quick            # a few methods, into out/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from agentsd import AgentConfig, early, paper_stages
from agentsd.hosts import find_sites

from .attentions import noised_latents
from .machine import DATA as FOLDER
from .machine import PAGE, ROOT, parser_of_rows
from .methods import CELL_4, CELL_8, Install, check, patched, todo, tomesd
from .results import Rows, fill, table

MODULE = "benchmarks.fidelity"
DATA = FOLDER / "fidelity.csv"
TIMESTEPS = (900, 700, 500, 300, 100)
FACTORS = (1.0, 4.0, 8.0)
SIDE = 64
HEAD = ("method", "queries", "samples", "mean", "worst", *(f"t{t}" for t in TIMESTEPS))
Row = dict[str, str]

GRID, CORRECTED = {"agent_source": "grid"}, {"method": "corrected"}
POOL = {"method": "pool", "k_shortcut": 0.0}
# Settings of ours; only level 0 is patched unless the name says so
_OURS: dict[str, dict[str, Any]] = {
    "AgentSD's settings, whole run": {"ratio": 0.4, "agent_ratio": 0.95},
    "AgentSD's settings, its schedule": {"ratio": 0.4, "agent_ratio": 0.95, "stages": paper_stages()},
    "similarity N/16": {},
    "grid 8×8": {**GRID, "agent_ratio": CELL_8},
    "grid 4×4": GRID,
    "grid 4×4, first 60% (1.0's defaults)": {**GRID, "stages": early(0.6)},
    "grid 4×4, k_scale2 1, k_shortcut 0": {**GRID, "k_scale2": 1.0, "k_shortcut": 0.0},
    "K/V pooled 2×2": {**POOL, "sx": 2, "sy": 2},
    "K/V pooled 4×4": {**POOL, "sx": 4, "sy": 4},
    "corrected 8×8": {**CORRECTED, "agent_ratio": CELL_8},
    "corrected 4×4": CORRECTED,
    "corrected 2×2": {**CORRECTED, "agent_ratio": 1 - 1 / 4},
    "corrected 8×8, 4% exact": {**CORRECTED, "agent_ratio": CELL_8, "exact_ratio": 0.04},
    "corrected 4×4, 4% exact": {**CORRECTED, "exact_ratio": 0.04},
    "corrected 4×4, 14% exact": {**CORRECTED, "exact_ratio": 0.14},
    "corrected 4×4, 40% exact": {**CORRECTED, "exact_ratio": 0.4},
    "corrected 4×4, two levels": {**CORRECTED, "max_downsample": 2},
    "grid 4×4, all levels": {**GRID, "max_downsample": 8},
    "corrected 4×4, all levels": {**CORRECTED, "max_downsample": 8},
}
METHODS: dict[str, Install] = {
    "unpatched": nullcontext,
    "tomesd .5": tomesd(0.5, 1),
    "ToDo 2×2": todo(2),
    **{name: patched(AgentConfig(**{"ratio": 0.0, "agent_ratio": CELL_4, **own})) for name, own in _OURS.items()},
}
QUICK = ("unpatched", "tomesd .5", "grid 4×4", "K/V pooled 2×2", "corrected 8×8", "corrected 4×4")


@contextmanager
def sharpened(unet: torch.nn.Module, factor: float) -> Iterator[None]:
    """Multiply the queries of all self-attention in a `with` block, without gradients: its maps get sharper."""
    before = {weight: weight.detach().clone() for weight in (site.block.attn1.to_q.weight for site in find_sites(unet))}
    with torch.no_grad():
        try:
            for weight in before:
                weight.mul_(factor)
            yield
        finally:
            for weight, value in before.items():
                weight.copy_(value)


@dataclass
class Case:
    """Noised pictures x at one timestep t, their prompts, and the unpatched model's output for them."""

    x: Tensor
    t: int
    prompts: list[str]
    unpatched: Tensor = field(init=False)

    def forward(self, pipe: Any) -> Tensor:
        rows = range(0, len(self.x), 2)
        return torch.cat([pipe.predict(self.x[i : i + 2], self.t, self.prompts[i : i + 2]) for i in rows]).float()


def noised(pipe: Any, index: Sequence[int], size: tuple[int, int], t: int, draw: torch.Generator) -> Case:
    """Training pictures by their numbers, noised to a timestep, and what the model as it is makes of them."""
    case = Case(noised_latents(pipe, index, size, t, draw), t, [pipe.prompts[i] for i in index])
    case.unpatched = case.forward(pipe)
    return case


def cases(pipe: Any, side: int, samples: int, seed: int = 0) -> list[Case]:
    """`samples` noised training pictures at each timestep, with pictures and noise of its own."""
    draw = torch.Generator().manual_seed(seed)
    drawn = ((t, torch.randperm(len(pipe.pictures), generator=draw)[:samples].tolist()) for t in TIMESTEPS)
    return [noised(pipe, index, (side, side), t, draw) for t, index in drawn]


def deviations(pipe: Any, install: Install, noised: Sequence[Case]) -> list[Tensor]:
    """‖out − unpatched‖ / ‖unpatched‖ of each picture of each case."""
    torch.manual_seed(0)  # tomesd draws its partition from the global generator
    with install(pipe.unet):
        outputs = [case.forward(pipe) for case in noised]
        check(pipe.unet)
    pairs = zip(outputs, (case.unpatched for case in noised), strict=True)
    return [(out - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1) for out, plain in pairs]


def run(
    pipe: Any,
    rows: Rows,
    chosen: Mapping[str, Install],
    *,
    factors: Sequence[float] = FACTORS,
    side: int = SIDE,
    samples: int = 6,
    more: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing, as long as there is `more` time."""
    for factor in factors:
        names = rows.missing({"queries": f"{factor:g}"}, chosen)
        if not names or not more():
            continue
        with sharpened(pipe.unet, factor):
            noised = cases(pipe, side, samples)
            for name in tqdm(names, desc=f"queries × {factor:g}"):
                if not more():
                    break
                found = torch.stack(deviations(pipe, chosen[name], noised))
                means = zip(TIMESTEPS, found.mean(dim=1), strict=True)
                row = {"mean": found.mean(), "worst": found.max(), **{f"t{t}": mean for t, mean in means}}
                about = {"method": name, "queries": f"{factor:g}", "samples": samples}
                rows.add([about | {key: f"{value:.5f}" for key, value in row.items()}])


def summary(rows: Sequence[Row]) -> str:
    """Deviation of forward passes, the worst in brackets, by method and factor."""
    by_key = {(row["method"], row["queries"]): f"{float(row['mean']):.4f} ({float(row['worst']):.4f})" for row in rows}
    factors = [f"{factor:g}" for factor in FACTORS if any(row["queries"] == f"{factor:g}" for row in rows)]
    known = {row["method"] for row in rows}
    names = dict.fromkeys([*(name for name in METHODS if name in known), *sorted(known)])
    lines = [[name, *(by_key.get((name, factor), "") for factor in factors)] for name in names]
    return "\n".join(table(["method", *(f"queries × {factor}" for factor in factors)], lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser_of_rows(MODULE, __doc__, str(DATA.relative_to(ROOT))).parse_args(arguments)
    from agentsd.embedded import load

    rows = Rows(args.out or (Path("out/fidelity.csv") if args.quick else DATA), HEAD)
    chosen = {name: install for name, install in METHODS.items() if not args.quick or name in QUICK}
    rows.drop(lambda name: any(part in name for part in args.again))
    run(load(), rows, chosen, factors=(1.0,) if args.quick else FACTORS, more=args.more)
    print(summary(rows.rows))
    if rows.path == DATA:
        fill(PAGE, MODULE, {"fidelity": summary(rows.rows)})


if __name__ == "__main__":
    main()
