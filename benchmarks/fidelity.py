"""How close each method stays to the unpatched model, on the embedded model.

For every method the relative deviation of single U-Net forwards from the unpatched model over the timestep, on noised
training pictures; for a short list of methods also the deviation of final pictures, and whether they still show what
the prompt says. All of it as the model is, and with its self-attention queries multiplied, which sharpens attention.

    python -m benchmarks.fidelity                    # what is missing in docs/measurements/fidelity.csv, then the page
    python -m benchmarks.fidelity --again corrected  # measure anew what has this in its name
    python -m benchmarks.fidelity --quick            # a few methods, into out/
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from agentsd import AgentConfig, early, paper_stages
from agentsd.hosts import find_sites

from .machine import ROOT
from .methods import CELL_4, CELL_8, Install, patched, todo, tomesd, unpatched
from .pages import fill
from .results import Rows, table

MODULE = "benchmarks.fidelity"
PAGE, DATA = ROOT / "docs/measurements.md", ROOT / "docs/measurements/fidelity.csv"
TIMESTEPS = (900, 700, 500, 300, 100)
FACTORS = (1.0, 4.0, 8.0)
SIDE, STEPS, GUIDANCE = 64, 20, 3.0
HEAD = ("method", "queries", "samples", "mean", "worst", *(f"t{t}" for t in TIMESTEPS))
HEAD += ("picture", "retrieved", "pictures")
Row = dict[str, str]


@dataclass(frozen=True)
class Method:
    """One way to compute self-attention: its name in the table, and whether final pictures are made as well."""

    name: str
    install: Install
    pictures: bool = False


def methods() -> list[Method]:
    """All methods that are compared, the unpatched model first; only level 0 is patched unless the name says so."""

    def ours(**settings: Any) -> Install:
        return patched(AgentConfig(**{"ratio": 0.0, **settings}))

    def grid(agent_ratio: float, **settings: Any) -> Install:
        return ours(agent_source="grid", agent_ratio=agent_ratio, **settings)

    def corrected(agent_ratio: float, **settings: Any) -> Install:
        return ours(method="corrected", agent_ratio=agent_ratio, **settings)

    def pool(side: int) -> Install:
        return ours(method="pool", sx=side, sy=side, k_shortcut=0.0)

    return [
        Method("unpatched", unpatched, pictures=True),
        Method("tomesd .3", tomesd(0.3, 1)),
        Method("tomesd .5", tomesd(0.5, 1), pictures=True),
        Method("ToDo 2×2", todo(2), pictures=True),
        Method("AgentSD's settings, whole run", patched(AgentConfig())),
        Method("AgentSD's settings, its schedule", patched(AgentConfig(stages=paper_stages())), pictures=True),
        Method("similarity N/16", ours(agent_ratio=CELL_4), pictures=True),
        Method("grid 8×8", grid(CELL_8)),
        Method("grid 4×4", grid(CELL_4), pictures=True),
        Method("grid 4×4, first 60% (1.0's defaults)", grid(CELL_4, stages=early(0.6)), pictures=True),
        Method("grid 4×4, k_scale2 1, k_shortcut 0", grid(CELL_4, k_scale2=1.0, k_shortcut=0.0)),
        Method("K/V pooled 2×2", pool(2), pictures=True),
        Method("K/V pooled 4×4", pool(4), pictures=True),
        Method("corrected 8×8", corrected(CELL_8), pictures=True),
        Method("corrected 4×4", corrected(CELL_4), pictures=True),
        Method("corrected 2×2", corrected(1 - 1 / 4)),
        Method("corrected 8×8, 4% exact", corrected(CELL_8, exact_ratio=0.04)),
        Method("corrected 4×4, 4% exact", corrected(CELL_4, exact_ratio=0.04), pictures=True),
        Method("corrected 4×4, 14% exact", corrected(CELL_4, exact_ratio=0.14), pictures=True),
        Method("corrected 4×4, 40% exact", corrected(CELL_4, exact_ratio=0.4)),
        Method("corrected 4×4, two levels", corrected(CELL_4, max_downsample=2)),
        Method("grid 4×4, all levels", grid(CELL_4, max_downsample=8), pictures=True),
        Method("corrected 4×4, all levels", corrected(CELL_4, max_downsample=8), pictures=True),
    ]


QUICK = ("unpatched", "tomesd .5", "grid 4×4", "K/V pooled 2×2", "corrected 8×8", "corrected 4×4")


@contextmanager
def sharpened(unet: torch.nn.Module, factor: float) -> Iterator[None]:
    """Multiply the queries of all self-attention in a `with` block: its maps get sharper, or softer below 1."""
    weights = [site.block.attn1.to_q.weight for site in find_sites(unet)]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def covering(pictures: Tensor, height: int, width: int) -> Tensor:
    """Enlarge latents of the trained size to cover `height` rows and `width` columns, and crop them at the middle."""
    side = max(height, width)
    x = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    return x[..., top : top + height, left : left + width]


@dataclass
class Case:
    """Noised pictures x at one timestep t, their prompts, and the unpatched model's output for them."""

    x: Tensor
    t: int
    prompts: list[str]
    unpatched: Tensor = field(init=False)


