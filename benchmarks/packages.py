"""Whole images beside other packages that speed up a pipeline: `python -m benchmarks.packages`.

Pictures of the embedded model by diffusers, without and with corrected agents over 4×4 cells, for each package that is
installed: DeepCache, tgate, ca-tome (with `--no-deps`), tomesd, hidiffusion. Speed-ups are medians over interleaved
rounds, over a pipeline without anything.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

import agentsd
from agentsd.embedded.model import load

from .machine import Machine, in_turn, parser_for, relative
from .results import in_words, table, times


def DeepCache(pipe: Any, package: Any, steps: int) -> Callable[..., Any]:
    helper = package.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return pipe


def tgate(pipe: Any, package: Any, steps: int) -> Callable[..., Any]:
    package.TgateSDLoader(pipe)
    return lambda **given: pipe.tgate(gate_step=steps // 2, **given)


def ca_tome(pipe: Any, package: Any, steps: int) -> Callable[..., Any]:
    return package.apply_CA_ToMe(pipe, package.CacheConf.CONFIG_2, r=0.5).call


def tomesd(pipe: Any, package: Any, steps: int) -> Callable[..., Any]:
    return package.apply_patch(pipe, ratio=0.5)


def hidiffusion(pipe: Any, package: Any, steps: int) -> Callable[..., Any]:
    pipe.register_to_config(_name_or_path="runwayml/stable-diffusion-v1-5")
    package.apply_hidiffusion(pipe, apply_raunet=False)
    return pipe


PACKAGES = {f.__name__: f for f in (DeepCache, tgate, ca_tome, tomesd, hidiffusion)}


def pipeline(unet: torch.nn.Module, scheduler: Any) -> StableDiffusionPipeline:
    """A pipeline of the embedded model; its VAE only says how large a latent is."""
    sides = {"block_out_channels": (8,) * 4, "norm_num_groups": 4}
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **sides)
    pipe = StableDiffusionPipeline(
        vae, None, None, copy.deepcopy(unet), copy.deepcopy(scheduler), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = parser_for("benchmarks.packages", __doc__)
    for name, default in (("--rounds", 5), ("--steps", 6), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load()
    # hidiffusion imports a module of diffusers by its old name
    old = "diffusers.pipelines.controlnet.multicontrolnet"
    sys.modules.setdefault(old, importlib.import_module("diffusers.models.controlnets.multicontrolnet"))
    calls: dict[tuple[str, bool], Callable[..., Any]] = {}
    for name, ours in ((name, ours) for name in ("none", *PACKAGES) for ours in (False, True)):
        pipe = pipeline(model.unet, model.scheduler)
        try:
            call = pipe if name == "none" else PACKAGES[name](pipe, importlib.import_module(name), args.steps)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        if ours:
            agentsd.apply_patch(pipe, method="corrected", ratio=0.0, agent_ratio=1 - 1 / 16)
        calls[name, ours] = call
    given = {"prompt_embeds": model.encode(["red apple"]), "negative_prompt_embeds": model.encode([""])}
    given |= {"num_inference_steps": args.steps, "height": 512, "width": 512, "output_type": "latent"}
    machine, none = Machine(torch.device("cpu")), ("none", False)
    runs = {key: partial(_run, call, given) for key, call in calls.items()}
    taken = in_turn(runs, args.rounds, machine)
    gains = {key: times(1 / ratio) for key, ratio in relative(taken, none).items()}
    print(f"{in_words(machine.describe())}; diffusers {diffusers.__version__};", end=" ")
    print(f"{args.rounds} rounds of {args.steps} steps, {median(taken[none]):.2f} s without anything\n")
    rows = [[name, gains[name, False], gains[name, True]] for name, ours in calls if ours]
    print(*table(["package", "alone", "with ours"], rows), sep="\n")


def _run(call: Callable[..., Any], given: dict[str, Any]) -> None:
    call(**given, generator=torch.manual_seed(1))


if __name__ == "__main__":
    main()
