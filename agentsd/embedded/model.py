"""The embedded text-to-image model: a latent diffusion model of six million parameters.

Its latents are pictures of 64×64 RGBA pixels, normalised channel by channel, so that its U-Net has 4096 tokens at full
resolution, like Stable Diffusion at 512×512. Its text encoder is a table of word embeddings. The noise schedule is
Stable Diffusion's, rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891), with v-prediction.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from PIL.Image import Image

WEIGHTS = Path(__file__).parent / "weights"
SIZE = 64
IGNORED = frozenset(["a", "an", "the", "of", "and", "with", "emoji", "picture", "photo", "image", "icon"])


def read_json(name: str) -> Any:
    """Read a JSON file of the weights folder."""
    return json.loads((WEIGHTS / name).read_text(encoding="utf-8"))


def words_of(prompt: str) -> list[str]:
    """List the words of a prompt in lower case, without articles and the like."""
    return [word for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word not in IGNORED]


def vocabulary_of(prompts: Sequence[str]) -> list[str]:
    """List the words of all prompts in alphabetical order."""
    return sorted({word for prompt in prompts for word in words_of(prompt)})


def read_pictures() -> Tensor:
    """Read the training pictures over white, with alpha as the fourth channel: (K, 4, 64, 64) in [0, 1]."""
    import numpy as np
    from einops import rearrange
    from PIL import Image

    sheet = Image.open(WEIGHTS / "pictures.png").convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    white.alpha_composite(sheet)
    x = torch.from_numpy(np.dstack([np.asarray(white)[..., :3], np.asarray(sheet)[..., 3]])).float() / 255
    x = rearrange(x, "(row h) (column w) c -> (row column) c h w", h=SIZE, w=SIZE)
    return x[: len(read_json("prompts.json"))].contiguous()


class TextEncoder(nn.Module):
    """Word and position embeddings: prompts of at most `tokens` words → (B, tokens, channels). Token 0 is padding."""

    def __init__(self, vocabulary: Sequence[str], tokens: int, channels: int):
        super().__init__()
        self.index = {word: k + 1 for k, word in enumerate(vocabulary)}
        self.tokens = tokens
        self.word = nn.Embedding(len(vocabulary) + 1, channels)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, channels))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Convert prompts to word indices (B, tokens); ValueError names an unknown word, or too many words."""
        ids = torch.zeros(len(prompts), self.tokens, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            words = words_of(prompt)
            if unknown := next((word for word in words if word not in self.index), None):
                near = difflib.get_close_matches(unknown, self.index, 5) or sorted(self.index)[:60:5]
                known = f"it knows, for example: {', '.join(near)}"
                raise ValueError(f"the embedded model does not know the word {unknown!r} (prompt {prompt!r}); {known}")
            if len(words) > self.tokens:
                most = f"the embedded model reads at most {self.tokens}"
                raise ValueError(f"the prompt {prompt!r} has {len(words)} words; {most}")
            row[: len(words)] = torch.tensor([self.index[word] for word in words])
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        return self.word(ids) + self.position


class Position(nn.Module):
    """Learned projection of the position in the picture, added to features (B, C, h, w)."""

    def __init__(self, channels: int, waves: int = 4):
        super().__init__()
        self.waves = waves
        self.project = nn.Linear(4 * waves, channels, bias=False)
        nn.init.normal_(self.project.weight, std=0.05)

    def forward(self, features: Tensor) -> Tensor:
        h, w = features.shape[-2:]
        k = torch.arange(1, self.waves + 1, device=features.device)
        angles = (torch.pi * ((torch.arange(n, device=k.device) + 0.5) / n)[:, None] * k for n in (h, w))
        y, x = (torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.project.weight.dtype) for angle in angles)
        grid = torch.cat([y[:, None].expand(-1, w, -1), x[None].expand(h, -1, -1)], dim=-1)
        return features + self.project(grid).permute(2, 0, 1).to(features.dtype)


