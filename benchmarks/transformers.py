"""Transformers: seconds of one attention, and whether tuning keeps its tolerance on one that was trained.

`python -m benchmarks.transformers speed` times one attention over text and image beside SDPA.
Queries, keys and values are random, in the shapes of SD 3 medium (heads of 64, 333 tokens of text) and Flux (heads of
128, 512 tokens of text); what is timed is what the patch does in place of `F.scaled_dot_product_attention`. Heads are
independent, so a few of the 24 stand for all. Each round calls everything once, in random order; ratios are medians
over rounds of the ratio within a round. Nothing is said about pictures.

`... whole` times a transformer of SD 3 medium's width and two blocks, random weights, beside what the times of one
attention predict.

`... train` trains a witness, a small SD 3 on the embedded model's pictures, whose attention has the structure that
random weights lack. `... tolerance` tunes it on two pictures and looks at eight others. Its clock counts FLOPs, since a
thousand tokens are too few for any gain in seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import agentsd
from agentsd import AgentConfig
from agentsd.attention.grid import Grid
from agentsd.embedded import EmbeddedPipeline, load
from agentsd.hosts import FAMILIES, JointCall
from agentsd.methods import LayerPlan, method_named
from agentsd.patching.call import Planned
from agentsd.patching.joint import JointAnswerer, share_left
from agentsd.tuning.replay import Replay

from .machine import DTYPES, Machine, choose_device, in_turn, parser_for, relative
from .methods import patched
from .results import in_words, table

# family, head size, tokens of text, whether tokens stand before heads in memory
SHAPES = {
    "SD 3 medium": ("SD3Transformer2DModel", 64, 333, False),
    "Flux": ("FluxTransformer2DModel", 128, 512, True),
}
HEADS, SIDES = 24, (64, 96, 128)
SETTINGS = {
    f"{exact}, {side}×{side}": AgentConfig(method="corrected", agent_ratio=1 - 1 / side**2, exact_ratio=exact)
    for exact in (0.14, 0.0)
    for side in (4, 8)
}


def attention_call(name: str, tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> JointCall:
    """A call of one attention, as the processor makes it from a transformer's."""
    family, head, text, by_tokens = SHAPES[name]
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(3, 1, tokens + text, heads, head, generator=generator).to(device, dtype).transpose(2, 3)
    q, k, v = qkv if by_tokens else qkv.contiguous()
    return JointCall(FAMILIES[family], F.scaled_dot_product_attention, q, k, v, {})


def plans_of(grid: Grid) -> dict[str, LayerPlan]:
    return {key: method_named(config.method).plan(config, *grid, 0) for key, config in SETTINGS.items()}


def answers(call: JointCall, grid: Grid) -> dict[str, Callable[[], Tensor]]:
    """What the patch does in place of a call, by setting."""
    planned = {key: Planned(SETTINGS[key], plan, grid) for key, plan in plans_of(grid).items()}
    return {key: partial(JointAnswerer().answer, None, call, each, None) for key, each in planned.items()}


@torch.inference_mode()
def measure(name: str, side: int, dtype: str, heads: int, rounds: int, machine: Machine) -> list[str]:
    """A row of the table for one shape at one size."""
    grid = Grid(side, side)
    call = attention_call(name, grid.tokens, heads, DTYPES[dtype], machine.device)
    shares = {key: share_left(plan, SHAPES[name][2]) for key, plan in plans_of(grid).items()}
    taken = in_turn({"sdpa": call.proceed, **answers(call, grid)}, rounds, machine)
    ratios = relative(taken, "sdpa")
    whole = median(taken["sdpa"]) * HEADS / heads
    cells = [f"{ratios[key]:.2f} ({shares[key]:.2f})" for key in SETTINGS]
    return [name, f"{grid.tokens:,}", dtype, f"{whole:.2f}", *cells]


