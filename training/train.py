"""Train the embedded model on a CPU; see training/README.md.

There are two phases, each of which resumes from the run folder:

`body`: levels 1 to 3 of the U-Net at 32×32. Pictures and noise are those of the 64×64 problem, averaged over 2×2
pixels, so the body learns its part of that problem at a quarter of the cost.

`full`: the whole U-Net at 64×64, starting from the body.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from agentsd.embedded.model import TextEncoder, build_unet, read_json, read_pictures, vocabulary_of

SAVE_EVERY = 180.0  # seconds
LOG_EVERY = 20  # steps
TOKENS = 4096  # of level 0
LEVEL_0 = ("conv_in", "down_blocks.0", "up_blocks.2.upsamplers", "up_blocks.3", "conv_norm_out", "conv_out")


class Model(nn.Module):
    """U-Net and text encoder; in the first phase also a stem and a head for the body at 32×32."""

    def __init__(self, config: dict[str, Any], vocabulary: list[str], body: bool):
        super().__init__()
        c = config["unet"]
        self.unet = build_unet(c)
        self.text = TextEncoder(vocabulary, config["tokens"], c["cross_attention_dim"])
        self.body = body
        if body:
            outer, inner = c["block_out_channels"][:2]
            norm = nn.GroupNorm(c["norm_num_groups"], inner)
            self.stem = nn.Conv2d(c["in_channels"], outer, 3, padding=1)
            self.head = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(inner, c["out_channels"], 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        context = self.text(ids)
        return self._inner(x, t, context) if self.body else self.unet(x, t, context).sample

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the phase trains."""
        outer = tuple(f"unet.{name}" for name in LEVEL_0) if self.body else ()
        return [p for name, p in self.named_parameters() if not name.startswith(outer)]

    def _inner(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Levels 1 to 3 of the U-Net, with the stem and the head in place of level 0's ways down and up."""
        u = self.unet
        emb = u.time_embedding(u.get_time_embed(sample=x, timestep=t)) + u.add_embedding(context)
        h = self.stem(x)
        skips = [h]
        for block in u.down_blocks[1:]:
            h, states = block(hidden_states=h, temb=emb, encoder_hidden_states=context)
            skips.extend(states)
        h = u.mid_block(h, emb, encoder_hidden_states=context)
        for block in u.up_blocks[:-1]:
            popped, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            upsamplers = block.upsamplers
            if block is u.up_blocks[-2]:
                block.upsamplers = None  # the body ends at 32×32
            h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=tuple(popped), encoder_hidden_states=context)
            block.upsamplers = upsamplers
        return self.head(h)


class Level0Attention:
    """Self-attention of level 0 over a random subset of the keys, drawn anew at every step.

    It estimates full attention in a fraction of the time. The last part of the training attends to all keys.

    Attributes:
        index: the keys of this step, the same for all layers; None for all keys.
    """

    index: Tensor | None = None

    @classmethod
    def draw(cls, keys: int) -> None:
        """Draw the keys of the next step."""
        cls.index = torch.randperm(TOKENS)[:keys].sort().values if keys < TOKENS else None

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if self.index is not None:
            k, v = k[:, :, self.index], v[:, :, self.index]
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Ema:
    """Exponential moving average of the weights; its decay warms up."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.step = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        now = model.state_dict()
        torch._foreach_lerp_([self.shadow[k] for k in now], list(now.values()), 1 - decay)


class Batches:
    """Picture indices in shuffled epochs, and stratified timesteps; the same in every worker."""

    def __init__(self, count: int, size: int):
        self.count, self.size, self.queue = count, size, torch.zeros(0, dtype=torch.long)
        self.order = torch.Generator().manual_seed(0)

    def pictures(self) -> Tensor:
        """Indices of the next batch's pictures."""
        while len(self.queue) < self.size:
            self.queue = torch.cat([self.queue, torch.randperm(self.count, generator=self.order)])
        head, self.queue = self.queue[: self.size], self.queue[self.size :]
        return head

    def timesteps(self, noisy: float, start: int = 650, end: int = 1000) -> Tensor:
        """Draw timesteps, a share `noisy` of them in [start, end), where the layout of the picture is decided."""
        strata = torch.randperm(self.size, generator=self.order) + torch.rand(self.size, generator=self.order)
        u = strata / self.size
        clean = u / (1 - noisy) * start
        layout = start + (u - 1 + noisy) / noisy * (end - start)
        return torch.where(u < 1 - noisy, clean, layout).long().clamp(0, end - 1)


