"""The Neighborhood Attention Transformer (NAT, arXiv 2204.07143), a hierarchical vision transformer.

With a dilation per block it is the Dilated Neighborhood Attention Transformer (arXiv 2209.15001). Modules and
parameters bear the names of the released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from natten2._arguments import check_heads, check_integer, check_probability, check_real, integers
from natten2.nn import NeighborhoodAttention2D

__all__ = ["NAT", "NATConfig", "nat_base", "nat_mini", "nat_small", "nat_tiny"]


@dataclass(frozen=True)
class NATConfig:
    """The shape of a :class:`NAT`.

    Level `i` works at `1 / 2 ** (i + 2)` of the image's resolution with `embed_dim * 2 ** i` channels.

    Args:
        depths: Number of blocks of each level; there are as many levels as entries.
        num_heads: Attention heads of each level, or one number for all; they divide the level's channels.
        embed_dim: Channels of the first level, even.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the level's channels.
        kernel_size: Keys per window and axis of every block, at least 1.
        dilations: For each level the dilation of its blocks, one number or one per block, at least 1; `None` means 1
            everywhere.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 leaves the head out.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Factor of the dot products; `head_dim ** -0.5` when `None`. Zero means zero.
        drop_rate: Dropout probability of the embedded image and of the projections and MLPs.
        drop_path_rate: Probability that the last block's branches are dropped in training; it grows linearly from 0 at
            the first block.
        layer_scale: Initial value of the learned factors of each block's branches (arXiv 2103.17239); `None` leaves
            them out.

    Raises:
        ValueError: A value is not allowed; the message names it.
        TypeError: A value is of the wrong type.
    """

    depths: Sequence[int]
    num_heads: int | Sequence[int]
    embed_dim: int
    mlp_ratio: float = 3.0
    kernel_size: int = 7
    dilations: Sequence[int | Sequence[int]] | None = None
    in_chans: int = 3
    num_classes: int = 1000
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        # Tuples keep the frozen config hashable.
        object.__setattr__(self, "depths", self._check_depths())
        object.__setattr__(self, "num_heads", self._check_num_heads())
        object.__setattr__(self, "dilations", self._check_dilations())

    def _check_numbers(self) -> None:
        for name, minimum in (("embed_dim", 2), ("kernel_size", 1), ("in_chans", 1), ("num_classes", 0)):
            check_integer(name, getattr(self, name), minimum)
        if self.embed_dim % 2 != 0:
            raise ValueError(f"embed_dim must be even, got {self.embed_dim}")
        for name in ("drop_rate", "drop_path_rate"):
            check_probability(name, getattr(self, name))
        check_real("mlp_ratio", self.mlp_ratio)
        if not (math.isfinite(self.mlp_ratio) and self.embed_dim * self.mlp_ratio >= 1):
            raise ValueError(f"mlp_ratio must be finite and leave at least one hidden channel, got {self.mlp_ratio}")
        if self.layer_scale is not None:
            check_real("layer_scale", self.layer_scale)

    def _check_depths(self) -> tuple[int, ...]:
        _check_sequence("depths", self.depths)
        depths = integers("depths", self.depths, len(self.depths))
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must hold at least one integer, each at least 1, got {depths}")
        return depths

    def _check_num_heads(self) -> tuple[int, ...]:
        num_heads = integers("num_heads", self.num_heads, len(self.depths))
        for level, heads in enumerate(num_heads):
            check_heads(f"the channels of level {level}", self.embed_dim * 2**level, f"num_heads[{level}]", heads)
        return num_heads

    def _check_dilations(self) -> tuple[tuple[int, ...], ...] | None:
        if self.dilations is None:
            return None
        _check_sequence("dilations", self.dilations)
        if len(self.dilations) != len(self.depths):
            raise ValueError(
                f"dilations must have one entry for each of {len(self.depths)} levels, got {self.dilations}"
            )
        return tuple(
            _check_dilation(f"dilations[{level}]", *entry)
            for level, entry in enumerate(zip(self.dilations, self.depths, strict=True))
        )


class NAT(nn.Module):
    """The Neighborhood Attention Transformer for image classification (arXiv 2204.07143).

    A stem of two convolutions embeds the image at a quarter of its resolution; levels of neighborhood attention blocks
    follow, with a convolution that halves the resolution and doubles the channels between them; the normed tokens are
    averaged and classified. Images of any size work: feature maps smaller than `kernel_size * dilation` are padded with
    zeros at the bottom and right for the attention alone, as in the released models.

    Linear weights start from a normal distribution of standard deviation 0.02, their biases from 0; convolutions keep
    PyTorch's initialization, as in the released training code.

    Args:
        config: The shape of the model.
    """

    def __init__(self, config: NATConfig) -> None:
        super().__init__()
        self.config = config
        self.num_levels = len(config.depths)
        self.num_features = config.embed_dim * 2 ** (self.num_levels - 1)
        self.patch_embed = Stem(config.in_chans, config.embed_dim)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.levels = nn.ModuleList(Level(config, level) for level in range(self.num_levels))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, config.num_classes) if config.num_classes > 0 else nn.Identity()
        self.apply(_init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """Maps images `[B, in_chans, height, width]` to the averaged tokens of the last level `[B, num_features]`.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
        """
        if images.dim() != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images must have shape [batch, {self.config.in_chans}, height, width], got {list(images.shape)}"
            )
        tokens = self.pos_drop(self.patch_embed(images))
        for level in self.levels:
            tokens = level(tokens)
        return self.norm(tokens).mean((1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Maps images `[B, in_chans, height, width]` to logits `[B, num_classes]`, or to features without a head.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
        """
        return self.head(self.forward_features(images))