@torch.inference_mode()
def whole(side: int, dtype: str, rounds: int, machine: Machine) -> list[str]:
    """A row for a transformer: its time over full attention's, measured (predicted from one attention alone)."""
    name, grid, blocks, kind = "SD 3 medium", Grid(side, side), 2, {"device": machine.device, "dtype": DTYPES[dtype]}
    torch.manual_seed(0)
    shapes = (1, 16, 2 * side, 2 * side), (1, SHAPES[name][2], 4096), (1, 2048)
    inputs = [*(torch.randn(shape, **kind) for shape in shapes), torch.tensor([500.0], **kind)]
    layout = {"num_layers": blocks, "num_attention_heads": HEADS, "caption_projection_dim": HEADS * SHAPES[name][1]}
    model = SD3Transformer2DModel(**layout, sample_size=2 * side, pos_embed_max_size=side).to(**kind).eval()
    call = attention_call(name, grid.tokens, HEADS, DTYPES[dtype], machine.device)

    def with_agents(config: AgentConfig) -> Tensor:
        with patched(config)(model):
            return model(*inputs).sample

    alone = in_turn({"sdpa": call.proceed, **answers(call, grid)}, rounds, machine)
    runs = {key: partial(with_agents, config) for key, config in SETTINGS.items()}
    taken = in_turn({"whole": lambda: model(*inputs).sample, **runs}, rounds, machine)
    full, ratios, cells = median(taken["whole"]), relative(taken, "whole"), []
    for key in SETTINGS:
        saved = median(alone["sdpa"]) - median(alone[key])
        cells.append(f"{ratios[key]:.2f} ({1 - blocks * saved / full:.2f})")
    return [f"{grid.tokens:,}", dtype, f"{full:.2f}", f"{blocks * median(alone['sdpa']):.2f}", *cells]


# The witness: a small SD 3 in the flow from the embedded model's latents (sigma 0) to noise (sigma 1)