def build_unet(config: dict) -> UNet2DConditionModel:
    """Build diffusers' U-Net, with positions added to the deepest level and to the first three stages of the way up."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**config)
    blocks = [unet.down_blocks[3], unet.mid_block, *unet.up_blocks[:3]]
    unet.position = nn.ModuleList(Position(block.resnets[0].in_channels) for block in blocks)
    for block, position in zip(blocks, unet.position, strict=True):
        block.resnets[0].register_forward_pre_hook(lambda _, args, position=position: (position(args[0]), *args[1:]))
    return unet


class EmbeddedPipeline:
    """Text-to-image pipeline of the embedded model; see `load`.

    Attributes:
        unet: the U-Net, patched like that of any diffusers pipeline.
        scheduler: a DDIM scheduler with the noise schedule of the training.
        prompts: the 100 prompts of the training pictures, in the order of the indices of `nearest`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        text: TextEncoder,
        prompts: list[str],
        norm: dict[str, list[float]],
    ):
        self.unet, self.scheduler, self.prompts, self._text = unet, scheduler, prompts, text
        self._mean, self._std = (torch.tensor(norm[name]).view(1, -1, 1, 1) for name in ("mean", "std"))

    device, dtype = (property(attrgetter(f"unet.{name}")) for name in ("device", "dtype"))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts as context (B, L, C) of the U-Net; the empty prompt is the unconditional one.

        Raises:
            ValueError: a prompt has an unknown word (the message names it), or too many words.
        """
        return self._text(self._text.tokenize(prompts).to(self.device))

    def noise(self, seeds: Sequence[int], height: int = SIZE, width: int = SIZE) -> Tensor:
        """Draw the initial latents (B, 4, height, width), each from its own seed, on the CPU."""
        rows = [torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    @torch.no_grad()
    def predict(self, latents: Tensor, t: int | Tensor, prompts: Sequence[str]) -> Tensor:
        """Evaluate the U-Net once: latents (B, 4, h, w) at timestep t in [0, 999] → velocity v (B, 4, h, w)."""
        return self.unet(latents, t, self.encode(prompts)).sample

    @torch.no_grad()
    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 3.0,
        height: int = SIZE,
        width: int = SIZE,
        callback: Callable[[int, int], Any] = lambda step, steps: None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Sample latents (B, 4, height, width) with DDIM, eta 0.

        Args:
            prompt: one prompt or B of them.
            seed: seed of the first picture; picture k has seed + k, so it is the same picture in any batch.
            steps: sampling steps, 1 to 1000.
            guidance: classifier-free guidance scale, 0 or more; 1 evaluates the prompt only.
            height, width: size of the latents, multiples of 8, at least 16; the model was trained at 64.
            callback: called with (step, steps) after every step, from 1 on.
            latents: initial noise (B, 4, height, width) to use instead of the seed's.
        """
        prompts, side = [prompt] if isinstance(prompt, str) else list(prompt), "a multiple of 8, at least 16"
        for good, said, allowed in (
            (prompts, "no prompt", "at least one"),
            (1 <= steps <= 1000, f"steps {steps}", "1 to 1000"),
            (guidance >= 0, f"guidance {guidance}", "0 or more"),
            (height >= 16 and height % 8 == 0, f"height {height}", side),
            (width >= 16 and width % 8 == 0, f"width {width}", side),
        ):
            if not good:
                raise ValueError(f"{said}, expected {allowed}")
        context = self.encode(prompts if guidance == 1 else [""] * len(prompts) + prompts)
        x = self.noise(range(seed, seed + len(prompts)), height, width) if latents is None else latents
        if x.shape != (len(prompts), 4, height, width):
            raise ValueError(f"latents {tuple(x.shape)}, expected {(len(prompts), 4, height, width)}")
        x = x.to(self.device, self.dtype)
        self.scheduler.set_timesteps(steps, device=self.device)
        for k, t in enumerate(self.scheduler.timesteps, 1):
            v = self.unet(x.repeat(len(context) // len(x), 1, 1, 1), t, context).sample
            if guidance != 1:
                uncond, cond = v.chunk(2)
                v = uncond + guidance * (cond - uncond)
            x = self.scheduler.step(v, t, x).prev_sample
            callback(k, steps)
        return x

    def __call__(self, prompt: str | Sequence[str], **kwargs: Any) -> list[Image]:
        """Sample, with the arguments of `sample`, and decode to RGB pictures."""
        return self.decode(self.sample(prompt, **kwargs))

    def decode(self, latents: Tensor) -> list[Image]:
        """Decode latents (B, 4, h, w) to B RGB pictures over white."""
        from PIL import Image

        pixels = (self._pixels(latents)[:, :3] * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return list(map(Image.fromarray, pixels))

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest training picture of each of B latents (B, 4, 64, 64).

        Returns:
            Its index in `prompts` (B,), and the distance (B,): the root mean square difference of the RGB values in
            [0, 1], over white, at 64×64 pixels.
        """
        x, pictures = (pixels[:, :3].flatten(1) for pixels in (self._pixels(latents), self.pictures))
        best = torch.cdist(x, pictures, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        return best.indices, best.values / x.shape[1] ** 0.5

    @cached_property
    def pictures(self) -> Tensor:
        """The training pictures (100, 4, 64, 64) in [0, 1]: RGB over white, and alpha."""
        return read_pictures()

    def latents_of(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 4, h, w) in [0, 1], as in `pictures`, as latents."""
        return ((pictures - self._mean) / self._std).to(self.device, self.dtype)

    def _pixels(self, latents: Tensor) -> Tensor:
        return (latents.float().cpu() * self._std + self._mean).clamp(0, 1)


def load(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> EmbeddedPipeline:
    """Load the embedded model."""
    from diffusers import DDIMScheduler
    from safetensors.torch import load_file

    config, prompts = read_json("config.json"), read_json("prompts.json")
    state = load_file(WEIGHTS / "model.safetensors")
    text = TextEncoder(read_json("vocabulary.json"), config["tokens"], config["unet"]["cross_attention_dim"])
    with torch.device("meta"):
        unet = build_unet(config["unet"])
    for module, prefix in ((unet, "unet."), (text, "text.")):
        weights = {k.removeprefix(prefix): v.to(device, dtype) for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(weights, assign=True)
        module.eval().requires_grad_(False)
    return EmbeddedPipeline(unet, DDIMScheduler(**config["scheduler"]), text, prompts, config["latents"])
