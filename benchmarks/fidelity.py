"""How close each method stays to the unpatched model, and how fast it is, on the embedded model.

For every method and latent size: the relative deviation of single U-Net forwards from the unpatched model over the
timestep, on noised training pictures, and the seconds of a forward, interleaved with the unpatched model's. For a short
list of methods also the deviation of the final picture, and whether it still shows what the prompt says.

    python -m benchmarks.fidelity                  # CSV, JSON, Markdown and plots in docs/fidelity; resumes
    python -m benchmarks.fidelity --quick          # a few methods, one size, into out/fidelity
    python -m benchmarks.fidelity --queries 4      # sharper attention, into docs/fidelity/queries4
    python -m benchmarks.fidelity --untimed        # no seconds: on a machine with other work to do
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from agentsd import AgentConfig, early, paper_stages, patch_unet
from agentsd.attention.tensors import join_heads, split_heads
from agentsd.hosts import Call, find_sites

TIMESTEPS = (900, 700, 500, 300, 100)
# (height, width) of the latents
SIZES = ((64, 64), (64, 96), (96, 96), (128, 128))
STEPS, GUIDANCE = 20, 3.0
# A row of results keeps the settings that it was measured with. These are always named in it. Settings that the core
# has got since are named only where they are not at their default: results from before remain valid.
_ALWAYS_NAMED = (
    *("ratio", "max_downsample", "sx", "sy", "agent_ratio", "k_scale2", "k_shortcut", "attn_precision", "use_rand"),
    *("merge_attn", "merge_crossattn", "merge_mlp", "agent_source", "method", "min_tokens", "max_agents", "seed"),
    "stages",
)


@dataclass(frozen=True)
class Method:
    """One way to compute self-attention.

    Attributes:
        name: its name in the table.
        family: its line in the plot, which joins the methods of a family.
        config: the settings of the patch; None for no patch of ours.
        tomesd: the ratio of the tomesd library; None for no tomesd.
        todo: the side of the cells of which level 0 keeps the first key and value; None for no ToDo.
        pictures: whether final pictures are made as well.
        sizes: whether latents other than 64×64 are measured as well.
    """

    name: str
    family: str
    config: AgentConfig | None = None
    tomesd: float | None = None
    todo: int | None = None
    pictures: bool = False
    sizes: bool = False

    @contextmanager
    def on(self, unet: torch.nn.Module) -> Iterator[None]:
        """Patch the U-Net in a `with` block."""
        if self.tomesd is not None:
            import tomesd

            torch.manual_seed(0)  # tomesd draws its partition from the global generator
            tomesd.apply_patch(unet, ratio=self.tomesd)
            try:
                yield
            finally:
                tomesd.remove_patch(unet)
        elif self.todo is not None:
            with downsampled(unet, self.todo):
                yield
        elif self.config is not None:
            patch = patch_unet(unet, self.config)
            try:
                yield
            finally:
                patch.remove()
            if patch.notes:
                raise RuntimeError(f"{self.name} stood down: {dict(patch.notes)}")
        else:
            yield

    def parts(self, timesteps: Sequence[int]) -> dict[Method, int]:
        """The method as one or several that do the same at every timestep, with the number of steps of each."""
        if self.config is None or not self.config.stages:
            return {self: len(timesteps)}
        parts: dict[Method, int] = {}
        for t in timesteps:
            part = Method(self.name, self.family, self.config.at(1 - t / 1000))
            parts[part] = parts.get(part, 0) + 1
        return parts

    def settings(self) -> str:
        """The method's settings as a row of results keeps them."""
        todo = "" if self.todo is None else f", ToDo {self.todo}"
        return f"({_settings_text(self.config)}, {self.tomesd!r}{todo})"


def _settings_text(config: AgentConfig | None) -> str:
    if config is None:
        return "None"
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    new = [f.name for f in fields(config) if f.name not in _ALWAYS_NAMED and values[f.name] != f.default]
    return f"AgentConfig({', '.join(f'{name}={values[name]!r}' for name in (*_ALWAYS_NAMED, *new))})"


def _agents(source: str, ratio: float, **settings: Any) -> AgentConfig:
    return AgentConfig(ratio=0.0, agent_source=source, agent_ratio=ratio, **settings)


