"""How close a patched model's attention is to full attention, from a few tokens of a few calls while it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..methods import Method, SelfAttention
from ..words import percent

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
        return f"error of attention {percent(self.mean)} (worst block {percent(self.worst)})"


class Watch:
    """Compares the answers of some U-Net calls with full attention at a few tokens; on the device until `read`."""

    def __init__(self) -> None:
        self._seen = 0  # U-Net calls
        self._squares: dict[str, Tensor] = {}  # ‖ours − full‖² and ‖full‖² (2,) by the block's name

    def next_call(self) -> Watch | None:
        """Return this for the call that begins; None if it is not observed."""
        self._seen += 1
        return self if self._seen % EVERY == 1 else None

    def read(self) -> Closeness | None:
        """Return what was found so far; None if no patched block was observed. Waits for the device."""
        if not self._squares:
            return None
        squares = torch.stack([sums.cpu() for sums in self._squares.values()]).tolist()
        errors = {name: (a / b) ** 0.5 if b else 0.0 for name, (a, b) in zip(self._squares, squares, strict=True)}
        block = max(errors, key=errors.__getitem__)
        return Closeness(sum(errors.values()) / len(errors), errors[block], block, -(-self._seen // EVERY))

    def attend(self, name: str, method: Method, attention: SelfAttention) -> Tensor:
        """Have `method` answer the attention of the block `name`, and compare the answer."""
        places = _places(attention.x.shape[1], attention.x.device)
        found: list[Tensor] = []

        def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = attention.project(x)
            if x is attention.x and not found:  # before the method can change the tensors
                with torch.no_grad():
                    found.append(attention.full(q.index_select(1, places), k, v))
            return q, k, v

        out = method.attend(replace(attention, project=project))
        with torch.no_grad():
            if not found:  # the method has projected other tokens, merged ones say
                project(attention.x)
            full, ours = attention.project_out(found[0]).float(), out.detach().index_select(1, places).float()
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
