"""Pixels to tokens, and tokens to fewer tokens: with overlapping convolutions, or with patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from natten2.models.config import NATConfig

__all__ = ["ConvDownsampler", "ConvEmbedding", "PatchEmbedding", "PatchMerging", "make_downsampler", "make_embedding"]


def make_embedding(config: NATConfig) -> nn.Module:
    """What maps images `[B, in_chans, H, W]` to the first level's tokens `[B, H', W', embed_dim]`."""
    if config.patch_size is None:
        return ConvEmbedding(config.in_chans, config.embed_dim)
    return PatchEmbedding(config.in_chans, config.embed_dim, config.patch_size)


def make_downsampler(config: NATConfig, level: int) -> nn.Module:
    """What maps tokens `[B, H, W, C]` of a level to those of the next, `[B, ceil(H / 2), ceil(W / 2), 2 * C]`."""
    return (ConvDownsampler if config.patch_size is None else PatchMerging)(config.channels(level))


class ConvEmbedding(nn.Module):
    """Two overlapping convolutions: tokens `[B, ceil(H / 4), ceil(W / 4), embed_dim]`."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """One overlapping convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        images = tokens.permute(0, 3, 1, 2)
        if any(_is_open(length) for length in images.shape[2:]):
            # Inductor of torch 2.13 fails to order a convolution's axes by strides that are open.
            images = images.contiguous()
        return self.norm(self.reduction(images).permute(0, 2, 3, 1))


class PatchEmbedding(nn.Module):
    """Patches without overlap: tokens `[B, ceil(H / patch_size), ceil(W / patch_size), embed_dim]`.

    Images are padded with zeros at the bottom and right to whole patches.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        # Also by nothing, so that one graph serves every size.
        bottom, right = (-length % self.patch_size for length in images.shape[2:])
        images = functional.pad(images, (0, right, 0, bottom))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """The channels of 2 x 2 tokens, normed and projected (arXiv 2103.14030, section 3.1).

    An odd number of rows or columns gets another one of zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        tokens = functional.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))
        # Down before right: the order of the released weights' channels.
        corners = [tokens[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


def _is_open(size: int | torch.SymInt) -> bool:
    """Whether the model is traced for any size of an axis, and not for this one."""
    if not torch.compiler.is_compiling():
        return isinstance(size, torch.SymInt)
    # It takes long to import, but a compiler has done so.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)