def drop_words(ids: Tensor) -> Tensor:
    """Drop one prompt in ten (for guidance), and one word of one in ten prompts of several words."""
    ids = ids.clone()
    for row in ids:
        n = int((row > 0).sum())
        if n > 1 and torch.rand(()) < 0.1:
            k = int(torch.randint(n, ()))
            row[k:-1] = row[k + 1 :].clone()
        if torch.rand(()) < 0.1:
            row.zero_()
    return ids


def learning_rate(step: int, progress: float, peak: float, final: float, warmup: int = 60) -> float:
    """A cosine over the progress in [0, 1] from the peak to the final rate, with a linear warm-up over steps."""
    return min(1.0, (step + 1) / warmup) * (final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def average(parameters: list[nn.Parameter], workers: int) -> None:
    """Average the gradients over the workers."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.div_(workers).split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))


def grow(model: Model, body: dict[str, Tensor]) -> None:
    """Initialise the whole U-Net from the body: fit level 0's way down to the stem, and zero its residual branches."""
    model.load_state_dict({k: v for k, v in body.items() if not k.startswith(("stem.", "head."))})
    u = model.unet
    way_down = [u.conv_in, u.down_blocks[0].downsamplers[0].conv]
    optimizer = torch.optim.Adam([p for m in way_down for p in m.parameters()], 3e-3)
    for _ in range(400):
        coarse = F.interpolate(torch.randn(8, 4, 8, 8), scale_factor=4, mode="bilinear")
        x = torch.randn(8, 4, 32, 32) * torch.rand(8, 1, 1, 1) + coarse
        target = F.conv2d(F.avg_pool2d(x, 2), body["stem.weight"], body["stem.bias"], padding=1)
        loss = F.mse_loss(way_down[1](way_down[0](x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for block in (u.down_blocks[0], u.up_blocks[-1]):
        for resnet in block.resnets:
            nn.init.zeros_(resnet.conv2.weight)
        for attention in block.attentions:
            nn.init.zeros_(attention.proj_out.weight)


class Training:
    """The state of one worker: model, optimizer, average and data. The first worker saves it."""

    def __init__(self, rank: int, args: argparse.Namespace):
        self.rank, self.args = rank, args
        self.body = args.phase == "body"
        self.file = args.run / f"{args.phase}.pt"
        self.size = args.batch // args.workers
        config, prompts = read_json("config.json"), read_json("prompts.json")
        self.x0 = self._latents(read_pictures())
        abar = self._alphas_cumprod(config["scheduler"]).view(-1, 1, 1, 1)
        self.root_a, self.root_1a = abar.sqrt(), (1 - abar).sqrt()
        torch.manual_seed(0)  # the same weights in every worker
        self.model = Model(config, vocabulary_of(prompts), self.body).to(memory_format=torch.channels_last)
        self.ids = self.model.text.tokenize(prompts)
        self._sample_keys()
        self.step, self.clock = 0, 0.0
        state = torch.load(self.file, weights_only=False) if self.file.exists() else None
        if state is None and not self.body:
            grow(self.model, torch.load(args.run / "body.pt", weights_only=False)["model"])
        self.trained = self.model.trained()
        self.optimizer = torch.optim.AdamW(self.trained, args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.ema, self.batches = Ema(self.model, args.ema), Batches(len(self.x0), args.batch)
        if state is not None:
            self._restore(state)
        torch.manual_seed(self.step * args.workers + rank)

    def loss(self, progress: float) -> Tensor:
        """Draw this worker's part of a batch, and return its loss."""
        mine = slice(self.rank * self.size, (self.rank + 1) * self.size)
        k, t = self.batches.pictures()[mine], self.batches.timesteps(self.args.noisy)[mine]
        x = self.x0[k]
        eps = torch.randn_like(x) * (0.5 if self.body else 1.0)  # pooling over 2×2 pixels halves the noise
        noisy = (self.root_a[t] * x + self.root_1a[t] * eps).to(memory_format=torch.channels_last)
        v = self.root_a[t] * eps - self.root_1a[t] * x
        Level0Attention.draw(self.args.keys if progress < self.args.all_keys_from else TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(noisy, t, drop_words(self.ids[k]))
        return F.mse_loss(predicted.float(), v)

    def update(self, rate: float) -> float:
        """Take a step with the average gradients of all workers, and return their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        average(self.trained, self.args.workers)
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.rank == 0:
            self.ema.update(self.model)
        return norm.item()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.shadow,
            "ema_step": self.ema.step,
            "optimizer": self.optimizer.state_dict(),
            "queue": self.batches.queue,
            "order": self.batches.order.get_state(),
            "step": self.step,
            "clock": self.clock,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.shadow, self.ema.step = state["ema"], state["ema_step"]
        self.batches.queue, self.step, self.clock = state["queue"], state["step"], state["clock"]
        self.batches.order.set_state(state["order"])

    def _latents(self, pictures: Tensor) -> Tensor:
        """Normalise every channel, and save the mean and the deviation."""
        mean, std = pictures.mean((0, 2, 3), keepdim=True), pictures.std((0, 2, 3), keepdim=True)
        if self.rank == 0:
            norm = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
            (self.args.run / "norm.json").write_text(json.dumps(norm))
        x0 = (pictures - mean) / std
        return F.avg_pool2d(x0, 2) if self.body else x0

    @staticmethod
    def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler(**config).alphas_cumprod

    def _sample_keys(self) -> None:
        for block in (self.model.unet.down_blocks[0], self.model.unet.up_blocks[-1]):
            for attention in block.attentions:
                attention.transformer_blocks[0].attn1.set_processor(Level0Attention())


def minutes_of(args: argparse.Namespace) -> float:
    """Wall time of the phase; the file `<phase>.minutes` in the run folder can change it during the training."""
    file = args.run / f"{args.phase}.minutes"
    return float(file.read_text()) if file.exists() else args.minutes


def train(rank: int, args: argparse.Namespace, meeting: Path) -> None:
    """Run one worker. The workers wait for one another at the gradients only, which costs least on a busy machine."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(days=1), args.workers, rank)
    training = Training(rank, args)
    start, before, saved = time.monotonic(), training.clock, time.monotonic()
    progress, total, cpu = 0.0, 0.0, time.process_time()
    while progress < 1:
        training.clock = before + time.monotonic() - start
        share = torch.tensor([training.clock / (60 * minutes_of(args))])
        dist.broadcast(share, 0)  # clocks differ: the first worker's decides
        progress = min(1.0, share.item())
        loss = training.loss(progress)
        loss.backward()
        total += loss.item()
        rate = learning_rate(training.step, progress, args.lr, args.lr_end)
        norm = training.update(rate)
        if rank > 0:
            continue
        if training.step % LOG_EVERY == 0:
            spent, cpu = (time.process_time() - cpu) / LOG_EVERY, time.process_time()
            row = [training.step, f"{total / LOG_EVERY:.5f}", f"{norm:.3f}", f"{rate:.2e}", f"{training.clock:.0f}"]
            with (args.run / f"{args.phase}.csv").open("a", newline="") as log:
                csv.writer(log).writerow([*row, f"{spent:.2f}"])
            total = 0.0
        if time.monotonic() - saved > SAVE_EVERY or progress == 1:
            training.save()
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=["body", "full"], help="the phase to train")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument(
        "--minutes", type=float, required=True, help="wall time of the phase; the learning rate follows it"
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures per step (16)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    parser.add_argument("--lr-end", type=float, default=4e-5, help="final learning rate (4e-5)")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the averaged weights (.995)")
    parser.add_argument(
        "--keys", type=int, default=512, help=f"keys in self-attention at level 0; {TOKENS} is all (512)"
    )
    parser.add_argument(
        "--all-keys-from", type=float, default=0.6, help="share of the time from which all keys are used (.6)"
    )
    parser.add_argument(
        "--noisy", type=float, default=0.35, help="share of timesteps from 650 on; .35 is uniform (.35)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each, which share the batch (2)"
    )
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    meeting = (args.run / "meeting").absolute()
    meeting.unlink(missing_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    for rank in range(1, args.workers):
        context.Process(target=train, args=(rank, args, meeting), daemon=True).start()
    train(0, args, meeting)


if __name__ == "__main__":
    main()