def cases(pipe: Any, side: int, samples: int, seed: int = 0) -> list[Case]:
    """`samples` noised training pictures at each timestep, with pictures and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    clean, made = pipe.latents_of(pipe.pictures).float(), []
    for t in TIMESTEPS:
        index = torch.randperm(len(clean), generator=generator)[:samples]
        x = covering(clean[index], side, side)
        alpha = pipe.scheduler.alphas_cumprod[t]
        x = (alpha.sqrt() * x + (1 - alpha).sqrt() * torch.randn(x.shape, generator=generator)).to(pipe.dtype)
        made.append(Case(x, t, [pipe.prompts[i] for i in index]))
        made[-1].unpatched = _forward(pipe, made[-1])
    return made


def _forward(pipe: Any, case: Case) -> Tensor:
    rows = zip(case.x.split(2), _chunks(case.prompts, 2), strict=True)
    return torch.cat([pipe.predict(x, case.t, prompts) for x, prompts in rows]).float()


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@contextmanager
def installed(pipe: Any, method: Method) -> Iterator[None]:
    """Install a method in a `with` block, and check that it did what it is measured for."""
    torch.manual_seed(0)  # tomesd draws its partition from the global generator
    with method.install(pipe.unet) as check:
        yield
        check()


def deviations(pipe: Any, method: Method, noised: Sequence[Case]) -> list[list[float]]:
    """The relative deviation of each picture of each case from the unpatched model."""
    with installed(pipe, method):
        return [_deviation(_forward(pipe, case), case.unpatched).tolist() for case in noised]


def _deviation(out: Tensor, unpatched: Tensor) -> Tensor:
    """‖out − unpatched‖ / ‖unpatched‖ of each row."""
    return (out - unpatched).flatten(1).norm(dim=1) / unpatched.flatten(1).norm(dim=1)


def pictures(pipe: Any, method: Method, index: Sequence[int]) -> Tensor:
    """Final latents of the prompts `index`, two at a time, in 20 steps of DDIM; each prompt's number is its seed."""
    with installed(pipe, method):
        made = []
        for pair in _chunks(index, 2):
            prompts, noise = [pipe.prompts[i] for i in pair], pipe.noise(pair)
            made.append(pipe.sample(prompts, latents=noise, steps=STEPS, guidance=GUIDANCE).clone())
    return torch.cat(made)


def measure(pipe: Any, method: Method, noised: Sequence[Case], index: Sequence[int], plain: Tensor | None) -> Row:
    """The figures of a method; those of pictures only if there are pictures of the unpatched model."""
    found = deviations(pipe, method, noised)
    means, every = [statistics.fmean(case) for case in found], [x for case in found for x in case]
    row = {"mean": statistics.fmean(every), "worst": max(every), "samples": len(found[0])}
    row |= {f"t{t}": value for t, value in zip(TIMESTEPS, means, strict=True)}
    if plain is not None and method.pictures:
        latents = pictures(pipe, method, index)
        nearest, _ = pipe.nearest(latents)
        retrieved = sum(int(n) == i for n, i in zip(nearest, index, strict=True))
        row |= {"picture": float(_deviation(latents, plain).mean()), "retrieved": retrieved, "pictures": len(index)}
    return {name: f"{value:.5f}" if isinstance(value, float) else str(value) for name, value in row.items()}