SIDE = 64  # of its latents: 32×32 tokens
WITNESS = {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128}
WITNESS |= {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 128, "pooled_projection_dim": 128}
WITNESS |= {"sample_size": SIDE, "pos_embed_max_size": SIDE // 2, "qk_norm": "rms_norm"}
BATCH, RATE, SMALL = 8, 2e-3, 0.55  # pictures a step, learning rate, share of the time at half the size
TUNED_ON, CHECKED_ON, GUIDANCE = (0, 30), range(1, 100, 13), 3.0  # pictures, by number


def train(args: argparse.Namespace) -> None:
    """Train the witness, first on pictures of half the size, and keep the average of its weights."""
    torch.manual_seed(0)
    pipe, model = load(), SD3Transformer2DModel(**WITNESS)
    latents, texts = pipe.latents_of(pipe.pictures), pipe.encode(pipe.prompts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    positions, whole = model.pos_embed.pos_embed.unflatten(1, (SIDE // 2,) * 2), model.pos_embed.cropped_pos_embed
    start, step, done = time.perf_counter(), 0, 0.0
    while (done := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * min(1, 2 * (1 - done) + 0.02)
        rows, sigma = torch.randint(len(latents), (BATCH,)), torch.randn(BATCH).sigmoid()
        clean, noise = latents[rows], torch.randn(BATCH, 4, SIDE, SIDE)
        model.pos_embed.cropped_pos_embed = whole
        if done < SMALL:
            clean, noise = F.avg_pool2d(clean, 2), F.avg_pool2d(noise, 2)
            model.pos_embed.cropped_pos_embed = lambda height, width: positions[:, ::2, ::2].flatten(1, 2)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            v = model(noisy, texts[rows], texts[rows].mean(1), 1000 * sigma, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        kept, now = min(0.995, step / (9 + step)), model.state_dict()
        torch._foreach_lerp_([*average.values()], [*now.values()], 1 - kept)
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}, loss {loss.item():.3f}", flush=True)
    torch.save(average, args.weights)


def witness(path: Path | None) -> nn.Module:
    """The trained witness, or one of random weights."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**WITNESS).eval()
    if path is not None:
        model.load_state_dict(torch.load(path))
    return model


@torch.no_grad()
def sample(model: nn.Module, pipe: EmbeddedPipeline, picture: int, seed: int, steps: int) -> Tensor:
    """Make latents of one picture by Euler's method, with guidance."""
    x, texts = pipe.noise([seed]), pipe.encode(["", pipe.prompts[picture]])
    for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        given = torch.cat([x, x]), texts, texts.mean(1), torch.full((2,), 1000 * now)
        uncond, cond = model(*given, return_dict=False)[0].chunk(2)
        x = x + (then - now) * (uncond + GUIDANCE * (cond - uncond))
    return x


class Flops:
    """A clock that counts FLOPs of matrix products, in billions."""

    def timed(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = run()
        return result, counter.get_total_flops() / 1e9


def unseen(model: nn.Module, pipe: EmbeddedPipeline) -> list[Replay]:
    """Calls with full attention of other pictures, seeds and noise levels than are tuned on."""
    replays = []
    for picture in CHECKED_ON:
        with agentsd.record_calls(model, 5) as calls:
            sample(model, pipe, picture, 100 + picture, 9)
        replays.append(Replay(model, calls))
        for number in range(len(calls)):
            replays[-1].remember(number, "")
    return replays


@torch.no_grad()
def deviations(replays: list[Replay], config: AgentConfig) -> str:
    """By how much these calls deviate under a config: the mean, and the worst of all."""
    found = [each.deviation(n, each.call(n, "", config)[0]) for each in replays for n in range(len(each))]
    return f"{fmean(found):.2%} ({max(found):.2%})"


def tolerance(args: argparse.Namespace) -> None:
    """Tune the witness to several tolerances, and say by how much other pictures deviate."""
    pipe, model = load(), witness(args.weights)
    made = [sample(model, pipe, picture, 7, 16) for picture in CHECKED_ON]
    found, distance = pipe.nearest(torch.cat(made))
    own = sum(a == b for a, b in zip(found.tolist(), CHECKED_ON, strict=True))
    print(f"of {len(made)} pictures, {own} are nearest to their own; mean distance {distance.mean():.3f}")
    fixed, calls, rows = AgentConfig(method="corrected", exact_ratio=0.14), [], []
    others = unseen(model, pipe)
    for name, each in (("trained", others), ("random weights", unseen(witness(None), pipe))):
        print(f"{name}: corrected, exact_ratio 0.14 everywhere deviates by {deviations(each, fixed)}", flush=True)
    for picture in TUNED_ON:
        with agentsd.record_calls(model, 3) as recorded:
            sample(model, pipe, picture, picture, 12)
        calls += recorded
    for limit in (0.02, 0.05, 0.1, 0.2):
        tuning = agentsd.tune(model, calls, limit, clock=Flops())
        with agentsd.patched(model, tuning=tuning):
            ours = [sample(model, pipe, picture, 7, 16) for picture in CHECKED_ON]
        latents = fmean(((a - b).norm() / b.norm()).item() for a, b in zip(ours, made, strict=True))
        deviation = deviations(others, tuning.config_for(model))
        rows.append([f"{limit:.1%}", f"{tuning.measured:.2%}", deviation, f"{latents:.2%}", f"{tuning.plan.time:.2f}"])
        print(*rows[-1], *tuning.choices, flush=True)
    head = ["tolerance", "tuned on", "others, mean (worst)", "final latents", "FLOPs"]
    print(*table(head, rows), sep="\n")


def speed(args: argparse.Namespace) -> None:
    """Time one attention of each shape at each size, or a whole transformer at each size."""
    machine, head = Machine(choose_device(args.device)), ["image tokens", "dtype"]
    if args.what == "whole":
        print("Seconds over those with full attention (predicted from one attention)", end=" ")
        head += ["whole, s", "its attention, s"]
        rows = [partial(whole, side, d, args.rounds) for d in args.dtypes for side in args.sides]
    else:
        print(f"Seconds over SDPA's (FLOPs over its), {args.heads} of {HEADS} heads,", end=" ")
        head, given = ["shape", *head, "SDPA, s"], (args.heads, args.rounds)
        rows = [partial(measure, name, side, d, *given) for name in SHAPES for d in args.dtypes for side in args.sides]
    print(f"by exact_ratio and cells; {in_words(machine.describe())}; {args.rounds} rounds\n")
    print(*table([*head, *SETTINGS], [row(machine) for row in tqdm(rows)]), sep="\n")


def main() -> None:
    parser = parser_for("benchmarks.transformers", __doc__)
    add = parser.add_argument
    add("what", nargs="?", default="speed", choices=("speed", "whole", "train", "tolerance"))
    add("--heads", type=int, default=4, help="heads to compute, of 24")
    add("--rounds", type=int, default=5)
    add("--sides", type=int, nargs="+", default=SIDES, help="sides of the image in tokens")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--device", default="cpu")
    add("--minutes", type=float, default=21, help="of training")
    add("--weights", type=Path, default=Path("out/witness.pt"))
    args = parser.parse_args()
    {"speed": speed, "whole": speed, "train": train, "tolerance": tolerance}[args.what](args)


if __name__ == "__main__":
    main()
