"""Random settings, sizes, dtypes, orders of calls, threads and neighbours on tiny models: `make stress`.

Prints its seed and a line for each failure; `--seed N --count 1` makes one case again, which is drawn from its number.
A patch costs no image that the host makes, repeats itself whatever ran before, does as `explain` says and leaves no
trace.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import pickle
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import blocks  # noqa: E402
import tiny_pipelines as tiny  # noqa: E402
import tomesd  # noqa: E402

import agentsd  # noqa: E402
from agentsd import Rule, get_patch  # noqa: E402
from agentsd.config import FIELDS, RULE_SETTINGS  # noqa: E402

Call = Callable[[nn.Module], Tensor]
# How to make each model, and what the sides of its latents are multiples of
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LDM": (blocks.golden_unet, 2),
    "LDM, one level": (blocks.flat_unet, 1),
    "LDM, SDXL's layout": (blocks.sdxl_like_unet, 4),
    "diffusers": (tiny.tiny_unet, 1),
    "diffusers, SDXL": (tiny.tiny_sdxl_unet, 1),
}
ACTIONS = ("again", "other first", "copy", "pickle", "off and on", "watched", "threads")
ANY, DIFFUSERS = ("hook", "wrapped", "projection"), ("slicing", "fused", "tomesd")  # neighbours
MADE: dict[Any, nn.Module] = {}
FEW = 20  # cases, below which a run is not asked how much it has tested


def value_of(draw: random.Random, name: str) -> Any:
    row = FIELDS[name]
    if draw.random() < 0.5:
        return row.default
    if row.kind in ("flag", "choice"):
        return draw.choice(row.choices or (True, False))
    if name in ("min_tokens", "max_agents", "seed"):
        return draw.choice((1, 3, 16, 64, 200, row.default))
    if row.kind == "whole":
        return draw.randint(int(row.low), int(row.high))
    return draw.choice((row.low, row.high, round(draw.uniform(row.low, row.high), 3)))


def settings_of(draw: random.Random) -> dict[str, Any]:
    rules = []
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        since, until = sorted(draw.sample(range(11), 2))
        own = {name: value_of(draw, name) for name in draw.sample(RULE_SETTINGS, draw.randint(0, 3))}
        levels, names = draw.choice(((), 1, 2, (1, 2))), draw.choice(((), "*down*", "input_blocks.1.*", "mid*"))
        rules.append(Rule(draw.choice((own, None)), levels, names, since / 10, until / 10))
    stages = draw.choice(((), (), (), agentsd.early(draw.randint(1, 10) / 10), agentsd.paper_stages()))
    return {**{name: value_of(draw, name) for name in FIELDS}, "rules": tuple(rules), "stages": stages}


def call_of(draw: random.Random, name: str, unet: nn.Module, dtype: torch.dtype) -> Call:
    """A call of the model at a size and a timestep."""
    step = MODELS[name][1]
    height, width = (step * draw.randint(1, 24 // step) for _ in range(2))
    rows, t = draw.choice((1, 2, 2, 3)), draw.choice((0, 999, 500, 600, 400, draw.randint(2, 1000)))
    if name.startswith("LDM"):
        x, steps, context = blocks.inputs(rows, height, width, draw.randint(0, 99), [t] * rows)
        return lambda model: model(x, steps, context=context)
    given = tiny.unet_inputs(unet, height, width, rows, t)
    for tensors in (given, given.get("added_cond_kwargs", {})):
        tensors |= {k: v.to(dtype) for k, v in tensors.items() if isinstance(v, Tensor) and k != "timestep"}
    sample = given.pop("sample")
    return lambda model: model(sample, **given).sample


@contextlib.contextmanager
def neighbour(kind: str, unet: nn.Module) -> Iterator[None]:
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    with contextlib.ExitStack() as undo:
        if kind == "hook":
            for attn in attentions:
                undo.callback(attn.register_forward_hook(lambda m, args, out: out * 1.0).remove)
        elif kind in ("wrapped", "projection"):
            for module in attentions if kind == "wrapped" else [attn.to_k for attn in attentions]:
                module.forward = lambda *args, f=module.forward, **kwargs: f(*args, **kwargs)
                undo.callback(module.__dict__.pop, "forward", None)
        elif kind == "slicing":
            unet.set_attention_slice(1)
            undo.callback(unet.set_default_attn_processor)
        elif kind == "fused":
            unet.fuse_qkv_projections()
            undo.callback(unet.unfuse_qkv_projections)
        elif kind == "tomesd":
            tomesd.apply_patch(unet, ratio=0.4, use_rand=False)
            undo.callback(tomesd.remove_patch, unet)
        yield


@torch.no_grad()
def case(number: int, said: list[Any]) -> str:
    """Make a case; return "skipped" where the host itself can't, "acted" if something was changed without a note."""
    draw = random.Random(number)
    name, dtype = draw.choice(list(MODELS)), draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    if (name, dtype) not in MADE:
        unet = MODELS[name][0]()
        MADE[name, dtype] = unet if name.startswith("LDM") else unet.to(dtype)
    unet = MADE[name, dtype]
    settings = settings_of(draw)
    call, other = (call_of(draw, name, unet, dtype) for _ in range(2))
    kind = draw.choice(("none", "none", *ANY, *(DIFFUSERS if hasattr(unet, "config") else ())))
    # LDM embeds timesteps in float32, so that it knows halves by autocast alone, which other threads don't have
    cast = dtype != torch.float32 and name.startswith("LDM")
    said += [name, dtype, {k: v for k, v in settings.items() if k not in FIELDS or v != FIELDS[k].default}, kind]
    with torch.autocast("cpu", dtype, enabled=cast), neighbour(kind, unet):
        before = blocks.tree(unet)
        steady = False
        # too small for the host or for tomesd; and PyTorch's halves in tiny convolutions aren't the same twice
        with contextlib.suppress(ValueError, RuntimeError, IndexError, ZeroDivisionError):
            plain, _, *again = call(unet), other(unet), *(call(unet) for _ in range(4))
            steady = bool(plain.isfinite().all()) and all(torch.equal(plain, one) for one in again)
        if not steady:
            return "skipped"
        agentsd.apply_patch(unet, **settings)
        patch, ours = get_patch(unet), call(unet)
        assert (ours.shape, ours.dtype, bool(ours.isfinite().all())) == (plain.shape, plain.dtype, True), "alike"
        planned = dict(patch.explain(*patch.last_call.latent, patch.last_call.progress))
        for layer in patch.report() if not patch.notes else ():
            says = "untouched" if planned[layer.name] is None else planned[layer.name].action
            assert list(layer.calls) in ([says], []), f"{layer.name} {layer.calls}, explained as {says}"
        acted = not patch.notes and any(layer.calls.keys() - {"untouched"} for layer in patch.report())
        for action in draw.sample(ACTIONS[:-1] if cast or kind == "tomesd" else ACTIONS, 2):
            said.append(action)
            assert all(torch.equal(out, ours) for out in after(action, unet, call, other, kind)), f"{action}: the same"
            patch.observe_closeness = False
        assert not any("an error of ours" in note for note in patch.notes), f"no error of ours: {dict(patch.notes)}"
        agentsd.remove_patch(unet)
        assert blocks.tree(unet) == before or kind in ("slicing", "fused", "tomesd"), "no trace"
        assert torch.equal(call(unet), plain), "like plain after removal"
    return "acted" if acted else "left alone"


