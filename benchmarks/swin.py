"""Swin (arXiv 2103.14030), the layer and the model, as NAT's rival: small, and for images of one size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.baselines import partition, reverse, swin_attention, swin_sdpa_attention
from natten2.models.block import MLP
from natten2.models.embedding import PatchEmbedding, PatchMerging

__all__ = ["SwinLayer", "SwinTiny"]

# What official weights were trained with, instead of minus infinity.
_HIDDEN = -100.0


class SwinLayer(nn.Module):
    """Swin's window attention with its two projections, `[B, height, width, channels]` to the same shape.

    The input is partitioned and the result reversed, as in Swin itself, so query, key, and value are not copied for it.

    Args:
        side: Height and width, if the windows are shifted.
        shift: By how many tokens they are shifted.
        is_fused: Whether PyTorch's fused attention runs, with the bias as its mask.
    """

    def __init__(
        self, channels: int, heads: int, window: int, side: int = 0, shift: int = 0, is_fused: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.attend = swin_sdpa_attention if is_fused else swin_attention
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))
        self.proj = nn.Linear(channels, channels)
        self.register_buffer("mask", _shift_mask(side, window, shift) if shift else None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[-1]
        if self.shift:
            input = input.roll((-self.shift, -self.shift), (1, 2))
        blocks = partition(input.unsqueeze(-2), self.window).view(-1, self.window, self.window, channels)
        query, key, value = self.qkv(blocks).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        scale = (channels // self.heads) ** -0.5
        output = self.attend(query, key, value, self.rpb, self.window, scale, self.mask)
        shape = (*input.shape[:-1], 1, channels)
        output = reverse(self.proj(output.flatten(-2)), self.window, shape).squeeze(-2)
        return output.roll((self.shift, self.shift), (1, 2)) if self.shift else output


class SwinTiny(nn.Module):
    """Swin-Tiny for images `[B, 3, 224, 224]` and 1000 classes, without stochastic depth."""

    def __init__(self, is_fused: bool = False, window: int = 7, image_size: int = 224) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(in_chans=3, embed_dim=96, patch_size=4)
        layers: list[nn.Module] = []
        for level, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
            channels, side = 96 * 2**level, image_size // 4 // 2**level
            if level > 0:
                layers.append(PatchMerging(channels // 2))
            for index in range(depth):
                # A single window has nowhere to go.
                shift = window // 2 if index % 2 == 1 and side > window else 0
                layers.append(_SwinBlock(channels, SwinLayer(channels, heads, window, side, shift, is_fused)))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(images))).mean((1, 2)))


class _SwinBlock(nn.Module):
    def __init__(self, channels: int, attn: SwinLayer) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = attn
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels, 4 * channels, drop=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


def _shift_mask(side: int, window: int, shift: int) -> Tensor:
    """What hides tokens of a block from those that the shift brought from the other border, `[blocks, T, T]`."""
    index = torch.arange(side)
    region = (index >= side - window).int() + (index >= side - shift).int()
    regions = (3 * region[:, None] + region).view(1, side, side, 1, 1)
    blocks = partition(regions, window).view(-1, window * window)
    return _HIDDEN * (blocks[:, :, None] != blocks[:, None, :]).float()
