"""A U-Net with nothing but one self-attention, so that the patch can be applied to that layer alone."""

from __future__ import annotations

from torch import Tensor, nn

from agentsd.hosts import Site


class BasicTransformerBlock(nn.Module):
    """Wrapper that `is_block` recognises by its class name."""

    def __init__(self, attn1: nn.Module) -> None:
        super().__init__()
        self.attn1 = attn1

    def forward(self, x: Tensor) -> Tensor:
        return self.attn1(x)


class _Image(nn.Module):
    def __init__(self, attn1: nn.Module) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(attn1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks[0](x.flatten(2).transpose(1, 2))


class SingleAttention(nn.Module):
    """The self-attention of `site`, called with an image-shaped tensor (B, C, height, width) and a timestep."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.attention = _Image(site.block.attn1)

    def forward(self, x: Tensor, timesteps: float) -> Tensor:
        return self.attention(x)
