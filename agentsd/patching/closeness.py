"""How close a patched model's attention is to full attention, from a few tokens of a few calls while it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..methods import Method, SelfAttention

# Tokens of a layer for which full attention is computed as well.
TOKENS = 32
# One of so many U-Net calls is observed; odd, so that both halves of cond and uncond are, where they come in two calls.
EVERY = 5


@dataclass(frozen=True)
class Closeness:
    """How close self-attention was to full attention, in the blocks that were patched."""

    mean: float  # relative error ‖ours − full‖ / ‖full‖ of attention's output, averaged over the blocks
    worst: float  # that of the worst block
    block: str  # name of the worst block
    calls: int  # number of U-Net calls that were observed

    def __str__(self) -> str:
        mean, worst = (f"{100 * e:.0f}%" if e >= 0.0995 else f"{100 * e:.1f}%" for e in (self.mean, self.worst))
        return f"error of attention {mean} (worst block {worst})"


class Watch:
    """Compares the answers of some U-Net calls with full attention at a few tokens; on the device until `read`."""

    def __init__(self) -> None:
        self._seen = self._observed = 0
        self._squares: dict[str, Tensor] = {}  # ‖ours − full‖² and ‖full‖² (2,) by the block's name

    def next_call(self) -> Watch | None:
        """Return this for the call that begins; None if it is not observed."""
        observed = self._seen % EVERY == 0
        self._seen += 1
        self._observed += observed
        return self if observed else None

    def read(self) -> Closeness | None:
        """Return what was found so far; None if no patched block was observed. Waits for the device."""
        if not self._squares:
            return None
        squares = torch.stack([sums.cpu() for sums in self._squares.values()]).tolist()
        errors = {name: (a / b) ** 0.5 if b else 0.0 for name, (a, b) in zip(self._squares, squares, strict=True)}
        block = max(errors, key=errors.__getitem__)
        return Closeness(sum(errors.values()) / len(errors), errors[block], block, self._observed)

    def attend(self, name: str, method: Method, attention: SelfAttention) -> Tensor:
        """Have `method` answer the attention of the block `name`, and compare the answer."""
        places = _places(attention.x.shape[1], attention.x.device)
        found: list[Tensor] = []

        @torch.no_grad()
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.full(q.index_select(1, places), k, v)

        def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            projected = attention.project(x)
            if x is attention.x and not found:  # before the method can change the tensors
                found.append(attend(*projected))
            return projected

        out = method.attend(replace(attention, project=project))
        with torch.no_grad():
            # the method may have projected other tokens, merged ones say
            full = found[0] if found else attend(*attention.project(attention.x))
            full, ours = attention.project_out(full).float(), out.detach().index_select(1, places).float()
            squares, earlier = torch.stack([(ours - full).square().sum(), full.square().sum()]), self._squares.get(name)
            moved = earlier is None or earlier.device != squares.device
            self._squares[name] = squares if moved else earlier + squares
        return out


@cache
def _places(tokens: int, device: torch.device) -> Tensor:
    """Places of the tokens that are compared: one at random in each of as many stretches, the same every time.

    Not evenly spaced, since agents are: where full attention is known at agents, these would all be close.
    """
    count = min(TOKENS, tokens)
    with torch.inference_mode(False):
        jitter = torch.rand(count, generator=torch.Generator().manual_seed(0))
        return ((torch.arange(count) + jitter) * (tokens / count)).long().clamp(max=tokens - 1).to(device)