def run(
    pipe: Any,
    rows: Rows,
    chosen: Sequence[Method],
    *,
    factors: Sequence[float] = FACTORS,
    side: int = SIDE,
    samples: int = 6,
    prompts: int = 12,
    more: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing, as long as there is `more` time."""
    index = [i * len(pipe.prompts) // prompts for i in range(prompts)]
    for factor in factors:
        names = rows.missing({"queries": f"{factor:g}"}, [method.name for method in chosen])
        missing = [method for method in chosen if method.name in names]
        if not missing or not more():
            continue
        with sharpened(pipe.unet, factor), torch.no_grad():
            noised = cases(pipe, side, samples)
            plain = pictures(pipe, chosen[0], index) if prompts and any(m.pictures for m in missing) else None
            for method in tqdm(missing, desc=f"queries × {factor:g}"):
                if not more():
                    break
                found = measure(pipe, method, noised, index, plain)
                rows.add([{"method": method.name, "queries": f"{factor:g}", **found}])


def summary(rows: Sequence[Row]) -> str:
    """Deviation of forward passes, the worst in brackets, and of final latents, by method and factor."""
    by_key = {(row["method"], row["queries"]): row for row in rows}
    factors = [f"{factor:g}" for factor in FACTORS if any(row["queries"] == f"{factor:g}" for row in rows)]
    pictured = [f for f in factors if any(row["queries"] == f and row["picture"] for row in rows)]
    head = ["method", *(f"queries × {f}" for f in factors), *(f"picture, × {f}" for f in pictured)]
    order = {method.name: i for i, method in enumerate(methods())}
    lines = []
    for name in sorted({row["method"] for row in rows}, key=lambda name: order.get(name, len(order))):
        of = [by_key.get((name, factor)) for factor in factors]
        cells = [f"{float(row['mean']):.4f} ({float(row['worst']):.4f})" if row else "" for row in of]
        of = [by_key.get((name, factor)) for factor in pictured]
        cells += [f"{float(row['picture']):.4f}" if row and row["picture"] else "" for row in of]
        lines.append([name, *cells])
    return "\n".join(table(head, lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help=f"CSV file of the results ({DATA.relative_to(ROOT)}, or one in out/ with --quick)")
    add("--quick", action="store_true", help="few methods, as the model is, no final pictures")
    add("--only", nargs="+", metavar="NAME", help="only methods with one of these in their names")
    add("--again", nargs="+", default=[], metavar="NAME", help="measure anew what has one of these in its name")
    add("--samples", type=int, default=6, help="pictures at each timestep (6)")
    add("--pictures", type=int, default=12, help="final pictures of a method (12)")
    add("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    args = parser.parse_args(arguments)
    from agentsd.embedded import load

    rows = Rows(args.out or (Path("out/fidelity.csv") if args.quick else DATA), HEAD)
    chosen = [m for m in methods() if not args.quick or m.name in QUICK]
    if args.only:
        chosen = [m for m in chosen if m.name == "unpatched" or any(part in m.name for part in args.only)]
    rows.drop(lambda name: any(part in name for part in args.again))
    end = time.monotonic() + 60 * args.minutes
    run(
        load(),
        rows,
        chosen,
        factors=(1.0,) if args.quick else FACTORS,
        samples=args.samples,
        prompts=0 if args.quick else args.pictures,
        more=lambda: time.monotonic() < end,
    )
    print(summary(rows.rows))
    if rows.path == DATA:
        fill(PAGE, MODULE, {"fidelity": summary(rows.rows)})


if __name__ == "__main__":
    main()
