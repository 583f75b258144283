"""The shapes that are measured. A new one is one line in `SHAPES` or `CORNERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["CASES", "CORNERS", "NAT_TINY", "SHAPES", "Attend", "Case", "Inputs", "Parameters", "make_inputs"]

T = TypeVar("T", int, bool)


class Parameters(NamedTuple):
    """The parameters of `natten2::na_forward`, one entry per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float


class Inputs(NamedTuple):
    """The tensors of one case; absent ones are `None`."""

    query: Tensor  # [B, *S, H, D]
    key: Tensor  # [B, *S, Hkv, D]
    value: Tensor  # [B, *S, Hkv, D]
    rpb: Tensor | None  # [H, 2 * k - 1 for each axis]
    additional_keys: Tensor | None  # [B, N, Hkv, D]
    additional_values: Tensor | None  # [B, N, Hkv, D]
    grad_output: Tensor  # [B, *S, H, D]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensor arguments of `natten2::na_forward`."""
        return self[:-1]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken of."""
        return [tensor for tensor in self.tensors if tensor is not None]


@dataclass(frozen=True)
class Case:
    """One shape of neighborhood attention; a parameter of the window is one value for all axes, or one per axis.

    Attributes:
        spatial: Lengths of the axes.
        key_heads: Heads of keys and values; as many as `heads` when `None`.
        additional: Number of additional keys and values.
        block: Side of Swin's blocks, where the kernel's doesn't divide the axes.
    """

    name: str
    spatial: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    heads: int = 2
    head_dim: int = 32
    batch: int = 1
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    key_heads: int | None = None
    bias: bool = False
    additional: int = 0
    block: int | None = None

    @property
    def parameters(self) -> Parameters:
        rank = len(self.spatial)
        return Parameters(
            _per_axis(self.kernel_size, rank),
            _per_axis(self.stride, rank),
            _per_axis(self.dilation, rank),
            _per_axis(self.is_causal, rank),
            self.head_dim**-0.5,
        )

    def as_blocks(self) -> Case:
        """The same tensors, attended to in adjacent blocks instead of one window per query."""
        side = self.block or self.kernel_size
        return replace(self, kernel_size=side, stride=side, dilation=1)


Attend = Callable[[Case, Inputs], Tensor]

# NAT-Tiny's four levels for images of 224 x 224 (arXiv 2204.07143, table 1).
NAT_TINY = (
    Case("nat-tiny-1", (56, 56), 7, heads=2, bias=True),
    Case("nat-tiny-2", (28, 28), 7, heads=4, bias=True),
    Case("nat-tiny-3", (14, 14), 7, heads=8, bias=True),
    Case("nat-tiny-4", (7, 7), 7, heads=16, bias=True),
)

# The same in batches, DiNAT's dilated layers and its largest window (arXiv 2209.15001), HDiT's first level for images
# of 256 x 256 (arXiv 2401.11605), and other ranks.
SHAPES = (
    *NAT_TINY,
    *(replace(case, name=f"{case.name}-batch", batch=8) for case in NAT_TINY),
    Case("dinat-tiny-1", (56, 56), 7, heads=2, dilation=8, bias=True),
    Case("dinat-tiny-2", (28, 28), 7, heads=4, dilation=4, bias=True),
    Case("dinat-tiny-3", (14, 14), 7, heads=8, dilation=2, bias=True),
    Case("dinat-large-1", (96, 96), 11, heads=6, bias=True),
    Case("hdit-1", (64, 64), 7, heads=2, head_dim=64, batch=2, bias=True, block=8),
    Case("sequence-4096", (4096,), 255, heads=4, head_dim=64),
    Case("video-28", (8, 28, 28), (3, 7, 7), heads=3),
)

# Where a gather could win: little to compute per byte, few tokens, channels that fill no vector, heads, windows, or
# additional keys enough for matrix products.
CORNERS = (
    Case("sequence", (2048,), 127),
    Case("sequence-causal", (2048,), 128, is_causal=True),
    Case("video", (8, 14, 14), (3, 7, 7)),
    Case("video-one-frame", (1, 28, 28), (1, 7, 7), bias=True),
    Case("window-1", (28, 28), 1, heads=4),
    Case("window-1-wide", (1024,), 1, heads=1, head_dim=256),
    Case("window-3", (56, 56), 3, heads=2, bias=True),
    Case("window-whole", (14, 14), 14, heads=2),
    Case("stride-4", (32, 32), 8, stride=4),
    Case("head-dim-1", (28, 28), 7, heads=4, head_dim=1, bias=True),
    Case("head-dim-3", (28, 28), 7, heads=4, head_dim=3, bias=True),
    Case("head-dim-128", (28, 28), 7, heads=1, head_dim=128, bias=True),
    Case("shared-keys", (28, 28), 7, heads=8, key_heads=1),
    Case("additional-keys", (28, 28), 7, heads=4, additional=16),
    Case("additional-1024", (28, 28), 3, heads=1, head_dim=64, additional=1024),
    Case("window-1-additional", (28, 28), 1, heads=4, additional=64),
    Case("many-heads-per-key", (28, 28), 3, heads=64, key_heads=1, head_dim=2),
    Case("head-dim-1-window-1", (28, 28), 1, heads=16, head_dim=1),
    Case("small", (8, 8), 3, heads=1, head_dim=8),
)

CASES = (*SHAPES, *CORNERS)


def make_inputs(
    case: Case, dtype: torch.dtype, *, requires_grad: bool = False, device: torch.device | str = "cpu"
) -> Inputs:
    """Contiguous tensors from the standard normal distribution, the same ones in every run on a kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(requires_grad)

    key_heads = case.key_heads or case.heads
    grid, channels = (case.batch, *case.spatial), case.head_dim
    offsets = [2 * kernel_size - 1 for kernel_size in case.parameters.kernel_size]
    additional = (case.batch, case.additional, key_heads, channels)
    return Inputs(
        query=normal(*grid, case.heads, channels),
        key=normal(*grid, key_heads, channels),
        value=normal(*grid, key_heads, channels),
        rpb=normal(case.heads, *offsets) if case.bias else None,
        additional_keys=normal(*additional) if case.additional else None,
        additional_values=normal(*additional) if case.additional else None,
        grad_output=normal(*grid, case.heads, channels).detach(),
    )


def _per_axis(value: T | Sequence[T], rank: int) -> tuple[T, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * rank