def _pool(sy: int, sx: int, shortcut: float = 0.0, **settings: Any) -> AgentConfig:
    return AgentConfig(method="pool", sx=sx, sy=sy, ratio=0.0, k_shortcut=shortcut, **settings)


def _corrected(ratio: float, **settings: Any) -> AgentConfig:
    return AgentConfig(**{"method": "corrected", "ratio": 0.0, "agent_ratio": ratio, **settings})


def methods() -> list[Method]:
    """All methods that are compared, the unpatched model first."""
    grid = _agents("grid", 1 - 1 / 16)
    second, deeper = {"max_downsample": 2}, {"max_downsample": 8}
    until_40 = {"stages": early(0.4)}
    finer = {"stages": early(0.4, after={"agent_ratio": 1 - 1 / 16})}
    return [
        Method("unpatched", "unpatched", pictures=True, sizes=True),
        Method("tomesd .3", "tomesd", tomesd=0.3, sizes=True),
        Method("tomesd .5", "tomesd", tomesd=0.5, pictures=True, sizes=True),
        Method("paper .4/.95, whole run", "paper", AgentConfig()),
        Method("paper .4/.95, its schedule", "paper", AgentConfig(stages=paper_stages()), pictures=True),
        Method("similarity N/4", "similarity agents", _agents("similarity", 0.75, sx=2, sy=2)),
        Method("similarity N/16", "similarity agents", _agents("similarity", 0.9375), pictures=True, sizes=True),
        Method("similarity N/64", "similarity agents", _agents("similarity", 1 - 1 / 64, sx=8, sy=8)),
        Method("grid 2×2", "grid agents", _agents("grid", 0.75)),
        Method("grid 4×4", "grid agents", grid, pictures=True, sizes=True),
        Method("grid 8×8", "grid agents", _agents("grid", 1 - 1 / 64), sizes=True),
        Method("grid 4×4, first 40%", "grid agents, first part", _agents("grid", 0.9375, **until_40), pictures=True),
        Method(
            "grid 4×4, first 60% (1.0's defaults)",
            "grid agents, first part",
            _agents("grid", 0.9375, stages=early(0.6)),
            pictures=True,
        ),
        Method("grid 4×4, k_scale2 1, k_shortcut 0", "plain", _agents("grid", 0.9375, k_scale2=1.0, k_shortcut=0.0)),
        Method("K/V pooled 2×2", "K/V pooling", _pool(2, 2), pictures=True, sizes=True),
        Method("K/V pooled 2×4", "K/V pooling", _pool(2, 4), sizes=True),
        Method("K/V pooled 4×4", "K/V pooling", _pool(4, 4), pictures=True, sizes=True),
        Method("K/V pooled 8×8", "K/V pooling", _pool(8, 8)),
        Method("ToDo 2×2", "ToDo", todo=2, pictures=True),
        Method("corrected 2×2", "corrected agents", _corrected(0.75)),
        Method("corrected 4×4", "corrected agents", _corrected(1 - 1 / 16), pictures=True, sizes=True),
        Method("corrected 8×8", "corrected agents", _corrected(1 - 1 / 64), pictures=True, sizes=True),
        *(
            Method(f"corrected {side}×{side}, {exact:.0%} exact", "corrected agents, open cells", config, sizes=True)
            for side in (4, 8)
            for exact in (0.04, 0.14)
            for config in (_corrected(1 - 1 / side**2, exact_ratio=exact),)
        ),
        Method("corrected 8×8, then 4×4", "corrected agents, schedules", _corrected(1 - 1 / 64, **finer)),
        Method("corrected 4×4, first 60%", "corrected agents, schedules", _corrected(1 - 1 / 16, stages=early(0.6))),
        Method("corrected 4×4, two levels", "corrected agents, deeper", _corrected(1 - 1 / 16, **second), sizes=True),
        Method(
            "corrected 4×4, all levels", "corrected agents, deeper", _corrected(1 - 1 / 16, **deeper), pictures=True
        ),
        Method("grid 4×4, all levels", "grid agents, deeper", _agents("grid", 1 - 1 / 16, **deeper), pictures=True),
        Method("K/V pooled 4×4, all levels", "K/V pooling, deeper", _pool(4, 4, **deeper), pictures=True),
        Method("K/V pooled 2×2, shortcut .075", "K/V pooling, shortcut", _pool(2, 2, 0.075)),
        Method("K/V pooled 4×4, shortcut .15", "K/V pooling, shortcut", _pool(4, 4, 0.15)),
    ]


@contextmanager
def downsampled(unet: torch.nn.Module, s: int) -> Iterator[None]:
    """Let level 0 attend to each cell's first token in a `with` block: ToDo as published (arXiv 2402.13573)."""
    seams = []

    def handler(site: Any, seam: Any) -> Callable[[Call], Tensor]:
        def answer(call: Call) -> Tensor:
            x, side = call.x, math.isqrt(call.x.shape[1])  # latents are squares here
            few = x.unflatten(1, (side, side))[:, ::s, ::s].flatten(1, 2)
            attn = site.block.attn1
            q, k, v = (split_heads(t, site.heads) for t in (attn.to_q(x), attn.to_k(few), attn.to_v(few)))
            return seam.project_out(join_heads(F.scaled_dot_product_attention(q, k, v)))

        return answer

    try:
        for site in find_sites(unet):
            if site.downsample == 1:
                seams.append(site.seam())
                seams[-1].install(handler(site, seams[-1]))
        yield
    finally:
        for seam in seams:
            seam.remove()


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


def named(every: Sequence[Method], names: Sequence[str]) -> list[Method]:
    """The unpatched model, and the methods of these names; a name that no method has stands for all that contain it."""
    known = {method.name for method in every}
    return [
        method
        for method in every
        if method.name in ("unpatched", *names) or any(part in method.name for part in set(names) - known)
    ]


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


def cases(pipe: Any, size: tuple[int, int], samples: int, seed: int = 0) -> list[Case]:
    """`samples` noised training pictures at each timestep, with pictures and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    clean, made = pipe.latents_of(pipe.pictures).float(), []
    for t in TIMESTEPS:
        index = torch.randperm(len(clean), generator=generator)[:samples]
        x = covering(clean[index], *size)
        noise = torch.randn(x.shape, generator=generator)
        alpha = pipe.scheduler.alphas_cumprod[t]
        x = (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).to(pipe.dtype)
        case = Case(x, t, [pipe.prompts[i] for i in index])
        case.unpatched = _forward(pipe, case)
        made.append(case)
    return made


def _forward(pipe: Any, case: Case) -> Tensor:
    rows = zip(case.x.split(2), _chunks(case.prompts, 2), strict=True)
    return torch.cat([pipe.predict(x, case.t, prompts) for x, prompts in rows]).float()


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def deviations(pipe: Any, method: Method, noised: Sequence[Case]) -> list[list[float]]:
    """The relative deviation of each picture of each case from the unpatched model."""
    with method.on(pipe.unet):
        return [_deviation(_forward(pipe, case), case.unpatched).tolist() for case in noised]


def _deviation(out: Tensor, unpatched: Tensor) -> Tensor:
    """‖out − unpatched‖ / ‖unpatched‖ of each row."""
    return (out - unpatched).flatten(1).norm(dim=1) / unpatched.flatten(1).norm(dim=1)


def seconds(
    pipe: Any, chosen: Sequence[Method], size: tuple[int, int], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of a forward of two rows, by method; each round goes through all methods.

    With a schedule it is the mean over the steps of a picture.
    """
    pipe.scheduler.set_timesteps(STEPS)
    timesteps = [int(t) for t in pipe.scheduler.timesteps]
    parts = {method.name: method.parts(timesteps) for method in chosen}
    distinct = {_key(part): part for steps in parts.values() for part in steps}
    x, prompts = torch.randn(2, 4, *size).to(pipe.dtype), ["", pipe.prompts[0]]
    runs: dict[Any, list[float]] = {key: [] for key in distinct}
    for _ in tqdm(range(rounds + 1), desc=f"seconds {_shown(size)}", leave=False):
        for key, part in distinct.items():
            with part.on(pipe.unet):
                pipe.predict(x, 500, prompts)
                start = clock()
                pipe.predict(x, 500, prompts)
                runs[key].append(clock() - start)
    median = {key: statistics.median(times[1:]) for key, times in runs.items()}
    return {
        name: sum(median[_key(part)] * count for part, count in steps.items()) / len(timesteps)
        for name, steps in parts.items()
    }


def _key(part: Method) -> Any:
    return part.tomesd, part.todo, part.config


class Latents:
    """Final latents by method and prompt, in a file beside the results that only serves to go on."""

    def __init__(self, file: Path, key: str) -> None:
        self.file = file
        saved = torch.load(file) if file.exists() else {}
        self.data = saved if saved.get("key") == key else {"key": key, "made": {}}

    def of(self, method: Method) -> dict[int, Tensor]:
        return self.data["made"].setdefault((method.name, method.settings()), {})

    def drop(self, parts: Sequence[str]) -> None:
        made = self.data["made"].items()
        self.data["made"] = {key: of for key, of in made if not any(part in key[0] for part in parts)}

    def save(self) -> None:
        torch.save(self.data, self.file)


def pictures(
    pipe: Any, method: Method, index: Sequence[int], made: Latents, more: Callable[[], bool] = lambda: True
) -> Tensor | None:
    """Final latents of the prompts `index`, two at a time, in 20 steps of DDIM; each prompt's number is its seed.

    Those that are `made` are not made again. None where time runs out.
    """
    latents = made.of(method)
    with method.on(pipe.unet):
        for pair in _chunks([i for i in index if i not in latents], 2):
            if not more():
                return None
            prompts, noise = [pipe.prompts[i] for i in pair], pipe.noise(pair)
            found = pipe.sample(prompts, latents=noise, steps=STEPS, guidance=GUIDANCE)
            latents.update(zip(pair, found.clone().split(1), strict=True))
            made.save()
    return torch.cat([latents[i] for i in index])


def judge(pipe: Any, index: Sequence[int], latents: Tensor, unpatched: Tensor) -> dict[str, float]:
    """Deviation from the unpatched model's pictures, and the share that is nearest to the prompt's training picture."""
    nearest, distance = pipe.nearest(latents)
    return {
        "picture_deviation": float(_deviation(latents, unpatched).mean()),
        "retrieved": float((nearest.cpu() == torch.tensor(index)).float().mean()),
        "distance": float(distance.mean()),
        "pictures": len(index),
    }


class Store:
    """Rows of results by (method, size), in a file that is written after every change."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "fidelity.json"
        saved = json.loads(self.file.read_text()) if self.file.exists() else {}
        same = saved.get("about", {}).get("key") == about["key"]
        self.data = saved if same else {"about": dict(about), "rows": {}}

    def row(self, method: Method, size: tuple[int, int]) -> dict[str, Any]:
        empty = {"method": method.name, "family": method.family, "size": list(size)}
        row = self.data["rows"].setdefault(f"{method.name} @ {size[0]}x{size[1]}", dict(empty))
        settings = method.settings()
        if row.get("settings") != settings:  # measured with others
            row.clear()
            row.update(empty, settings=settings)
        return row

    def drop(self, parts: Sequence[str]) -> None:
        """Drop the rows of methods whose names contain one of `parts`."""
        rows = self.data["rows"].items()
        self.data["rows"] = {key: row for key, row in rows if not any(part in row["method"] for part in parts)}

    def keep(self, names: set[str]) -> None:
        self.data["rows"] = {key: row for key, row in self.data["rows"].items() if row["method"] in names}

    def save(self) -> None:
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is measured: another run may have begun more."""
        return [row for row in self.data["rows"].values() if "deviation" in row]


def run(
    pipe: Any,
    folder: Path,
    chosen: Sequence[Method],
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    samples: int = 8,
    rounds: int = 7,
    prompts: int = 10,
    key: str = "",
    clock: Callable[[], float] | None = time.perf_counter,
    again: Sequence[str] = (),
    more: Callable[[], bool] = lambda: True,
) -> Store:
    """Measure what is missing in `folder`, and write everything.

    Args:
        pipe: the embedded model.
        folder: the folder of the results.
        chosen: the methods, the unpatched model first.
        sizes: (height, width) of the latents; final pictures are made at the first.
        samples: pictures at each timestep at the first size; at larger ones fewer, but at least 2.
        rounds: timed rounds.
        prompts: number of final pictures of each method of the short list.
        key: identifies the weights and the clock; results with another key are dropped.
        clock: the clock for the seconds; None to measure none.
        again: methods whose names contain one of these are measured anew.
        more: whether there is time to begin anything; where there is none, tables and plots are left for the next run.
    """
    about = {"key": f"{key} samples {samples} pictures {prompts}", **machine()}
    store = Store(folder, about)
    store.drop(again)
    store.keep({method.name for method in (*methods(), *chosen)})
    for size in sizes:
        here = [m for m in chosen if m.sizes or size == sizes[0]]
        missing = [m for m in here if "deviation" not in store.row(m, size)]
        fewer = max(2, samples * sizes[0][0] * sizes[0][1] // (size[0] * size[1]))
        noised = cases(pipe, size, fewer) if missing else []
        for method in tqdm(missing, desc=f"deviation {_shown(size)}"):
            if not more():
                return store
            store.row(method, size)["deviation"] = deviations(pipe, method, noised)
            store.save()
        if clock and more() and any("seconds" not in store.row(m, size) for m in here):
            for name, value in seconds(pipe, here, size, rounds, clock).items():
                store.row(next(m for m in here if m.name == name), size)["seconds"] = value
            store.save()
    index = [i * len(pipe.prompts) // prompts for i in range(prompts)] if prompts else []
    missing = [m for m in chosen if m.pictures and "retrieved" not in store.row(m, sizes[0])] if prompts else []
    made = Latents(folder / "latents.pt", about["key"])
    made.drop(again)
    for method in tqdm(missing, desc="pictures"):
        latents = [pictures(pipe, m, index, made, more) for m in (chosen[0], method)]
        if latents[0] is None or latents[1] is None:
            return store
        store.row(method, sizes[0]).update(judge(pipe, index, latents[1], latents[0]))
        store.save()
    write_csv(store, folder / "fidelity.csv")
    (folder / "table.md").write_text(table(store, sizes), encoding="utf-8")
    for size in sizes:
        if all("seconds" in row for row in store.rows if row["size"] == list(size)):
            plot(store, size, folder / f"frontier-{size[0]}x{size[1]}.png")
    return store


def machine() -> dict[str, Any]:
    """The machine that the figures come from."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}


def mean(row: Mapping[str, Any]) -> float:
    """Mean deviation over all timesteps and pictures."""
    return statistics.fmean(value for case in row["deviation"] for value in case)


def write_csv(store: Store, file: Path) -> None:
    """Write one line for each method and size."""
    head = ["method", "height", "width", "seconds", "speedup", "deviation", "worst"]
    head += [f"t{t}" for t in TIMESTEPS] + ["picture_deviation", "retrieved", "distance"]
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(head)
        for row in store.rows:
            means = [statistics.fmean(case) for case in row["deviation"]]
            numbers = [row.get("seconds", ""), speedup(store, row) or "", mean(row), worst(row)]
            numbers += [*means, *(row.get(name, "") for name in head[-3:])]
            writer.writerow([row["method"], *row["size"], *(n if n == "" else f"{n:.5f}" for n in numbers)])


def worst(row: Mapping[str, Any]) -> float:
    """Largest deviation of a single picture."""
    return max(value for case in row["deviation"] for value in case)


def unpatched_row(store: Store, size: Sequence[int]) -> dict[str, Any]:
    """The unpatched model's row at this size."""
    return next(row for row in store.rows if row["method"] == "unpatched" and row["size"] == list(size))


def speedup(store: Store, row: Mapping[str, Any]) -> float | None:
    """The unpatched model's seconds over this row's; None where either is unknown."""
    seconds = [found.get("seconds") for found in (unpatched_row(store, row["size"]), row)]
    return seconds[0] / seconds[1] if all(seconds) else None


def table(store: Store, sizes: Sequence[tuple[int, int]]) -> str:
    """The results in Markdown, one table for each size."""
    parts = []
    for size in sizes:
        rows = [row for row in store.rows if row["size"] == list(size)]
        timed = any("seconds" in row for row in rows)
        lines = [f"Latent {_shown(size)}, N = {size[0] * size[1]}:", ""]
        head = ["method", *(["s per forward", "speed-up"] if timed else []), *(f"t={t}" for t in TIMESTEPS)]
        head += ["mean", "worst", "picture", "retrieved"]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for row in rows:
            cells = [row["method"]]
            if timed:
                ratio = speedup(store, row)
                cells += [f"{row['seconds']:.3f}", f"{ratio:.2f}×"] if ratio else ["", ""]
            cells += [_figure(statistics.fmean(case)) for case in row["deviation"]]
            cells += [f"**{_figure(mean(row))}**", _figure(worst(row))]
            cells += [_figure(row["picture_deviation"]) if "retrieved" in row else ""]
            cells += [f"{row['retrieved'] * row['pictures']:.0f}/{row['pictures']}" if "retrieved" in row else ""]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _shown(size: Sequence[int]) -> str:
    """(height, width) as people read it, width first."""
    return f"{size[1]}×{size[0]}"


def _figure(x: float) -> str:
    return f"{x:.4f}" if x else "0"


def plot(store: Store, size: tuple[int, int], file: Path) -> None:
    """Draw deviation over seconds, a line for each family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in store.rows if row["size"] == list(size) and row["method"] != "unpatched"]
    unpatched = unpatched_row(store, size)["seconds"]
    figure, axes = plt.subplots(figsize=(12, 7.5), layout="constrained")
    families, names = list(dict.fromkeys(row["family"] for row in rows)), []
    for i, family in enumerate(families):
        points = sorted((row["seconds"], mean(row), row["method"]) for row in rows if row["family"] == family)
        style = (
            {"marker": "*", "markersize": 13}
            if family.startswith(("corrected", "local"))
            else {"marker": "o", "markersize": 6}
        )
        axes.plot(*zip(*[p[:2] for p in points], strict=True), **style, color=f"C{i % 10}", alpha=0.85, label=family)
        for x, y, name in points:
            names.append(axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7))
    axes.axvline(unpatched, color="grey", linewidth=0.8, linestyle=":", label="unpatched")
    axes.set_yscale("log")
    axes.set_xlabel("seconds per forward (two rows)")
    axes.set_ylabel("relative deviation from the unpatched model, mean over t")
    axes.set_title(f"Embedded model, latent {_shown(size)}: lower left is better")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.canvas.draw()
    _keep_legible(names)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _keep_legible(names: Sequence[Any]) -> None:
    """Remove names that would cover others: the closest methods keep theirs; the table has them all."""
    kept = []
    for name in sorted(names, key=lambda name: name.xy[1]):
        box = name.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            name.remove()
        else:
            kept.append(box)


QUICK = ("unpatched", "tomesd .5", "grid 4×4", "K/V pooled 2×2", "K/V pooled 4×4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results (docs/fidelity, or out/fidelity with --quick)")
    parser.add_argument("--quick", action="store_true", help="few methods, one size, no final pictures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only methods of these names, or with one in theirs")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="latent sizes, WIDTHxHEIGHT: 64x64 96x64")
    parser.add_argument("--samples", type=int, default=8, help="pictures at each timestep (8)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--pictures", type=int, default=10, help="final pictures per method (10)")
    parser.add_argument(
        "--queries",
        type=float,
        default=1.0,
        help="factor on the queries of all self-attention (1); above it, no seconds",
    )
    parser.add_argument("--untimed", action="store_true", help="measure no seconds")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="measure anew: parts of methods' names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many minutes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU seconds of one thread, on a machine with other work to do"
    )
    args = parser.parse_args(arguments)

    from agentsd.embedded import load
    from agentsd.embedded.model import WEIGHTS

    chosen = methods()
    if args.only:
        chosen = named(chosen, args.only)
    sizes = [_size(text) for text in args.sizes] if args.sizes else list(SIZES)
    if args.quick:
        chosen = [m for m in chosen if m.name in QUICK or m.family.startswith("corrected")]
        args.samples, args.rounds, args.pictures, sizes = 2, 3, 0, [(64, 64)]
    folder = args.out or Path("out/fidelity" if args.quick else "docs/fidelity")
    if args.queries != 1 and not args.out:
        folder /= f"queries{args.queries:g}"
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    key = f"{_digest(WEIGHTS / 'model.safetensors')} {clock.__name__}"
    if args.queries != 1:
        key += f" queries {args.queries:g}"
    if args.untimed or args.queries != 1:
        clock = None
    end = time.monotonic() + 60 * args.minutes

    def more() -> bool:
        return time.monotonic() < end

    pipe = load()
    with sharpened(pipe.unet, args.queries):
        run(pipe, folder, chosen, sizes=sizes, samples=args.samples, rounds=args.rounds, prompts=args.pictures,
            clock=clock, key=key, again=args.again, more=more)  # fmt: skip
    print(f"written to {folder}/" if more() else "out of time: the next run goes on")


def _size(text: str) -> tuple[int, int]:
    """(height, width) of a size that is written width first."""
    width, height = map(int, text.replace("×", "x").split("x"))
    return height, width


def _digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
