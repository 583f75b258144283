"""`NeighborhoodAttention1D`, `2D`, and `3D` with the arguments of each generation, and one forward for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from natten2 import unfused
from natten2._arguments import check_heads, check_probability
from natten2.compat._fused import attend
from natten2.compat._window import integers, natten_window

__all__ = ["module"]

_QK = (unfused.na1d_qk, unfused.na2d_qk, unfused.na3d_qk)
_AV = (unfused.na1d_av, unfused.na2d_av, unfused.na3d_av)


@dataclass(frozen=True)
class Settings:
    """What a generation's arguments come to."""

    dim: int
    heads: int
    window: tuple
    has_bias: bool
    qkv_bias: bool
    scale: float | None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    pads: bool = False


class _NeighborhoodAttention(nn.Module):
    """natten's module: projection, neighborhood attention, projection; weights have its names and shapes."""

    _rank: int
    _settings: Callable[..., Settings]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        settings = self._settings(self._rank, *args, **kwargs)
        check_heads("dim", settings.dim, "num_heads", settings.heads)
        check_probability("attn_drop", settings.attn_drop)
        check_probability("proj_drop", settings.proj_drop)
        self.embed_dim, self.num_heads = settings.dim, settings.heads
        self.head_dim = settings.dim // settings.heads
        self.scale = self.head_dim**-0.5 if settings.scale is None else settings.scale
        self.kernel_size, self.stride, self.dilation, self.is_causal = settings.window
        self.pads = settings.pads
        self.qkv = nn.Linear(settings.dim, 3 * settings.dim, bias=settings.qkv_bias)
        self.rpb = None
        if settings.has_bias:
            self.rpb = nn.Parameter(torch.empty(settings.heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(settings.attn_drop)
        self.proj = nn.Linear(settings.dim, settings.dim)
        self.proj_drop = nn.Dropout(settings.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self._rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have {self._rank + 2} axes and {self.embed_dim} channels, got {tuple(x.shape)}")
        spatial = x.shape[1:-1]
        if self.pads:
            x = self._pad(x, spatial)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        window = (self.kernel_size, self.stride, self.dilation, self.is_causal)
        if self.training and self.attn_drop.p > 0:
            weights = _QK[self._rank - 1](query, key, *window, self.scale, rpb=self.rpb).softmax(-1)
            output = _AV[self._rank - 1](self.attn_drop(weights), value, *window)
        else:
            output = attend(self._rank, query, key, value, window, self.scale, self.rpb)
        if self.pads:
            output = output[(slice(None), *(slice(length) for length in spatial))]
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _pad(self, x: Tensor, spatial: torch.Size) -> Tensor:
        """Zeros behind the end of each axis that is shorter than the window, as if they were tokens."""
        missing = [max(0, k * d - n) for k, d, n in zip(self.kernel_size, self.dilation, spatial, strict=True)]
        behind = [amount for axis in reversed(missing) for amount in (0, axis)]
        return nn.functional.pad(x, (0, 0, *behind)) if any(missing) else x

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


def _padded(
    rank: int,
    dim: int,
    num_heads: int,
    kernel_size: object,
    dilation: object = 1,
    bias: bool = True,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Settings:
    """The arguments of 0.14 and 0.15, whose modules pad small inputs."""
    sizes = integers("kernel_size", kernel_size, rank)
    if any(size < 2 or size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_size must be odd and greater than 1 in natten, got {kernel_size}")
    window = sizes, (1,) * rank, integers("dilation", dilation, rank), (False,) * rank
    # Configurations write 0 for the default.
    return Settings(dim, num_heads, window, bias, qkv_bias, qk_scale or None, attn_drop, proj_drop, pads=True)


def _padded_3d(
    rank: int,
    dim: int,
    num_heads: int,
    kernel_size: int,
    kernel_size_d: int | None = None,
    dilation: int | None = 1,
    dilation_d: int | None = None,
    bias: bool = True,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Settings:
    """The arguments of 0.15 in three dimensions."""
    dilation = dilation or 1
    sizes = (kernel_size_d or kernel_size, kernel_size, kernel_size)
    gaps = (dilation_d or dilation, dilation, dilation)
    return _padded(rank, dim, num_heads, sizes, gaps, bias, qkv_bias, qk_scale, attn_drop, proj_drop)


def _biased(
    rank: int,
    dim: int,
    num_heads: int,
    kernel_size: object,
    dilation: object = 1,
    is_causal: object = False,
    rel_pos_bias: bool = False,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    use_experimental_ops: bool = False,
) -> Settings:
    """The arguments of 0.17."""
    window = natten_window(rank, kernel_size, 1, dilation, is_causal)
    return Settings(dim, num_heads, window, rel_pos_bias, qkv_bias, qk_scale or None, attn_drop, proj_drop)


def _modern(
    rank: int,
    embed_dim: int,
    num_heads: int,
    kernel_size: object,
    stride: object = 1,
    dilation: object = 1,
    is_causal: object = False,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    proj_drop: float = 0.0,
) -> Settings:
    """The arguments of 0.20 and 0.21."""
    window = natten_window(rank, kernel_size, stride, dilation, is_causal)
    return Settings(embed_dim, num_heads, window, False, qkv_bias, qk_scale, proj_drop=proj_drop)


def _any(rank: int, *args: object, **kwargs: object) -> Settings:
    """The arguments of the generation whose keywords are there, and else of the newest."""
    if {"bias", "kernel_size_d", "dilation_d"} & kwargs.keys():
        return (_padded_3d if rank == 3 else _padded)(rank, *args, **kwargs)
    if {"dim", "rel_pos_bias", "attn_drop", "use_experimental_ops"} & kwargs.keys():
        return _biased(rank, *args, **kwargs)
    return _modern(rank, *args, **kwargs)


_SETTINGS = {"0.14": _padded, "0.15": _padded, "0.17": _biased, "0.21": _modern, "union": _any}


@cache
def module(rank: int, version: str) -> type[nn.Module]:
    """A generation's class; pickles find it while the drop-in is installed, that of all generations always."""
    settings = _padded_3d if version in ("0.14", "0.15") and rank == 3 else _SETTINGS[version]
    name = f"NeighborhoodAttention{rank}D"
    members = {
        "_rank": rank,
        "_settings": staticmethod(settings),
        "__module__": "natten2.compat.natten" if version == "union" else "natten",
        "__doc__": f"`natten.{name}`; {settings.__doc__}",
    }
    return type(name, (_NeighborhoodAttention,), members)