def after(action: str, unet: nn.Module, call: Call, other: Call, kind: str) -> list[Tensor]:
    patch, model = get_patch(unet), unet
    if action == "other first":
        other(unet)
    elif action == "watched":
        patch.observe_closeness = True
        patch.measure()
    elif action == "off and on":
        patch.remove()
        call(unet)
        patch.install()
    elif action == "threads":
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(torch.no_grad()(lambda each: each(unet)), (call, other, call, other, call)))[::2]
    elif action in ("copy", "pickle") and kind in ("none", "slicing", "fused"):
        model = copy.deepcopy(unet) if action == "copy" else pickle.loads(pickle.dumps(unet))
    return [call(model), call(model)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--count", type=int, default=20000)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("seed", args.seed, flush=True)
    began, done = time.monotonic(), 0
    ends: Counter[str] = Counter()
    while done < args.count and time.monotonic() - began < args.seconds:
        number, said = args.seed + done, []
        done += 1
        try:
            ends[case(number, said)] += 1
        except Exception as error:
            ends["failed"] += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            print(number, type(error).__name__, f"{Path(at.filename).name}:{at.lineno}", error, said, flush=True)
            MADE.clear()
    print(f"{done} cases, {time.monotonic() - began:.0f} s:", ", ".join(f"{ends[end]} {end}" for end in sorted(ends)))
    # one case made again may be any; a run has to have tested something
    idle = done == 0 or (done >= FEW and (2 * ends["skipped"] > done or not ends["acted"]))
    if idle:
        print("nothing is tested: too many cases are skipped, or none acts")
    return bool(ends["failed"] or idle)


if __name__ == "__main__":
    sys.exit(main())