class Stem(nn.Module):
    """Embeds images `[B, in_chans, H, W]` as tokens `[B, ceil(H / 4), ceil(W / 4), embed_dim]`."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Level(nn.Module):
    """Blocks of one resolution on tokens `[B, H, W, C]`, then, but for the last level, the step to the next."""

    def __init__(self, config: NATConfig, level: int) -> None:
        super().__init__()
        depth, first = config.depths[level], sum(config.depths[:level])
        dilations = (1,) * depth if config.dilations is None else config.dilations[level]
        is_last = level == len(config.depths) - 1
        self.blocks = nn.ModuleList(
            Block(config, level, dilations[block], _drop_path_rate(config, first + block)) for block in range(depth)
        )
        self.downsample = None if is_last else Downsampler(config.embed_dim * 2**level)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens if self.downsample is None else self.downsample(tokens)


class Downsampler(nn.Module):
    """Maps tokens `[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), 2 * dim]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.reduction(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Neighborhood attention and an MLP on tokens `[B, H, W, C]`, each normed before and added to its input."""

    def __init__(self, config: NATConfig, level: int, dilation: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim * 2**level
        self.window = config.kernel_size * dilation
        self.gamma1 = _layer_scale(config.layer_scale, dim)
        self.gamma2 = _layer_scale(config.layer_scale, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(
            dim,
            config.num_heads[level],
            config.kernel_size,
            dilation=dilation,
            qkv_bias=config.qkv_bias,
            qk_scale=config.qk_scale,
            rel_pos_bias=True,
            proj_drop=config.drop_rate,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(_scaled(self._attention(self.norm1(tokens)), self.gamma1))
        return tokens + self.drop_path(_scaled(self.mlp(self.norm2(tokens)), self.gamma2))

    def _attention(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        if height >= self.window and width >= self.window:
            return self.attn(tokens)
        bottom, right = max(self.window - height, 0), max(self.window - width, 0)
        return self.attn(nn.functional.pad(tokens, (0, 0, 0, right, 0, bottom)))[:, :height, :width]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on tokens `[..., dim]`."""

    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(tokens)))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, zeroes a residual branch for a random part of the batch.

    The kept samples are divided by the probability of keeping them.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        return branch * nn.functional.dropout(branch.new_ones(branch.shape[0], *(1,) * (branch.dim() - 1)), self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def _check_sequence(name: str, value: Sequence[object]) -> None:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence with one entry per level, got {value!r}")


def _check_dilation(name: str, dilation: int | Sequence[int], depth: int) -> tuple[int, ...]:
    dilations = integers(name, dilation, depth)
    if min(dilations) < 1:
        raise ValueError(f"{name} must be at least 1 in every block, got {dilations}")
    return dilations


def _drop_path_rate(config: NATConfig, block: int) -> float:
    """Grows linearly over all blocks of the model, from 0 at the first."""
    return config.drop_path_rate * block / max(sum(config.depths) - 1, 1)


def _layer_scale(value: float | None, dim: int) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_MINI = NATConfig(depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_TINY = replace(_MINI, depths=(3, 4, 18, 5))
_SMALL = NATConfig(
    depths=(3, 4, 18, 5),
    num_heads=(3, 6, 12, 24),
    embed_dim=96,
    mlp_ratio=2,
    drop_path_rate=0.3,
    layer_scale=1e-5,
)
_BASE = replace(_SMALL, num_heads=(4, 8, 16, 32), embed_dim=128, drop_path_rate=0.5)


def nat_mini(num_classes: int = 1000, **overrides: object) -> NAT:
    """NAT-Mini, 20 million parameters (arXiv 2204.07143).

    Args:
        num_classes: Classes of the head; 0 leaves the head out.
        overrides: Other fields of :class:`NATConfig` to change.

    Raises:
        ValueError: A value is not allowed; the message names it.
        TypeError: A value is of the wrong type, or :class:`NATConfig` has no such field.
    """
    return NAT(replace(_MINI, num_classes=num_classes, **overrides))


def nat_tiny(num_classes: int = 1000, **overrides: object) -> NAT:
    """NAT-Tiny, 28 million parameters; arguments and errors are those of :func:`nat_mini`."""
    return NAT(replace(_TINY, num_classes=num_classes, **overrides))


def nat_small(num_classes: int = 1000, **overrides: object) -> NAT:
    """NAT-Small, 51 million parameters, with layer scale; arguments and errors are those of :func:`nat_mini`."""
    return NAT(replace(_SMALL, num_classes=num_classes, **overrides))


def nat_base(num_classes: int = 1000, **overrides: object) -> NAT:
    """NAT-Base, 90 million parameters, with layer scale; arguments and errors are those of :func:`nat_mini`."""
    return NAT(replace(_BASE, num_classes=num_classes, **overrides))
