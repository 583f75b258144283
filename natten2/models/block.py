"""The block that all levels are made of: neighborhood attention, then an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natten2.models.config import NATConfig
from natten2.nn import NeighborhoodAttention2D

__all__ = ["MLP", "Block", "DropPath"]


class Block(nn.Module):
    """Neighborhood attention and an MLP on tokens `[B, H, W, C]`, each normed before and added to its input.

    Maps smaller than `kernel_size * dilation` are padded with zeros at the bottom and right for the attention alone.
    """

    def __init__(self, config: NATConfig, level: int, block: int) -> None:
        super().__init__()
        dim, dilation = config.channels(level), config.block_dilations(level)[block]
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
        self.drop_path = DropPath(config.block_drop_path_rate(level, block))

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


def _layer_scale(value: float | None, dim: int) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch
